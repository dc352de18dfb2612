package rabbitrpc_test

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectinprocess"
	"example.com/shop/internal/dev/testenv"
	"example.com/shop/internal/rabbitrpc"
)

// BenchmarkCalls measures the same call in process, over HTTP/2 and over RabbitMQ, with one caller and with 64. It
// reports calls/s, p50 and p99.
//
//	go run ./cmd/stack --profile test -- go test -run - -bench Calls -benchtime 5s ./internal/rabbitrpc
func BenchmarkCalls(b *testing.B) {
	methods := register(again, echo)
	http := &testbed{name: "HTTP", t: b}
	http.serve(methods)
	http.url = http.direct
	url := testenv.AMQP(b)
	serve(b, rabbitrpc.ServerConfig{URL: url}, methods)
	for _, transport := range []struct {
		name   string
		client *connect.Client
	}{
		{"InProcess", connect.NewClient(connectinprocess.New(newRPC(methods)))},
		{"HTTP2", http.client()},
		{"RabbitMQ", newClient(b, url)},
	} {
		for _, callers := range []int{1, 64} {
			b.Run(fmt.Sprintf("%s/%d", transport.name, callers), func(b *testing.B) {
				measure(b, transport.client, callers)
			})
		}
	}
}

func measure(b *testing.B, client *connect.Client, callers int) {
	durations := make([]time.Duration, b.N)
	var next atomic.Int64
	var running sync.WaitGroup
	b.ResetTimer()
	for range callers {
		running.Go(func() {
			for i := next.Add(1) - 1; i < int64(b.N); i = next.Add(1) - 1 {
				began := time.Now()
				if _, err := call(b.Context(), client, again, "hello"); err != nil {
					b.Error(err)
					return
				}
				durations[i] = time.Since(began)
			}
		})
	}
	running.Wait()
	b.StopTimer()
	slices.Sort(durations)
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "calls/s")
	b.ReportMetric(float64(durations[len(durations)/2].Microseconds())/1000, "p50-ms")
	b.ReportMetric(float64(durations[len(durations)*99/100].Microseconds())/1000, "p99-ms")
	b.ReportMetric(0, "ns/op")
}
