package messaging

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/wrapperspb"
	"pgregory.net/rapid"
)

func TestNew(t *testing.T) {
	t.Parallel()
	m := New("key", wrapperspb.String("text"))
	if err := m.Validate(); err != nil {
		t.Errorf("validate: %v", err)
	}
	const wantType, wantPayload = "google.protobuf.StringValue", "\n\x04text"
	if m.ID.Version() != 7 || m.Type != wantType || m.Key != "key" || string(m.Payload) != wantPayload {
		t.Errorf("got %+v", m)
	}
	if other := New("key", wrapperspb.String("text")); other.ID == m.ID {
		t.Error("two messages have the same ID")
	}
	if err := New("", wrapperspb.String("\xff")).Validate(); !errors.Is(err, ErrInvalid) {
		t.Errorf("a body that cannot be encoded: got %v", err)
	}
}

func TestValidate(t *testing.T) {
	t.Parallel()
	headers := func(n int) map[string]string {
		all := map[string]string{}
		for i := range n {
			all[fmt.Sprintf("h%d", i)] = "v"
		}
		return all
	}
	setHeader := func(name, value string) func(m *Message) {
		return func(m *Message) { m.Headers = map[string]string{name: value} }
	}
	for name, test := range map[string]struct {
		change func(m *Message)
		valid  bool
	}{
		"Empty":               {func(m *Message) { m.Key, m.Payload = "", nil }, true},
		"NoID":                {func(m *Message) { m.ID = uuid.Nil }, false},
		"ForeignID":           {func(m *Message) { m.ID = uuid.New() }, false},
		"TypeWithoutPackage":  {func(m *Message) { m.Type = "_T1" }, true},
		"LongestType":         {func(m *Message) { m.Type = strings.Repeat("t", MaxType) }, true},
		"TypeTooLong":         {func(m *Message) { m.Type = strings.Repeat("t", MaxType+1) }, false},
		"NoType":              {func(m *Message) { m.Type = "" }, false},
		"TypeIsWildcard":      {func(m *Message) { m.Type = "#" }, false},
		"TypeEndsInDot":       {func(m *Message) { m.Type = "a." }, false},
		"TypeEndsInNewline":   {func(m *Message) { m.Type = "a\n" }, false},
		"TypeStartsWithDigit": {func(m *Message) { m.Type = "a.1b" }, false},
		"TypeIsNotASCII":      {func(m *Message) { m.Type = "ä" }, false},
		"LongestKey":          {func(m *Message) { m.Key = strings.Repeat("k", MaxKey) }, true},
		"KeyTooLong":          {func(m *Message) { m.Key = strings.Repeat("k", MaxKey+1) }, false},
		"KeyCountsInBytes":    {func(m *Message) { m.Key = strings.Repeat("ü", MaxKey/2+1) }, false},
		"KeyWithNUL":          {func(m *Message) { m.Key = "a\x00" }, false},
		"KeyNotUTF8":          {func(m *Message) { m.Key = "\xff" }, false},
		"LargestPayload":      {func(m *Message) { m.Payload = make([]byte, MaxPayload) }, true},
		"PayloadTooLarge":     {func(m *Message) { m.Payload = make([]byte, MaxPayload+1) }, false},
		"MostHeaders":         {func(m *Message) { m.Headers = headers(MaxHeaders) }, true},
		"TooManyHeaders":      {func(m *Message) { m.Headers = headers(MaxHeaders + 1) }, false},
		"LongestHeaderName":   {setHeader(strings.Repeat("h", 64), ""), true},
		"HeaderNameTooLong":   {setHeader(strings.Repeat("h", 65), ""), false},
		"HeaderWithoutName":   {setHeader("", ""), false},
		"HeaderCC":            {setHeader("CC", "other"), false},
		"HeaderNewline":       {setHeader("a\n", ""), false},
		"LongestHeader":       {setHeader("a", strings.Repeat("v", MaxHeaderValue)), true},
		"HeaderTooLong":       {setHeader("a", strings.Repeat("v", MaxHeaderValue+1)), false},
		"HeaderWithNUL":       {setHeader("a", "\x00"), false},
		"HeaderNotUTF8":       {setHeader("a", "\xff"), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := New("key", wrapperspb.String("text"))
			test.change(&m)
			err := m.Validate()
			if (err == nil) != test.valid || (err != nil && !errors.Is(err, ErrInvalid)) {
				t.Errorf("got error %v, want valid %t", err, test.valid)
			}
			if err != nil && len(err.Error()) > 2000 {
				t.Errorf("the error text has %d bytes, want at most 2000", len(err.Error()))
			}
		})
	}
}

// text generates strings, many of which contain invalid parts.
func text() *rapid.Generator[string] {
	piece := rapid.OneOf(
		rapid.String(),
		rapid.SampledFrom([]string{"\x00", "\xff", "\xc3", "\xed\xa0\x80", "ü", "日", "\uFFFD", "😀"}),
		rapid.Map(rapid.SliceOf(rapid.Byte()), func(b []byte) string { return string(b) }),
	)
	return rapid.Custom(func(t *rapid.T) string {
		repeat := rapid.SampledFrom([]int{1, 1, 100, 3000}).Draw(t, "repeat")
		return strings.Repeat(strings.Join(rapid.SliceOfN(piece, 0, 5).Draw(t, "pieces"), ""), repeat)
	})
}

func TestCleanText(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		s := text().Draw(t, "text")
		clean := CleanText(s)
		if !ValidText(clean) {
			t.Fatalf("%q is not valid", clean)
		}
		if len(clean) > 4<<10 {
			t.Fatalf("the result has %d bytes", len(clean))
		}
		if again := CleanText(clean); again != clean {
			t.Fatalf("cleaning twice changes %q to %q", clean, again)
		}
		if ValidText(s) && len(s) <= 4<<10 && clean != s {
			t.Fatalf("valid text %q became %q", s, clean)
		}
	})
	if got := CleanText("a\x00b\xff\xfec"); got != "a\uFFFDb\uFFFDc" {
		t.Errorf("got %q", got)
	}
	if got := CleanText(strings.Repeat("ü", 4<<10)); len(got) < 4<<10-utf8.UTFMax || !strings.HasPrefix(got, "üü") {
		t.Errorf("long text was cut to %d bytes", len(got))
	}
}

func TestValidText(t *testing.T) {
	t.Parallel()
	for s, want := range map[string]bool{
		"": true, "a": true, "ü😀": true, "\x01": true,
		"\x00": false, "a\x00": false, "\xff": false, "\xc3": false, "\xed\xa0\x80": false,
	} {
		if got := ValidText(s); got != want {
			t.Errorf("%q: got %t", s, got)
		}
	}
}

func TestPermanent(t *testing.T) {
	t.Parallel()
	cause := errors.New("cause")
	if err := Permanent(nil); err != nil || IsPermanent(nil) {
		t.Errorf("Permanent(nil) is %v", err)
	}
	err := fmt.Errorf("wrapped: %w", Permanent(cause))
	if !IsPermanent(err) || !errors.Is(err, cause) || err.Error() != "wrapped: cause" {
		t.Errorf("got %v", err)
	}
	if IsPermanent(cause) {
		t.Error("an unmarked error is permanent")
	}
}
