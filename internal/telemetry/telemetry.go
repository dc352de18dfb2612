// Package telemetry sets up what the processes tell about themselves: logs, metrics for Prometheus, and traces over OTLP.
//
// It guarantees that what is not asked for costs nothing: metrics are read when they are scraped, and without an exporter there is no span.
// Traces are best effort. A collector that is away costs spans and nothing else, and an end waits for it a few seconds at most.
package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	promexporter "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// Config names the process.
type Config struct {
	// Service, Process and Version become service.namespace, service.name ("shop-relay") and service.version, unless OTEL_SERVICE_NAME
	// or OTEL_RESOURCE_ATTRIBUTES say otherwise.
	Service, Process, Version string
	// Exporter takes the spans in place of the collector that OTEL_EXPORTER_OTLP_ENDPOINT names: for tests.
	Exporter sdktrace.SpanExporter
}

// Providers are what the parts of a process write to.
type Providers struct {
	Meter metric.MeterProvider
	// Tracer is nil if nobody wants spans. Traces that pass through stay whole all the same.
	Tracer trace.TracerProvider
	// Metrics answers Prometheus' scrapes.
	Metrics http.Handler

	stop []func(context.Context) error
}

// Start makes the providers of one process. It connects nowhere. The standard OTEL_* variables of sampler, limits, batches and exporter
// apply; spans are made only if OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set.
func Start(ctx context.Context, config Config) (*Providers, error) {
	described, err := describe(ctx, config)
	if err != nil {
		return nil, err
	}
	p := &Providers{}
	if err := p.startMetrics(described); err != nil {
		return nil, err
	}
	exporter := config.Exporter
	if exporter == nil && tracesWanted() {
		if exporter, err = newExporter(ctx); err != nil {
			return nil, err
		}
	}
	if exporter != nil {
		provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(described))
		p.Tracer, p.stop = provider, append(p.stop, provider.Shutdown)
	}
	return p, nil
}

// HandleErrors lets OpenTelemetry report to log what it cannot return to anyone. That is global in its library; a process calls this once.
func HandleErrors(log *slog.Logger) {
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("telemetry", "error", err) }))
	otel.SetLogger(logr.FromSlogHandler(bare{log.Handler()}))
}

// stopTimeout bounds the export of the last spans: a collector that is away must not hold up a shutdown.
const stopTimeout = 3 * time.Second

// Stop exports what is left, within a few seconds, also if ctx is done.
func (p *Providers) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	var errs []error
	for _, stop := range p.stop {
		errs = append(errs, stop(ctx))
	}
	return errors.Join(errs...)
}

// describe is the resource that metrics and spans are said to come from. Later sources win.
func describe(ctx context.Context, config Config) (*resource.Resource, error) {
	described, err := resource.New(ctx,
		resource.WithTelemetrySDK(), resource.WithHost(),
		resource.WithAttributes(
			attribute.String("service.namespace", config.Service),
			attribute.String("service.name", config.Service+"-"+config.Process),
			attribute.String("service.version", config.Version),
			attribute.String("service.instance.id", uuid.NewString())),
		resource.WithFromEnv())
	if err != nil {
		return nil, fmt.Errorf("describe process: %w", err)
	}
	return described, nil
}

func (p *Providers) startMetrics(described *resource.Resource) error {
	registry := prometheus.NewRegistry() // not the library's global one, where anybody may register anything
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	reader, err := promexporter.New(promexporter.WithRegisterer(registry), promexporter.WithoutScopeInfo())
	if err != nil {
		return fmt.Errorf("export metrics: %w", err)
	}
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader), sdkmetric.WithResource(described))
	p.Meter, p.stop = provider, append(p.stop, provider.Shutdown)
	p.Metrics = promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: 4, // a scraper that is mad, or two of them, must not keep the process busy
		Timeout:             10 * time.Second,
	})
	return nil
}

const (
	endpoint       = "OTEL_EXPORTER_OTLP_ENDPOINT"
	tracesEndpoint = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
)

// tracesWanted looks at the variables of the standard that Go's SDK leaves to its user.
func tracesWanted() bool {
	if strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") || os.Getenv("OTEL_TRACES_EXPORTER") == "none" {
		return false
	}
	return os.Getenv(endpoint) != "" || os.Getenv(tracesEndpoint) != ""
}

func newExporter(ctx context.Context) (sdktrace.SpanExporter, error) {
	for _, name := range []string{endpoint, tracesEndpoint} { // the library would go on with its default, and log the value
		if u, err := url.Parse(os.Getenv(name)); err != nil || os.Getenv(name) != "" && (u.Scheme != "http" && u.Scheme != "https" || u.Host == "") {
			return nil, fmt.Errorf("%s is not a URL, such as http://collector:4318", name)
		}
	}
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, fmt.Errorf("export traces: %w", err)
	}
	return exporter, nil
}
