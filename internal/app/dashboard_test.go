package app

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"example.com/shop/internal/dev/testenv"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A real Prometheus that scrapes a process understands each query of the dashboard, and every panel has data.
func TestDashboardIsDrawn(t *testing.T) {
	t.Parallel()
	config := watched(Config{PostgresURL: testenv.PostgresURL(t), AMQPURL: testenv.AMQP(t)})
	service := start(t, RunAll, config)
	testenv.Eventually(t, 30*time.Second, func() error { return isReady(service.ops) })
	prometheus := startPrometheus(t, service.ops)

	payload, err := proto.Marshal(wrapperspb.String("0190c0de-0000-7000-8000-000000000001"))
	if err != nil {
		t.Fatal(err)
	}
	testenv.Eventually(t, time.Minute, func() error { // a rate needs two samples that differ
		commit(t, config.PostgresURL, watchedType, payload)
		answer, err := http.Post(service.url+watchedProcedure, "application/json", strings.NewReader(`""`))
		if err != nil {
			return err
		}
		if err := answer.Body.Close(); err != nil {
			return err
		}
		var empty []string
		for _, panel := range panels(t) {
			series := 0
			for _, target := range panel.Targets {
				series += query(t, prometheus, target.Expr)
			}
			if series == 0 {
				empty = append(empty, panel.Title)
			}
		}
		if len(empty) > 0 {
			return fmt.Errorf("panels without data: %s", strings.Join(empty, "; "))
		}
		return nil
	})
}

type panel struct {
	Title, Type string
	Targets     []struct{ Expr string }
}

func panels(t *testing.T) []panel {
	t.Helper()
	text, err := os.ReadFile("../../deploy/grafana/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct{ Panels []panel }
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	found := slices.DeleteFunc(dashboard.Panels, func(p panel) bool { return p.Type == "row" })
	if len(found) < 10 {
		t.Fatalf("only %d panels found", len(found))
	}
	return found
}

// startPrometheus runs a Prometheus that scrapes the service every second, and returns its URL.
func startPrometheus(t *testing.T, service string) string {
	t.Helper()
	need(t, "prometheus")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	if err := listener.Close(); err != nil { // free the port for Prometheus
		t.Fatal(err)
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	text := fmt.Sprintf("scrape_configs: [{job_name: service, scrape_interval: 1s, "+
		"static_configs: [{targets: [%q]}]}]\n",
		strings.TrimPrefix(service, "http://"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	server := exec.Command("prometheus", "--config.file="+config,
		"--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address)
	server.Stderr = &log
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = server.Process.Kill()
		_ = server.Wait() // completes the log
		if t.Failed() {
			t.Log(log.String())
		}
	})
	testenv.Eventually(t, 30*time.Second, func() error {
		answer, err := http.Get("http://" + address + "/-/ready")
		if err != nil {
			return err
		}
		defer answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			return errors.New(answer.Status)
		}
		return nil
	})
	return "http://" + address
}

// query returns how many series a query of the dashboard returns.
func query(t *testing.T, prometheus, expr string) int {
	t.Helper()
	expr = strings.ReplaceAll(expr, "$__rate_interval", "10s")
	response, err := http.Get(prometheus + "/api/v1/query?query=" + url.QueryEscape(expr))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var result struct {
		Status, Error string
		Data          struct{ Result []json.RawMessage }
	}
	if err := json.NewDecoder(response.Body).Decode(&result); err != nil {
		t.Fatal(err)
	}
	if result.Status != "success" {
		t.Fatalf("%s: %s", expr, result.Error)
	}
	return len(result.Data.Result)
}
