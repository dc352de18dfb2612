// Package clients makes clients for other services. A call through such a client has a deadline, carries the service's
// credentials and the trace, and is repeated while the other service is unavailable, if its method may be repeated.
//
// If a handler returns the error of such a call, its caller gets at most a code: see docs/security.md.
//
// It guarantees that a method without a declared idempotency level is never sent twice, and that a unary call ends by
// its deadline. Do not call in a database transaction, which would stay open meanwhile, unless the timeout is short.
package clients

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/otelconnect"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// Config configures a client. The zero value sends no credentials.
type Config struct {
	// Timeout is the deadline of a unary call, repeats included, if the caller's context has none. Default 10 s.
	Timeout time.Duration
	// Attempts is how often a unary call is sent in all while the other service is unavailable, if its method is
	// declared IDEMPOTENT or NO_SIDE_EFFECTS. Default 4; 1 for no repeats.
	Attempts int
	// RetryBase is the pause after the first attempt. Each further pause is twice as long, at most 2 s, plus or minus a
	// random half. Default 100 ms.
	RetryBase time.Duration
	// APIKey is sent as X-Api-Key, unless it is "".
	APIKey string
	// Token returns a token, which is sent as bearer token. It is called once for each attempt, so it should cache. Nil
	// for no token.
	Token func(ctx context.Context) (string, error)
	// MeterProvider and TracerProvider receive metrics and traces. Default: the global providers.
	MeterProvider  metric.MeterProvider
	TracerProvider trace.TracerProvider
}

// New makes a client over a transport that propagates the trace.
func New(transport connect.Transport, config Config) *connect.Client {
	return connect.NewClient(transport, markErrors, config.deadline(), config.repeat(), config.authenticate())
}

// HTTP makes a client of the service at a URL, such as https://billing.example or http://billing:8080. done closes its
// idle connections. It returns an error if the URL is not one of HTTP. It follows no redirect, since that would send
// the credentials to another host.
func HTTP(base string, config Config) (client *connect.Client, done func(), err error) {
	parsed, err := url.Parse(base)
	if err != nil || parsed.Host == "" || parsed.Scheme != "http" && parsed.Scheme != "https" {
		return nil, nil, errors.New("not the URL of a service, such as http://billing:8080") // it may contain a password
	}
	telemetry, err := config.telemetry()
	if err != nil {
		return nil, nil, fmt.Errorf("measure calls: %w", err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = transport.MaxIdleConns // the default of 2 would open a connection for most calls
	over := connecthttp.NewTransport(&http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}, strings.TrimSuffix(base, "/"))
	client = connect.NewClient(over, markErrors, config.deadline(), config.repeat(), config.authenticate(), telemetry)
	return client, transport.CloseIdleConnections, nil
}

// telemetry measures and traces each attempt.
func (c Config) telemetry() (connect.ClientInterceptor, error) {
	if c.MeterProvider == nil {
		c.MeterProvider = otel.GetMeterProvider()
	}
	if c.TracerProvider == nil {
		c.TracerProvider = otel.GetTracerProvider()
	}
	return otelconnect.NewClientInterceptor(
		otelconnect.WithMeterProvider(c.MeterProvider), otelconnect.WithTracerProvider(c.TracerProvider),
		otelconnect.WithPropagator(propagation.TraceContext{}),
	)
}

// authenticate adds the credentials to each attempt.
func (c Config) authenticate() connect.ClientInterceptor {
	return func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			info, _ := connect.CallInfoForClientContext(ctx)
			if c.APIKey != "" {
				info.RequestHeader().Set("X-Api-Key", c.APIKey)
			}
			if c.Token != nil {
				token, err := c.Token(ctx)
				if err != nil {
					return nil, connect.NewError(connect.CodeUnavailable, "get a token for the call").WithCause(err)
				}
				info.RequestHeader().Set("Authorization", "Bearer "+token)
			}
			return next(ctx, spec)
		}
	}
}

// deadline gives unary calls without a deadline one.
func (c Config) deadline() connect.ClientInterceptor {
	timeout := cmp.Or(c.Timeout, 10*time.Second)
	return func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			if _, has := ctx.Deadline(); has || spec.StreamType != connect.StreamTypeUnary {
				return next(ctx, spec)
			}
			ctx, cancel := context.WithTimeout(ctx, timeout)
			stream, err := next(ctx, spec)
			if err != nil {
				cancel()
				return nil, err
			}
			return &limited{stream, cancel}, nil
		}
	}
}

// limited is a stream whose context ends with it.
type limited struct {
	connect.ClientStream
	cancel context.CancelFunc
}

// Close implements connect.ClientStream.
func (l *limited) Close() error {
	defer l.cancel()
	return l.ClientStream.Close()
}
