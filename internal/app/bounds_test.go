package app

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"runtime"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/bounds"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

const (
	// maxRefusal bounds the size of a refusal in bytes, headers and trailers included. JSON contains each detail twice.
	maxRefusal = 16 << 10
	// maxHeaders is how many bytes of headers, or of trailers, common gRPC clients accept.
	maxHeaders = 8 << 10
	// maxAllocated bounds how many bytes the process allocates for one call, our client included.
	maxAllocated = 128 << 20
	readMaxBytes = 4 << 20
)

// Constants bound the size of every refusal and the memory that its call takes. The test does not run in parallel,
// since it measures what the process allocates.
func TestLargestWrongRequests(t *testing.T) {
	a := startAPI(t, Edge{NoAuth: true})
	client := newHTTPClient(t, true)
	tried := 0
	for spec := range a.server.Specs() {
		method, ok := spec.Schema.(protoreflect.MethodDescriptor)
		if !ok || spec.StreamType == connect.StreamTypeBidi { // reflection, which keeps its stream open
			continue
		}
		for name, r := range largest(spec, method.Input()) {
			tried++
			t.Run(spec.Procedure+"/"+name, func(t *testing.T) { measure(t, client, a.url, r) })
		}
	}
	if tried == 0 {
		t.Error("no procedure was called")
	}
}

// largest returns requests of the maximum size, most of them wrong in as many places as possible.
func largest(spec connect.Spec, input protoreflect.MessageDescriptor) map[string]request {
	encodings := streamEncodings
	if spec.StreamType == connect.StreamTypeUnary {
		encodings = unaryEncodings
	}
	requests := map[string]request{}
	for _, e := range encodings {
		if e.rpc && e.json { // covered by Connect with JSON, and by gRPC
			continue
		}
		bodies := largestBinary(input)
		if e.json {
			bodies = largestJSON(input)
		}
		for name, body := range bodies {
			if e.rpc && !strings.HasSuffix(name, "_allowed_empty") { // the others are decoded as by Connect
				continue
			}
			if e.framed {
				body = append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(body))), body...)
			}
			requests[strings.ReplaceAll(e.contentType, "/", "_")+"_"+name] = request{e, spec.Procedure, body}
		}
	}
	return requests
}

// largestBinary fills one field of a message at a time, with empty elements or with text.
func largestBinary(input protoreflect.MessageDescriptor) map[string][]byte {
	bodies := map[string][]byte{"garbage": bytes.Repeat([]byte{0xff}, readMaxBytes)}
	for i := range input.Fields().Len() {
		field := input.Fields().Get(i)
		element := protowire.AppendBytes(protowire.AppendTag(nil, field.Number(), protowire.BytesType), nil)
		name := string(field.Name())
		bodies[name+"_all_empty"] = bytes.Repeat(element, readMaxBytes/len(element))
		bodies[name+"_allowed_empty"] = bytes.Repeat(element, bounds.MaxFields)
		for label, text := range map[string]string{"text": "\x00", "invalid_text": "\xff", "wide": "ä"} {
			long := strings.Repeat(text, (readMaxBytes-16)/len(text))
			tag := protowire.AppendTag(nil, field.Number(), protowire.BytesType)
			bodies[name+"_"+label] = protowire.AppendBytes(tag, []byte(long))
		}
	}
	return bodies
}

// largestJSON does the same in JSON, where names can be wrong, too.
func largestJSON(input protoreflect.MessageDescriptor) map[string][]byte {
	long := strings.Repeat("ä", (readMaxBytes-100)/2)
	bodies := map[string][]byte{
		"garbage": []byte(long), "name": []byte(`{"` + long + `":1}`), "deep": bytes.Repeat([]byte("["), readMaxBytes),
		"token": []byte(`{"a":` + strings.Repeat("1", readMaxBytes-10) + `x}`),
	}
	for i := range input.Fields().Len() {
		name := input.Fields().Get(i).JSONName()
		list := func(n int) []byte { return []byte(`{"` + name + `":[{}` + strings.Repeat(",{}", n-1) + `]}`) }
		bodies[name+"_all_empty"] = list((readMaxBytes - 100) / 3)
		bodies[name+"_allowed_empty"] = list(bounds.MaxFields/2 - 1)
		bodies[name+"_text"] = []byte(`{"` + name + `":"` + long + `"}`)
		bodies[name+"_texts"] = []byte(`{"` + name + `":["` + long + `"]}`)
		bodies[name+"_object"] = []byte(`{"` + name + `":{"` + long + `":"x"}}`)
	}
	return bodies
}

// measure sends a request, and fails if the response is too large or takes too much memory.
func measure(t *testing.T, client *http.Client, address string, r request) {
	t.Helper()
	least := uint64(math.MaxUint64)
	// Take the minimum: other work of the process, and pools that the garbage collector has emptied, only add to it.
	for try := 0; try < 3 && least > maxAllocated; try++ {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		res, body := exchange(t, client, r, http.MethodPost, address+r.procedure, nil)
		runtime.ReadMemStats(&after)
		checkSize(t, res, body)
		least = min(least, after.TotalAlloc-before.TotalAlloc)
	}
	if least > maxAllocated {
		t.Errorf("a request of %d bytes made the process allocate %d MiB", len(r.body), least>>20)
	}
}

