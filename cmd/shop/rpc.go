package main

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/grpcreflect/v2"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
)

type rpcCommands struct {
	Call rpcCallCommand `cmd:"" help:"Call a unary method."`
	rpcFeatures
}

type rpcCallCommand struct {
	Procedure string            `arg:"" placeholder:"SERVICE/METHOD" help:"Method, e.g. orders.v1.OrderService/GetOrder."`
	Data      string            `short:"d" default:"{}" help:"Request as JSON."`
	Header    map[string]string `short:"H" help:"Metadata to send, such as authorization=TOKEN."`
	HTTP      string            `name:"http" xor:"way" placeholder:"URL" help:"${rpc_http}"`
	Timeout   time.Duration     `default:"10s" help:"Deadline of the call."`
	callFeatures
}

// callTransport is another transport than HTTP.
type callTransport interface {
	check() error
	// client returns nil if the flags do not select this transport.
	client() (client *connect.Client, done func())
}

func (c *rpcCallCommand) Validate() error {
	for _, transport := range c.callFeatures.all() {
		if err := transport.check(); err != nil {
			return err
		}
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
	client, hasReflection, done := c.client()
	defer done()
	method, err := c.method(ctx, client, hasReflection)
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

func (c *rpcCallCommand) client() (client *connect.Client, hasReflection bool, done func()) {
	for _, transport := range c.callFeatures.all() {
		if client, done = transport.client(); client != nil {
			return client, false, done
		}
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols}
	url := cmp.Or(strings.TrimSuffix(c.HTTP, "/"), "http://127.0.0.1:8080")
	client = connect.NewClient(connecthttp.NewTransport(&http.Client{Transport: transport}, url))
	return client, true, transport.CloseIdleConnections
}

// method finds the method's schema in this program, else through the server's reflection, which only HTTP offers.
func (c *rpcCallCommand) method(
	ctx context.Context, client *connect.Client, hasReflection bool,
) (protoreflect.MethodDescriptor, error) {
	service, name, _ := strings.Cut(strings.TrimPrefix(c.Procedure, "/"), "/")
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil && hasReflection {
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
