package app

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

// allowed are the codes that bad input may cause: those that blame the caller or the call's deadline.
var allowed = []connect.Code{
	0, connect.CodeInvalidArgument, connect.CodeNotFound, connect.CodeAlreadyExists, connect.CodeFailedPrecondition,
	connect.CodeOutOfRange, connect.CodeResourceExhausted, connect.CodeUnimplemented, connect.CodeDeadlineExceeded,
	connect.CodeCanceled, connect.CodeAborted,
}

// Any input to any procedure, as JSON or binary, gives OK or an error that blames the caller, and a refused call
// leaves no row. FUZZTIME is the duration for each procedure. All procedures run at the same time: each one that may
// write has its own database, so that a new row belongs to it, and the others share a database that contains rows.
func TestBadInput(t *testing.T) {
	t.Parallel()
	duration, err := time.ParseDuration(cmp.Or(os.Getenv("FUZZTIME"), "3s"))
	if err != nil {
		t.Fatal(err)
	}
	shared := startAPI(t, Edge{NoAuth: true})
	var all, readers []connect.Spec
	for spec := range shared.server.Specs() {
		all = append(all, spec)
		if !writes(spec) {
			readers = append(readers, spec)
		}
	}
	var fuzzers []*fuzz
	for _, spec := range all {
		if writes(spec) {
			newFuzz(t, shared, spec, all).run(duration / 20)
			fuzzers = append(fuzzers, newFuzz(t, startAPI(t, Edge{NoAuth: true}), spec, all))
		}
	}
	for _, spec := range readers {
		fuzzers = append(fuzzers, newFuzz(t, shared, spec, readers))
	}
	var running sync.WaitGroup
	for _, f := range fuzzers {
		running.Go(func() {
			f.run(duration)
			f.report()
		})
	}
	running.Wait()
}

// writes tells whether a procedure may write. Health and reflection do not, although their proto files do not declare
// it.
func writes(spec connect.Spec) bool {
	return spec.IdempotencyLevel != connect.IdempotencyNoSideEffects && !strings.HasPrefix(spec.Procedure, "/grpc.")
}

// fuzz calls one procedure with bad input, and at times others, so that the database contains rows.
type fuzz struct {
	t       *testing.T
	api     *api
	client  *http.Client
	target  connect.Spec
	others  []connect.Spec
	seed    uint64
	random  *rand.Rand
	counter *pgxpool.Pool
	rowsSQL string
	codes   map[connect.Code]int // of the target
}

func newFuzz(t *testing.T, a *api, target connect.Spec, others []connect.Spec) *fuzz {
	t.Helper()
	f := &fuzz{
		t: t, api: a, client: newHTTPClient(t, true), target: target, others: others, seed: rand.Uint64(),
		codes: map[connect.Code]int{},
	}
	f.random = rand.New(rand.NewPCG(f.seed, 0))
	config := a.db.Config()
	config.MaxConns, config.ConnConfig.RuntimeParams["plan_cache_mode"] = 1, "force_generic_plan"
	var err error
	if f.counter, err = pgxpool.NewWithConfig(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.counter.Close)
	const tablesSQL = `
		SELECT 'SELECT ' || string_agg(format('(SELECT count(*) FROM %s)', oid::regclass), ' + ') FROM pg_class
		WHERE relkind IN ('r', 'p') AND NOT relispartition AND relnamespace = 'public'::regnamespace`
	if err := a.db.QueryRow(t.Context(), tablesSQL).Scan(&f.rowsSQL); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f *fuzz) run(duration time.Duration) {
	ctx := f.t.Context()
	rows, err := f.rows(ctx)
	if err != nil {
		f.t.Error(err)
		return
	}
	// A busy machine may not get to the target within the duration.
	for n, end := 0, time.Now().Add(duration); len(f.codes) == 0 || time.Now().Before(end); n++ {
		spec := f.target
		if f.random.IntN(5) == 0 {
			spec = f.others[f.random.IntN(len(f.others))]
		}
		request := f.request(spec)
		code, text, err := request.send(ctx, f.client, f.api.url)
		if err != nil {
			f.t.Errorf("%s: %v\n%s", spec.Procedure, err, request)
			return
		}
		if spec.Procedure == f.target.Procedure {
			f.codes[code]++
		}
		now, err := f.rows(ctx)
		if err != nil {
			f.t.Error(err)
			return
		}
		if !slices.Contains(allowed, code) {
			f.t.Errorf("%s: code is %s: %s\nseed %d, request %d: %s", spec.Procedure, code, text, f.seed, n, request)
			return
		}
		if mayWrite := code == 0 && writes(spec); now != rows && !mayWrite {
			f.t.Errorf("%s: code is %s, but there are %d more rows\nseed %d, request %d: %s",
				spec.Procedure, code, now-rows, f.seed, n, request)
			return
		}
		rows = now
	}
}

