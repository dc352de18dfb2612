package bounds_test

import (
	"bytes"
	"errors"
	"runtime"
	"strings"
	"testing"
	"unicode/utf8"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/bounds"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/structpb"
)

// list returns an encoded google.protobuf.ListValue of n values, each encoded as value.
func list(n int, value string) []byte {
	element := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), []byte(value))
	return bytes.Repeat(element, n)
}

// Messages with more than MaxFields fields are refused, so that decoding has a bounded cost. Messages with exactly
// MaxFields fields are accepted.
func TestFieldsAreCounted(t *testing.T) {
	unknown := protowire.AppendBytes([]byte{0x7a}, list(bounds.MaxFields+1, ""))
	packed := protowire.AppendBytes(protowire.AppendTag(nil, 1, protowire.BytesType), make([]byte, bounds.MaxFields+1))
	nested := protowire.AppendBytes(protowire.AppendTag(nil, 6, protowire.BytesType), list(bounds.MaxFields, ""))
	tests := map[string]struct {
		body    []byte
		into    proto.Message
		refused bool
	}{
		"AsManyAsAllowed":    {list(bounds.MaxFields, ""), new(structpb.ListValue), false},
		"OneMore":            {list(bounds.MaxFields+1, ""), new(structpb.ListValue), true},
		"FieldsOfElements":   {list(bounds.MaxFields/2+1, "\x20\x00"), new(structpb.ListValue), true},
		"Nested":             {nested, new(structpb.Value), true},
		"Packed":             {packed, new(descriptorpb.SourceCodeInfo_Location), true},
		"LongText":           {list(1, "\x1a\x80\x80\x40"+strings.Repeat("\n", 1<<20)), new(structpb.ListValue), false},
		"UnknownFields":      {bytes.Repeat([]byte{0x78, 0}, bounds.MaxFields+1), new(structpb.ListValue), true},
		"UnknownIsNotParsed": {unknown, new(structpb.ListValue), false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			err := bounds.Unmarshal(test.body, test.into)
			if refused := errors.Is(err, bounds.ErrTooManyFields); refused != test.refused || !refused && err != nil {
				t.Errorf("got error %v, want refused: %t", err, test.refused)
			}
		})
	}
}

func TestTheDecoderReportsMalformedBodies(t *testing.T) {
	body := append(list(1, strings.Repeat("\x20\x00", bounds.MaxFields/2+1)), 0xff)
	if err := bounds.Unmarshal(body, new(structpb.ListValue)); err == nil || errors.Is(err, bounds.ErrTooManyFields) {
		t.Errorf("got error %v, want the decoder's", err)
	}
}

func TestRefusalAllocatesNothing(t *testing.T) {
	body := list(2<<20, "")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err := bounds.Fields(body, new(structpb.ListValue))
	runtime.ReadMemStats(&after)
	if grown := after.TotalAlloc - before.TotalAlloc; !errors.Is(err, bounds.ErrTooManyFields) || grown > 1<<20 {
		t.Errorf("got error %v after allocating %d bytes", err, grown)
	}
}

func TestJSONValuesAreCounted(t *testing.T) {
	tests := map[string]struct {
		text    string
		refused bool
	}{
		"AsManyAsAllowed": {"[" + strings.Repeat("0,", bounds.MaxFields-2) + "0]", false},
		"OneMore":         {"[" + strings.Repeat("0,", bounds.MaxFields) + "0]", true},
		"Objects":         {"[{}" + strings.Repeat(",{}", bounds.MaxFields/2) + "]", true},
		"Deep":            {strings.Repeat("[", bounds.MaxFields+1), true},
		"Text":            {`{"a":"` + strings.Repeat(`,[{\"`, bounds.MaxFields) + `"}`, false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if _, err := bounds.JSONFields([]byte(test.text)); (err != nil) != test.refused {
				t.Errorf("got error %v, want refused: %t", err, test.refused)
			}
		})
	}
	if err := protojson.Unmarshal([]byte(tests["AsManyAsAllowed"].text), new(structpb.ListValue)); err != nil {
		t.Errorf("the largest accepted text is not JSON: %v", err)
	}
}

func TestErrorsAreCut(t *testing.T) {
	detail := func(n int) *connect.ErrorDetail { return &connect.ErrorDetail{Type: "t", Value: make([]byte, n)} }
	cause := errors.New("cause")
	long := connect.NewError(connect.CodeNotFound, strings.Repeat("ä", 5000)).WithCause(cause).
		WithDetail(detail(1000)).WithDetail(detail(5000)).WithDetail(detail(1000))
	short := bounds.Error(long)
	text := short.Message()
	if n := len(text); n > bounds.MaxErrorText || n < bounds.MaxErrorText-4 || !utf8.ValidString(text) {
		t.Errorf("text has %d bytes: %q", n, text)
	}
	if n := len(short.Details()); n != 2 || short.Code() != connect.CodeNotFound || !errors.Is(short, cause) {
		t.Errorf("got %d details, code %s, cause %v", n, short.Code(), short.Unwrap())
	}
	if small := connect.NewError(connect.CodeNotFound, "small").WithDetail(detail(5)); bounds.Error(small) != small {
		t.Error("a small error was changed")
	}
}

func TestTextIsCut(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "short": "short", "exactly ten": "exactly…", "ääääää": "äää…", "bad\xff": "bad\ufffd",
		"ääää\xc3": "äää…",
	} {
		if got := bounds.Text(text, 10); got != want || len(got) > 10 {
			t.Errorf("%q became %q, want %q", text, got, want)
		}
	}
}
