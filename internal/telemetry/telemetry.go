// Package telemetry sets up the logs of processes, their metrics for Prometheus, and their traces over OTLP.
//
// It guarantees that unused telemetry costs nothing: metrics are read when they are scraped, and without an exporter
// there are no spans. Traces are best effort. If the collector is away, only spans are lost, and a shutdown waits for
// it for a few seconds at most.
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
	// Service, Process and Version become service.namespace, service.name ("shop-relay") and service.version.
	// OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override them.
	Service, Process, Version string
	// Exporter gets the spans instead of the collector at OTEL_EXPORTER_OTLP_ENDPOINT. For tests.
	Exporter sdktrace.SpanExporter
}

// Providers are the telemetry providers of a process.
type Providers struct {
	Meter metric.MeterProvider
	// Tracer is nil if no collector is configured. The process still passes on the traces of others.
	Tracer trace.TracerProvider
	// Metrics serves Prometheus' scrapes.
	Metrics http.Handler

	stop []func(context.Context) error
}

// Start makes the providers of one process. It opens no connection. The standard OTEL_* variables for sampler,
// limits, batches and exporter apply. Spans are made only if OTEL_EXPORTER_OTLP_ENDPOINT or
// OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set.
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

// HandleErrors makes OpenTelemetry log the errors that it cannot return. The library keeps this handler globally, so a
// process calls HandleErrors once.
func HandleErrors(log *slog.Logger) {
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { log.Warn("telemetry", "error", err) }))
	otel.SetLogger(logr.FromSlogHandler(bare{log.Handler()}))
}

// stopTimeout bounds the export of the last spans: a collector that is away must not delay a shutdown.
const stopTimeout = 3 * time.Second

// Stop exports the remaining spans within a few seconds, even if ctx is done.
func (p *Providers) Stop(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	var errs []error
	for _, stop := range p.stop {
		errs = append(errs, stop(ctx))
	}
	return errors.Join(errs...)
}

// describe returns the resource that metrics and spans are attributed to. Later sources win.
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
	registry := prometheus.NewRegistry() // not the global registry, where any package may register anything
	registry.MustRegister(collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	reader, err := promexporter.New(promexporter.WithRegisterer(registry), promexporter.WithoutScopeInfo())
	if err != nil {
		return fmt.Errorf("export metrics: %w", err)
	}
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader), sdkmetric.WithResource(described))
	p.Meter, p.stop = provider, append(p.stop, provider.Shutdown)
	p.Metrics = promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: 4, // misbehaving scrapers must not keep the process busy
		Timeout:             10 * time.Second,
	})
	return nil
}

const (
	endpoint       = "OTEL_EXPORTER_OTLP_ENDPOINT"
	tracesEndpoint = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
)

// tracesWanted reads the standard variables that Go's SDK does not interpret.
func tracesWanted() bool {
	if strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") || os.Getenv("OTEL_TRACES_EXPORTER") == "none" {
		return false
	}
	return os.Getenv(endpoint) != "" || os.Getenv(tracesEndpoint) != ""
}

func newExporter(ctx context.Context) (sdktrace.SpanExporter, error) {
	// For an invalid URL, the library would use its default and log the value.
	for _, name := range []string{endpoint, tracesEndpoint} {
		value := os.Getenv(name)
		u, err := url.Parse(value)
		if err != nil || value != "" && (u.Scheme != "http" && u.Scheme != "https" || u.Host == "") {
			return nil, fmt.Errorf("%s is not an HTTP URL, such as http://collector:4318", name)
		}
	}
	exporter, err := otlptracehttp.New(ctx)
	if err != nil {
		return nil, fmt.Errorf("export traces: %w", err)
	}
	return exporter, nil
}
