package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	conformancev1 "example.com/shop/conformance/gen/connectrpc/conformance/v1"
	"example.com/shop/conformance/gen/connectrpc/conformance/v1/conformancev1connect"
	"example.com/shop/internal/app"
	"example.com/shop/internal/rabbitrpc"
	"example.com/shop/internal/unary"
	"golang.org/x/sync/errgroup"
)

func init() { transports["queue"] = overRabbitMQ }

// overRabbitMQ calls the API over RabbitMQ, through an HTTP server that only forwards unary calls. It announces that
// server once a replica answers from the queue. All replicas share the service's queue, so it allows one server at a
// time.
//
//	connectconformance --mode server --conf queue.yaml --max-servers 1 -- conformance queue
func overRabbitMQ(
	ctx context.Context, group *errgroup.Group, config app.Config, _ *conformancev1.ServerCompatRequest,
) error {
	config.AMQPURL, config.RPCOverRabbitMQ.Serve = os.Getenv("AMQP_URL"), true
	group.Go(func() error { return app.RunAPI(ctx, config) })
	transport := rabbitrpc.NewTransport(rabbitrpc.TransportConfig{
		URL: config.AMQPURL, Name: "conformance", Timeout: noTimeout,
	})
	context.AfterFunc(ctx, func() { _ = transport.Close() })
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	group.Go(func() error { return serveBridge(ctx, newBridge(transport), listener) })
	if err := untilServed(ctx, transport); err != nil {
		return err
	}
	return announce(new(conformancev1.ServerCompatRequest), listener.Addr().(*net.TCPAddr))
}

// newBridge returns an HTTP server that forwards unary calls over RabbitMQ. It has no limits and changes nothing, so
// the runner sees the answers that the queue's client received.
func newBridge(transport *rabbitrpc.Transport) *http.Server {
	services := connect.NewServer()
	register(services)
	client, bridge := connect.NewClient(transport), connect.NewServer()
	for spec := range services.Specs() {
		if spec.StreamType == connect.StreamTypeUnary {
			bridge.Register(connect.Method{Spec: spec, Handler: forward(client)})
		}
	}
	mux, protocols := http.NewServeMux(), new(http.Protocols)
	connecthttp.Mount(mux, bridge)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	return &http.Server{Handler: mux, Protocols: protocols}
}

// forward makes the same call over the queue, with its metadata and deadline, and returns the same answer.
func forward(client *connect.Client) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		method, _ := unary.Describe(spec)
		req, err := unary.Receive(method, stream)
		if err != nil {
			return err
		}
		incoming, _ := connect.CallInfoForServerContext(ctx)
		ctx, outgoing := connect.NewClientContext(ctx)
		copyHeader(outgoing.RequestHeader(), incoming.RequestHeader())
		res := unary.New(method.Output())
		err = client.CallUnary(ctx, spec, req, res)
		copyHeader(incoming.ResponseHeader(), outgoing.ResponseHeader())
		copyHeader(incoming.ResponseTrailer(), outgoing.ResponseTrailer())
		var remote *connect.Error
		if errors.As(err, &remote) { // copy it, because Connect does not pass on errors of other servers
			own := connect.NewError(remote.Code(), remote.Message())
			for _, detail := range remote.Details() {
				own = own.WithDetail(detail)
			}
			return own
		}
		if err != nil {
			return err
		}
		return stream.Send(res)
	}
}

func copyHeader(to, from *connect.Header) {
	for name, values := range from.All() {
		to.SetValues(name, values)
	}
}

// serveBridge serves bridge on listener until ctx is done.
func serveBridge(ctx context.Context, bridge *http.Server, listener net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = bridge.Close() })
	defer stop()
	if err := bridge.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// untilServed waits until a replica answers.
func untilServed(ctx context.Context, transport *rabbitrpc.Transport) error {
	client := conformancev1connect.NewConformanceServiceClient(connect.NewClient(transport))
	return until(ctx, func(ctx context.Context) error {
		_, err := client.Unary(ctx, &conformancev1.UnaryRequest{})
		return err
	})
}
