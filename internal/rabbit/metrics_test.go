package rabbit

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/messaging"
	sdk "go.opentelemetry.io/otel/sdk/metric"
)

// Every metric changes when its event begins, and changes back when it ends.
func TestMetrics(t *testing.T) {
	t.Parallel()
	newReader := func() (*sdk.ManualReader, *sdk.MeterProvider) {
		reader := sdk.NewManualReader()
		return reader, sdk.NewMeterProvider(sdk.WithReader(reader))
	}
	await := func(t *testing.T, reader *sdk.ManualReader, name string, want float64) {
		t.Helper()
		testenv.Eventually(t, patience, func() error {
			if value, exists := testenv.Metrics(t, reader)[name]; !exists || value != want {
				return fmt.Errorf("%s is %v (exists: %t), want %v", name, value, exists, want)
			}
			return nil
		})
	}

	t.Run("Publisher", func(t *testing.T) {
		t.Parallel()
		alarm, through := newAlarm(t, testenv.AMQP(t))
		reader, provider := newReader()
		p := newPublisher(t, PublisherConfig{URL: through, MeterProvider: provider})
		await(t, reader, "rabbit.connects{publisherok}", 0)
		await(t, reader, "rabbit.publishers.blocked{publisher}", 0)
		mustPublish(t, p)
		await(t, reader, "rabbit.connects{publisherok}", 1)
		for _, end := range []func(lower func()){func(lower func()) { lower() }, func(func()) { _ = p.Close() }} {
			mustPublish(t, p)
			lower := alarm.raise()
			ctx, cancel := context.WithCancel(t.Context())
			receipt, waited := publish(t, p, texts(0, 1)...), make(chan struct{})
			go func() {
				defer close(waited)
				receipt.Wait(ctx)
			}()
			await(t, reader, "rabbit.publishers.blocked{publisher}", 1)
			cancel()
			<-waited
			end(lower)
			if p.link != nil {
				wait(t, receipt)
			}
			await(t, reader, "rabbit.publishers.blocked{publisher}", 0)
			lower()
		}
		lost := newPublisher(t, PublisherConfig{URL: "amqp://127.0.0.1:1", MeterProvider: provider})
		if _, err := lost.Publish(t.Context(), nil); err == nil {
			t.Error("connected without a broker")
		}
		await(t, reader, "rabbit.connects{publisherfailed}", 1)
	})

	t.Run("Consumer", func(t *testing.T) {
		t.Parallel()
		url, p := setUp(t)
		proxy, through := testenv.ProxyURL(t, url)
		reader, provider := newReader()
		var failing atomic.Bool
		failing.Store(true)
		config := ConsumerConfig{URL: through, MeterProvider: provider}
		consume(t, config, func(context.Context, []messaging.Delivery) error {
			if failing.Load() {
				return errHandler
			}
			return nil
		})
		await(t, reader, "rabbit.consumers{probes}", 1)
		await(t, reader, "rabbit.batches.paused{probes}", 0)
		mustPublish(t, p, texts(0, 1)...)
		await(t, reader, "rabbit.batches.paused{probes}", 1)
		failing.Store(false)
		await(t, reader, "rabbit.batches.paused{probes}", 0)
		proxy.Refuse(true)
		proxy.Cut()
		await(t, reader, "rabbit.consumers{probes}", 0)
		testenv.Eventually(t, patience, func() error {
			if testenv.Metrics(t, reader)["rabbit.connects{probesfailed}"] == 0 {
				return errors.New("no attempt has failed")
			}
			return nil
		})
		proxy.Refuse(false)
		await(t, reader, "rabbit.consumers{probes}", 1)
		await(t, reader, "rabbit.connects{probesok}", 2)
	})
}
