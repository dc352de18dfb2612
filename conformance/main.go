// Command conformance serves the domain of Connect's conformance suite with the service's API. The suite's runner
// (connectrpc.com/conformance) starts and calls it. `make conformance` runs it.
//
//	connectconformance --mode server --conf http.yaml --known-failing @http-known-failing.txt -- conformance
//
// It uses the Postgres of POSTGRES_URL, with the schema of `shop migrate`.
package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	conformancev1 "example.com/shop/conformance/gen/connectrpc/conformance/v1"
	"example.com/shop/internal/app"
	"example.com/shop/internal/rpcserver"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"
)

func main() {
	slog.SetDefault(slog.New(slog.DiscardHandler)) // the suite provokes errors
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	serve := overHTTP
	if len(os.Args) > 1 {
		serve = transports[os.Args[1]]
	}
	if serve == nil {
		fmt.Fprintf(os.Stderr, "conformance: there is no transport %q\n", os.Args[1])
		os.Exit(2)
	}
	if err := run(ctx, serve); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

// transport starts the API in the group, serves it over one transport, and announces it to the runner.
type transport func(
	ctx context.Context, group *errgroup.Group, config app.Config, request *conformancev1.ServerCompatRequest,
) error

// transports are those besides HTTP, by the program's argument.
var transports = map[string]transport{}

func overHTTP(
	ctx context.Context, group *errgroup.Group, config app.Config, request *conformancev1.ServerCompatRequest,
) error {
	address, err := net.ResolveTCPAddr("tcp", config.Addr)
	if err != nil {
		return err
	}
	group.Go(func() error { return app.RunAPI(ctx, config) })
	if err := untilListening(ctx, config.Addr); err != nil {
		return err
	}
	return announce(request, address)
}

// run starts the server that the runner requests on standard input, writes its address to standard output, and serves
// until ctx is done.
func run(ctx context.Context, serve transport) (err error) {
	request := new(conformancev1.ServerCompatRequest)
	if err := receive(os.Stdin, request); err != nil {
		return fmt.Errorf("read the runner's request: %w", err)
	}
	scratch, err := os.MkdirTemp("", "conformance-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(scratch)) }()
	address, err := freeAddress()
	if err != nil {
		return err
	}
	config, err := configure(request, address, scratch)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return serve(ctx, group, config, request) })
	return group.Wait()
}

// configure configures the API with its usual limits, with two exceptions: the suite sets the size of a message, and
// the limits per caller are high, because the runner is a single caller.
func configure(request *conformancev1.ServerCompatRequest, address *net.TCPAddr, scratch string) (app.Config, error) {
	config := app.Config{
		PostgresURL: os.Getenv("POSTGRES_URL"), Exchange: "events", Addr: address.String(), MaxConns: 4,
		Version: "conformance",
		Edge: app.Edge{
			NoAuth: true, ReadMaxBytes: int(request.GetMessageReceiveLimit()),
			Limit: rpcserver.LimitConfig{Rate: 100_000, Concurrent: 200},
		},
	}.WithServices(register)
	creds, files := request.GetServerCreds(), &config.Edge.TLS
	for _, file := range []struct {
		path    *string
		name    string
		content []byte
	}{
		{&files.Cert, "server.pem", creds.GetCert()}, {&files.Key, "server.key", creds.GetKey()},
		{&files.ClientCA, "clients.pem", request.GetClientTlsCert()},
	} {
		if len(file.content) == 0 {
			continue
		}
		*file.path = filepath.Join(scratch, file.name)
		if err := os.WriteFile(*file.path, file.content, 0o600); err != nil {
			return config, err
		}
	}
	files.RequireClient = files.ClientCA != ""
	return config, nil
}

// announce tells the runner the server's address, and its certificate, which the runner made.
func announce(request *conformancev1.ServerCompatRequest, address *net.TCPAddr) error {
	return send(os.Stdout, &conformancev1.ServerCompatResponse{
		Host: "127.0.0.1", Port: uint32(address.Port), PemCert: request.GetServerCreds().GetCert(),
	})
}

// freeAddress returns an unused address.
func freeAddress() (*net.TCPAddr, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return listener.Addr().(*net.TCPAddr), listener.Close()
}

func untilListening(ctx context.Context, address string) error {
	return until(ctx, func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
		if err != nil {
			return err
		}
		return conn.Close()
	})
}

// until retries every 20 ms until try succeeds, for 30 s at most.
func until(ctx context.Context, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// receive reads a message from the runner: the length in four bytes, then the message.
func receive(from io.Reader, message proto.Message) error {
	var length [4]byte
	if _, err := io.ReadFull(from, length[:]); err != nil {
		return err
	}
	encoded := make([]byte, binary.BigEndian.Uint32(length[:]))
	if _, err := io.ReadFull(from, encoded); err != nil {
		return err
	}
	return proto.Unmarshal(encoded, message)
}

// send writes a message to the runner in the same format.
func send(to io.Writer, message proto.Message) error {
	encoded, err := proto.Marshal(message)
	if err != nil {
		return err
	}
	_, err = to.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(encoded))), encoded...))
	return err
}
