package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/grpcreflect/v2"
	"example.com/shop/internal/app"
	"example.com/shop/internal/rabbitrpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

type rpcCommands struct {
	Ls   rpcLsCommand   `cmd:"" help:"List services on RabbitMQ with their replicas and waiting requests."`
	Call rpcCallCommand `cmd:"" help:"Call a unary method, over HTTP or over RabbitMQ."`
}

type rpcLsCommand struct {
	Services []string      `arg:"" optional:"" help:"${rpc_services}"`
	AMQPURL  amqpURL       `name:"amqp-url" env:"AMQP_URL" required:"" help:"RabbitMQ URL with its vhost."`
	Rate     time.Duration `help:"${rpc_rate}"`
}

// Validate bounds Rate because requests to a service without replicas wait while copies are counted: see
// rabbitrpc.Rates.
func (c *rpcLsCommand) Validate() error { return between("--rate", c.Rate, 0, time.Minute) }

func (c *rpcLsCommand) Run(ctx context.Context) error {
	names := c.Services
	if len(names) == 0 {
		names = app.Services()
	}
	states, err := rabbitrpc.Look(ctx, string(c.AMQPURL), names...)
	if err != nil {
		return err
	}
	var rates map[string]float64
	if c.Rate > 0 {
		var served []string
		for _, state := range states {
			if state.Replicas > 0 {
				served = append(served, state.Name)
			}
		}
		rates, err = rabbitrpc.Rates(ctx, string(c.AMQPURL), rabbitrpc.DefaultExchange, c.Rate, served...)
		if err != nil {
			return err
		}
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprint(table, "SERVICE\tREPLICAS\tWAITING\tCALLS/S\n")
	for _, state := range states {
		rate := "-"
		if c.Rate > 0 {
			rate = fmt.Sprintf("%.1f", rates[state.Name])
		}
		fmt.Fprintf(table, "%s\t%d\t%d\t%s\n", state.Name, state.Replicas, state.Waiting, rate)
	}
	return table.Flush()
}

type rpcCallCommand struct {
	Procedure string            `arg:"" placeholder:"SERVICE/METHOD" help:"Method, e.g. orders.v1.OrderService/GetOrder."`
	Data      string            `short:"d" default:"{}" help:"Request as JSON."`
	Header    map[string]string `short:"H" help:"Metadata to send, such as authorization=TOKEN."`
	HTTP      string            `name:"http" xor:"way" placeholder:"URL" help:"${rpc_http}"`
	AMQP      bool              `name:"amqp" xor:"way" help:"Call over RabbitMQ."`
	AMQPURL   amqpURL           `name:"amqp-url" env:"AMQP_URL" help:"RabbitMQ URL with its vhost, for --amqp."`
	Timeout   time.Duration     `default:"10s" help:"Deadline of the call."`
}

func (c *rpcCallCommand) Validate() error {
	if c.AMQP && c.AMQPURL == "" {
		return errors.New("--amqp needs --amqp-url")
	}
	service, method, ok := strings.Cut(strings.TrimPrefix(c.Procedure, "/"), "/")
	if !ok || !protoreflect.FullName(service).IsValid() || !protoreflect.Name(method).IsValid() {
		return fmt.Errorf("%q is not SERVICE/METHOD, such as orders.v1.OrderService/GetOrder", c.Procedure)
	}
	return nil
}

// Run prints the response as JSON.
func (c *rpcCallCommand) Run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	client, done := c.client()
	defer done()
	method, err := c.method(ctx, client)
	if err != nil {
		return err
	}
	request, response := dynamicpb.NewMessage(method.Input()), dynamicpb.NewMessage(method.Output())
	if err := protojson.Unmarshal([]byte(c.Data), request); err != nil {
		return fmt.Errorf("--data is not a %s: %w", method.Input().FullName(), err)
	}
	ctx, info := connect.NewClientContext(ctx)
	for name, value := range c.Header {
		info.RequestHeader().Set(name, value)
	}
	procedure := fmt.Sprintf("/%s/%s", method.Parent().FullName(), method.Name())
	spec := connect.Spec{Procedure: procedure, Schema: method}
	if err := client.CallUnary(ctx, spec, request, response); err != nil {
		return err
	}
	fmt.Println(protojson.Format(response))
	return nil
}

func (c *rpcCallCommand) client() (client *connect.Client, done func()) {
	if c.AMQP {
		config := rabbitrpc.TransportConfig{URL: string(c.AMQPURL), Name: app.ServiceName + " rpc call"}
		transport := rabbitrpc.NewTransport(config)
		return connect.NewClient(transport), func() { _ = transport.Close() }
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	url := cmp.Or(strings.TrimSuffix(c.HTTP, "/"), "http://127.0.0.1:8080")
	client = connect.NewClient(connecthttp.NewTransport(&http.Client{Transport: transport}, url))
	return client, transport.CloseIdleConnections
}

// method finds the method's schema in this program, else through the server's reflection, which only HTTP offers.
func (c *rpcCallCommand) method(ctx context.Context, client *connect.Client) (protoreflect.MethodDescriptor, error) {
	service, name, _ := strings.Cut(strings.TrimPrefix(c.Procedure, "/"), "/")
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil && !c.AMQP {
		found, err = askForSchema(ctx, client, protoreflect.FullName(service))
	}
	if err != nil {
		return nil, fmt.Errorf("find service %s: %w", service, err)
	}
	descriptor, ok := found.(protoreflect.ServiceDescriptor)
	if !ok {
		return nil, fmt.Errorf("%s is not a service", service)
	}
	method := descriptor.Methods().ByName(protoreflect.Name(name))
	if method == nil {
		return nil, fmt.Errorf("service %s has no method %s", service, name)
	}
	if method.IsStreamingClient() || method.IsStreamingServer() {
		return nil, fmt.Errorf("%s is a stream; only unary methods can be called", c.Procedure)
	}
	return method, nil
}

// askForSchema gets the service and everything that it imports from the server's reflection.
func askForSchema(
	ctx context.Context, client *connect.Client, service protoreflect.FullName,
) (protoreflect.Descriptor, error) {
	stream := grpcreflect.NewClient(client).NewStream(ctx)
	defer stream.Close()
	missing, err := stream.FileContainingSymbol(service)
	files := map[string]*descriptorpb.FileDescriptorProto{}
	for len(missing) > 0 && err == nil {
		file := missing[0]
		missing = missing[1:]
		if files[file.GetName()] != nil {
			continue
		}
		files[file.GetName()] = file
		for _, imported := range file.GetDependency() {
			isImported := func(f *descriptorpb.FileDescriptorProto) bool { return f.GetName() == imported }
			if files[imported] == nil && !slices.ContainsFunc(missing, isImported) {
				var more []*descriptorpb.FileDescriptorProto
				if more, err = stream.FileByFilename(imported); err != nil {
					break
				}
				missing = append(missing, more...)
			}
		}
	}
	if err != nil {
		return nil, err
	}
	set := new(descriptorpb.FileDescriptorSet)
	for _, file := range files {
		set.File = append(set.File, file)
	}
	registry, err := protodesc.NewFiles(set)
	if err != nil {
		return nil, err
	}
	return registry.FindDescriptorByName(service)
}