// exchange sends a request and returns its response.
func exchange(
	t *testing.T, client *http.Client, r request, method, address string, header http.Header,
) (*http.Response, []byte) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, address, bytes.NewReader(r.body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", r.contentType)
	if r.rpc {
		req.Header.Set("Te", "trailers")
		req.Header.Set("Grpc-Timeout", "2S")
	} else {
		req.Header.Set("Connect-Timeout-Ms", "2000")
	}
	for name, values := range header {
		req.Header[name] = values
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, body
}

func checkSize(t *testing.T, res *http.Response, body []byte) {
	t.Helper()
	if text := tooLarge(res, body); text != "" {
		t.Error(text)
	}
}

// tooLarge returns which part of a response is too large, or "". Only refusals have a limit for their body.
func tooLarge(res *http.Response, body []byte) string {
	headers, trailers := sizeOf(res.Header), sizeOf(res.Trailer)
	if headers > maxHeaders || trailers > maxHeaders {
		return fmt.Sprintf("response has %d bytes of headers and %d of trailers", headers, trailers)
	}
	refused := res.StatusCode != http.StatusOK || len(body) == 0
	if all := headers + trailers + len(body); refused && all > maxRefusal {
		return fmt.Sprintf("response %s has %d bytes: %.300q", res.Status, all, body)
	}
	return ""
}

// sizeOf returns a header's size as HTTP/2 counts it.
func sizeOf(header http.Header) (n int) {
	for name, values := range header {
		for _, value := range values {
			n += len(name) + len(value) + 32
		}
	}
	return n
}

// Refusals of Connect itself are bounded, too, although they quote headers and parameters.
func TestRefusalsOfTheProtocolAreBounded(t *testing.T) {
	t.Parallel()
	a := startAPI(t, Edge{NoAuth: true})
	client := newHTTPClient(t, true)
	long := strings.Repeat("%", 50_000)
	for _, e := range slices.Concat(unaryEncodings, streamEncodings) {
		for _, name := range []string{
			"Connect-Accept-Encoding", "Connect-Content-Encoding", "Connect-Protocol-Version", "Connect-Timeout-Ms",
			"Content-Encoding", "Accept-Encoding", "Grpc-Encoding", "Grpc-Accept-Encoding", "Grpc-Timeout",
			"X-Request-Id", "X-Api-Key", "Authorization", "Idempotency-Key", "Prefer", "Traceparent", "Origin",
			"User-Agent",
		} {
			t.Run(fmt.Sprintf("%s/%s", strings.ReplaceAll(e.contentType, "/", "_"), name), func(t *testing.T) {
				r, header := request{encoding: e, body: []byte("{}")}, http.Header{name: {long}}
				res, body := exchange(t, client, r, http.MethodPost, a.url+"/grpc.health.v1.Health/Check", header)
				checkSize(t, res, body)
			})
		}
	}
	for _, path := range []string{"/", "/grpc.health.v1.Health/", "/grpc.health.v1.Health/Check?x="} {
		r := request{encoding: unaryEncodings[0], body: []byte("{}")}
		res, body := exchange(t, client, r, http.MethodPost, a.url+path+strings.Repeat("a", 50_000), nil)
		checkSize(t, res, body)
	}
	for _, name := range []string{"base64", "compression", "connect", "encoding", "message"} {
		query := url.Values{"connect": {"v1"}, "encoding": {"json"}, "message": {"{}"}}
		query.Set(name, strings.Repeat("ä", 5_000))
		target := a.url + "/orders.v1.OrderService/GetOrder?" + query.Encode()
		res, body := exchange(t, client, request{}, http.MethodGet, target, nil)
		if checkSize(t, res, body); res.StatusCode == http.StatusOK {
			t.Errorf("parameter %s: %s", name, res.Status)
		}
	}
}

// A few bytes of gzip can expand to the same wrong requests.
func TestCompressedWrongRequests(t *testing.T) {
	a := startAPI(t, Edge{NoAuth: true})
	client := newHTTPClient(t, true)
	for spec := range a.server.Specs() {
		method, ok := spec.Schema.(protoreflect.MethodDescriptor)
		if !ok || spec.StreamType != connect.StreamTypeUnary {
			continue
		}
		for name, body := range largestBinary(method.Input()) {
			if !strings.HasSuffix(name, "_empty") {
				continue
			}
			t.Run(spec.Procedure+"/"+name, func(t *testing.T) {
				var packed bytes.Buffer
				zip := gzip.NewWriter(&packed)
				_, _ = zip.Write(body) // to memory
				_ = zip.Close()
				r := request{encoding: unaryEncodings[1], body: packed.Bytes()}
				header := http.Header{"Content-Encoding": {"gzip"}}
				res, answer := exchange(t, client, r, http.MethodPost, a.url+spec.Procedure, header)
				checkSize(t, res, answer)
			})
		}
	}
}
