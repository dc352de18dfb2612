package clients

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	ordersv1 "example.com/shop/internal/gen/orders/v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

func (c call) json(t *testing.T) string {
	t.Helper()
	text, err := protojson.Marshal(c.request)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// run runs a command at the top of the repository and returns its output. It ignores the exit status.
func (c call) run(t *testing.T, stdin string, name string, args ...string) (stdout, stderr string) {
	t.Helper()
	command := exec.CommandContext(t.Context(), name, args...)
	command.Dir, command.Stdin = root, strings.NewReader(stdin)
	var printed, problems bytes.Buffer
	command.Stdout, command.Stderr = &output{&printed, c.heard}, &problems
	var exit *exec.ExitError
	if err := command.Run(); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return printed.String(), problems.String()
}

// output calls heard when something is printed for the first time.
type output struct {
	to    io.Writer // not embedded: io.Copy would find its ReadFrom
	heard func()
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.to.Write(p)
	if o.heard != nil {
		o.heard()
		o.heard = nil
	}
	return n, err
}

// answer is a response or an error in Connect's JSON.
type answer struct {
	Order struct {
		Status string
	}
	failure
	Error failure // in the last message of a stream
}

type failure struct {
	Code    string
	Message string
	Details []struct{ Type, Value string }
}

// read records an answer.
func (o *outcome) read(t *testing.T, text []byte) {
	t.Helper()
	var a answer
	if err := json.Unmarshal(text, &a); err != nil {
		t.Fatalf("%v in %.1000s", err, text)
	}
	if a.Order.Status != "" {
		o.record(a.Order.Status)
	}
	for _, failure := range []failure{a.failure, a.Error} {
		if failure.Code != "" {
			o.Code = failure.Code
		}
		for _, detail := range failure.Details {
			raw, err := base64.RawStdEncoding.DecodeString(strings.TrimRight(detail.Value, "="))
			var violations validate.Violations
			if err == nil {
				err = proto.Unmarshal(raw, &violations)
			}
			if err != nil {
				t.Fatalf("detail %s: %v", detail.Type, err)
			}
			o.violate(&violations)
		}
	}
}

func headerArgs(flag string) (args []string) {
	for name, value := range headers {
		args = append(args, flag, name+": "+value)
	}
	return args
}

func callCurl(t *testing.T, addr string, c call) outcome {
	args := append(headerArgs("-H"), "-sN", "--data-binary", "@-", "http://"+addr+c.procedure())
	if c.timeout > 0 {
		args = append(args, "-H", fmt.Sprint("Connect-Timeout-Ms: ", c.timeout.Milliseconds()))
	}
	o := outcome{Code: "ok"}
	if !c.stream {
		stdout, stderr := c.run(t, c.json(t), "curl", append(args, "-H", "Content-Type: application/json")...)
		if stdout == "" {
			t.Fatalf("no answer: %s", stderr)
		}
		o.read(t, []byte(stdout))
		return o
	}
	// Each message of a stream is framed: one byte of flags, four bytes of length, then the JSON.
	request := c.json(t)
	frame := binary.BigEndian.AppendUint32([]byte{0}, uint32(len(request)))
	stdout, _ := c.run(t, string(frame)+request, "curl",
		append(args, "-H", "Content-Type: application/connect+json")...)
	for rest := []byte(stdout); len(rest) > 0; {
		if len(rest) < 5 || len(rest)-5 < int(binary.BigEndian.Uint32(rest[1:])) {
			t.Fatalf("half a message: %q", rest)
		}
		end := 5 + binary.BigEndian.Uint32(rest[1:])
		o.read(t, rest[5:end])
		rest = rest[end:]
	}
	return o
}

// callBuf calls with `buf curl`, which first asks the service for its schema. A timeout would include that request, so
// a call with a timeout gets the schema from a file.
func callBuf(protocol string) func(t *testing.T, addr string, c call) outcome {
	return func(t *testing.T, addr string, c call) outcome {
		args := append([]string{"curl", "--protocol", protocol, "--http2-prior-knowledge", "-d", "@-"},
			headerArgs("-H")...)
		if c.timeout > 0 {
			args = append(args, "--timeout", c.timeout.String(), "--schema", schema(t))
		} else {
			args = append(args, "--reflect-header", "*")
		}
		stdout, stderr := c.run(t, c.json(t), "tools/node_modules/.bin/buf",
			append(args, "http://"+addr+c.procedure())...)
		o := outcome{Code: "ok"}
		for _, text := range []string{stdout, stderr} {
			decoder := json.NewDecoder(strings.NewReader(text))
			for {
				var message json.RawMessage
				if err := decoder.Decode(&message); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatalf("%v in %s", err, text)
				}
				o.read(t, message)
			}
		}
		return o
	}
}

// schema writes the service's descriptors to a file, as reflection would return them, and returns the file's name.
func schema(t *testing.T) string {
	t.Helper()
	var set descriptorpb.FileDescriptorSet
	added := map[string]bool{}
	var add func(file protoreflect.FileDescriptor)
	add = func(file protoreflect.FileDescriptor) {
		if added[file.Path()] {
			return
		}
		added[file.Path()] = true
		for i := range file.Imports().Len() {
			add(file.Imports().Get(i).FileDescriptor)
		}
		set.File = append(set.File, protodesc.ToFileDescriptorProto(file))
	}
	add(ordersv1.File_orders_v1_orders_proto)
	content, err := proto.Marshal(&set)
	if err != nil {
		t.Fatal(err)
	}
	// Not in t.TempDir, whose name may contain a comma: buf takes that as the end of the path.
	file, err := os.CreateTemp("", "schema-*.binpb")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(file.Name()) })
	if _, err := file.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	return file.Name()
}

// callNode calls through the TypeScript client.
func callNode(protocol string) func(t *testing.T, addr string, c call) outcome {
	return func(t *testing.T, addr string, c call) outcome {
		call := map[string]any{
			"baseUrl": "http://" + addr, "protocol": protocol, "headers": headers,
			"method": strings.ToLower(c.method[:1]) + c.method[1:],
		}
		if c.timeout > 0 {
			call["timeoutMs"] = c.timeout.Milliseconds()
		}
		text, err := json.Marshal(call)
		if err != nil {
			t.Fatal(err)
		}
		stdout, stderr := c.run(t, c.json(t), "node", "web/dist/test/call.js", string(text))
		var o outcome
		for line := range strings.Lines(stdout) {
			var got struct {
				Message    json.RawMessage
				Code, Text string
				Violations []string
			}
			if err := json.Unmarshal([]byte(line), &got); err != nil {
				t.Fatal(err)
			}
			if got.Message != nil {
				o.read(t, got.Message)
			}
			o.Code, o.Violations = got.Code, got.Violations
		}
		if o.Code == "" {
			t.Errorf("the output has no final line: %s", stderr)
		}
		return o
	}
}