func (f *fuzz) report() {
	var counts []string
	total := 0
	for _, code := range slices.Sorted(maps.Keys(f.codes)) {
		name := code.String()
		if code == 0 {
			name = "ok"
		}
		counts, total = append(counts, fmt.Sprint(f.codes[code], " ", name)), total+f.codes[code]
	}
	f.t.Logf("%-60s %6d calls: %s", f.target.Procedure, total, strings.Join(counts, ", "))
	if total == 0 {
		f.t.Errorf("%s was never called", f.target.Procedure)
	}
}

// rows counts all rows of the database. Planning for hundreds of partitions takes far longer than counting, hence the
// generic plans.
func (f *fuzz) rows(ctx context.Context) (n int, err error) {
	return n, f.counter.QueryRow(ctx, f.rowsSQL).Scan(&n)
}

// encoding is an encoding of messages in a protocol.
type encoding struct {
	contentType       string
	json, framed, rpc bool // rpc is gRPC
}

var (
	unaryEncodings = []encoding{
		{"application/json", true, false, false}, {"application/proto", false, false, false},
		{"application/grpc+json", true, true, true}, {"application/grpc", false, true, true},
	}
	streamEncodings = []encoding{
		{"application/connect+json", true, true, false}, {"application/connect+proto", false, true, false},
		{"application/grpc+json", true, true, true}, {"application/grpc", false, true, true},
	}
)

// request is one call, ready to be sent.
type request struct {
	encoding
	procedure string
	body      []byte
}

func (r request) String() string { return fmt.Sprintf("%s %s %q", r.procedure, r.contentType, r.body) }

func (f *fuzz) request(spec connect.Spec) request {
	encodings := streamEncodings
	if spec.StreamType == connect.StreamTypeUnary {
		encodings = unaryEncodings
	}
	r := request{procedure: spec.Procedure, encoding: encodings[f.random.IntN(len(encodings))]}
	r.body = f.message(spec, r.json)
	if r.framed {
		frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(r.body)))
		if f.random.IntN(20) == 0 {
			frame[f.random.IntN(len(frame))] = byte(f.random.Uint32())
		}
		r.body = append(frame, r.body...)
	}
	return r
}

// message makes the bytes of a message: at times valid, mostly almost valid, rarely random.
func (f *fuzz) message(spec connect.Spec, asJSON bool) []byte {
	method, ok := spec.Schema.(protoreflect.MethodDescriptor)
	if !ok || f.random.IntN(20) == 0 {
		return f.bytes(200)
	}
	if asJSON && f.random.IntN(20) == 0 {
		return []byte(oddJSON[f.random.IntN(len(oddJSON))])
	}
	message := dynamicpb.NewMessage(method.Input())
	f.fill(message, 3)
	var body []byte
	if asJSON {
		body, _ = protojson.Marshal(message) // fails for invalid UTF-8, which gives an empty body
	} else {
		body, _ = proto.Marshal(message)
	}
	for range f.random.IntN(4) * f.random.IntN(2) {
		body = f.mutate(body)
	}
	return body
}

var oddJSON = []string{
	"", "null", "[]", `""`, "0", "{", "{}}", `{"":{}}`, `{"a":1,"a":2}`,
	`{"@type":"type.googleapis.com/google.protobuf.Any"}`, "\xef\xbb\xbf{}", `{"a":"\ud800"}`,
	strings.Repeat(`{"a":`, 20_000), strings.Repeat("[", 100_000), `{"a":1e999999999}`, `{"orderId":"\u0000"}`, "{} {}",
	`{"lines":[null]}`, `{"pageSize":1e9}`, `{"pageSize":"1"}`, `{"pageSize":1.5}`, `{"status":99}`,
	`{"status":"NONE"}`,
	"// {}", "{'a':1}",
}

// fill sets fields to values that are mostly valid and at times just outside of the limits.
func (f *fuzz) fill(message protoreflect.Message, depth int) {
	fields := message.Descriptor().Fields()
	for i := range fields.Len() {
		field := fields.Get(i)
		switch {
		case f.random.IntN(8) == 0 || field.Message() != nil && depth == 0:
		case field.IsList():
			list := message.Mutable(field).List()
			for range f.random.IntN(4) * (1 + f.random.IntN(2)*f.random.IntN(60)) {
				list.Append(f.value(field, list.NewElement, depth))
			}
		case field.IsMap():
		default:
			message.Set(field, f.value(field, func() protoreflect.Value { return message.NewField(field) }, depth))
		}
	}
}

var oddNumbers = []int64{0, -1, math.MaxInt32, math.MinInt32, math.MaxInt64, math.MinInt64, 1 << 20, 1e6, 1e9}

func (f *fuzz) value(
	field protoreflect.FieldDescriptor, empty func() protoreflect.Value, depth int,
) protoreflect.Value {
	odd := func(n int) bool { return f.random.IntN(n) == 0 }
	number := int64(1 + f.random.IntN(9))
	if odd(6) {
		number = oddNumbers[f.random.IntN(len(oddNumbers))]
	}
	switch field.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(f.text())
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes(f.bytes(50))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(odd(2))
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(number % 7))
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(int32(number))
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(number)
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(uint32(number))
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(uint64(number))
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(float32(math.Float64frombits(f.random.Uint64())))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(math.Float64frombits(f.random.Uint64()))
	}
	value := empty()
	f.fill(value.Message(), depth-1)
	return value
}

// text returns a string that fields accept, or one that often breaks programs.
func (f *fuzz) text() string {
	switch f.random.IntN(8) {
	case 0, 1, 2:
		// Few values, so that calls share them.
		return fmt.Sprintf("0190c0de-0000-7000-8000-00000000000%d", f.random.IntN(4))
	case 3, 4, 5:
		return []string{"apple", "pear", "plum", "fig"}[f.random.IntN(4)]
	case 6:
		return oddText[f.random.IntN(len(oddText))]
	}
	return strings.ToValidUTF8(string(f.bytes(30)), "")
}

var oddText = []string{
	"", " ", "\x00", "a\x00b", "'; DROP TABLE orders; --", "%s%n", "\\", "\u202e", "\U0001f600", "\ufffd", "e\u0301",
	strings.Repeat("a", 65), strings.Repeat("x", 100_000),
	"0190C0DE-0000-7000-8000-000000000001", "{0190c0de-0000-7000-8000-000000000001}",
	"urn:uuid:0190c0de-0000-7000-8000-000000000001", "0190c0de000070008000000000000001",
	"00000000-0000-0000-0000-000000000000", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
	"__________8AAAAAAAAAAAAAAAAAAAAA", "AAYk2j5cQAABkMDeAABwAIAAAAAAAAAB", "NaN", "-0", "1e999",
}

func (f *fuzz) bytes(most int) []byte {
	b := make([]byte, f.random.IntN(most))
	for i := range b {
		b[i] = byte(f.random.Uint32())
	}
	return b
}

// mutate flips a bit, truncates, repeats or inserts bytes.
func (f *fuzz) mutate(b []byte) []byte {
	if len(b) == 0 {
		return f.bytes(10)
	}
	at := f.random.IntN(len(b))
	switch f.random.IntN(4) {
	case 0:
		b = bytes.Clone(b)
		b[at] ^= 1 << f.random.IntN(8)
		return b
	case 1:
		return b[:at]
	case 2:
		return slices.Concat(b[:at], b[at/2:])
	}
	return slices.Concat(b[:at], f.bytes(8), b[at:])
}

// send makes the call and returns its code and message. An error is a failure of the connection, as after a panic, or a
// malformed or too large response.
func (r request) send(ctx context.Context, client *http.Client, url string) (connect.Code, string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url+r.procedure, bytes.NewReader(r.body))
	if err != nil {
		return 0, "", err
	}
	req.Header.Set("Content-Type", r.contentType)
	if r.rpc {
		req.Header.Set("Te", "trailers")
	}
	if strings.HasPrefix(r.contentType, "application/connect+") {
		req.Header.Set("Connect-Timeout-Ms", "50") // streams may not end
	} else if r.rpc {
		req.Header.Set("Grpc-Timeout", "10S")
	}
	if r.rpc && strings.Contains(r.procedure, "/Watch") {
		req.Header.Set("Grpc-Timeout", "50m")
	}
	res, err := client.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return 0, "", err
	}
	if text := tooLarge(res, body); text != "" {
		return 0, "", errors.New(text)
	}
	switch {
	case r.rpc:
		status := cmp.Or(res.Trailer.Get("Grpc-Status"), res.Header.Get("Grpc-Status"))
		code, err := strconv.Atoi(status)
		if err != nil {
			return 0, "", fmt.Errorf("gRPC status is %q, HTTP status is %s", status, res.Status)
		}
		return connect.Code(code), cmp.Or(res.Trailer.Get("Grpc-Message"), res.Header.Get("Grpc-Message")), nil
	case r.framed:
		return endOfStream(body)
	case res.StatusCode == http.StatusOK:
		return 0, "", nil
	}
	return parseError(body)
}

// endOfStream returns the error in the last frame of a Connect stream.
func endOfStream(body []byte) (connect.Code, string, error) {
	for len(body) >= 5 {
		size := int(binary.BigEndian.Uint32(body[1:5]))
		if len(body) < 5+size {
			break
		}
		if body[0]&2 != 0 {
			var end struct{ Error json.RawMessage }
			if err := json.Unmarshal(body[5:5+size], &end); err != nil {
				return 0, "", err
			}
			if end.Error == nil {
				return 0, "", nil
			}
			return parseError(end.Error)
		}
		body = body[5+size:]
	}
	return 0, "", fmt.Errorf("stream has no end: %q", body)
}

func parseError(body []byte) (connect.Code, string, error) {
	var failed struct {
		Code    connect.Code
		Message string
	}
	if err := json.Unmarshal(body, &failed); err != nil {
		return 0, "", fmt.Errorf("response is not an error: %q", body)
	}
	return failed.Code, failed.Message, nil
}
