package rabbit

import (
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"testing/iotest"

	"pgregory.net/rapid"
)

// sourceConn is a connection that reads from Reader.
type sourceConn struct {
	net.Conn
	io.Reader
}

func (c sourceConn) Read(p []byte) (int, error) { return c.Reader.Read(p) }

func frame(kind byte, payload []byte) []byte {
	f := binary.BigEndian.AppendUint32([]byte{kind, 0, 1}, uint32(len(payload)))
	return append(append(f, payload...), 0xCE)
}

// contentHeader is the header of a message with a content type, headers, and an ID.
func contentHeader(table []byte) []byte {
	payload := []byte{0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0xA0, 0x80, 1, 'c'}
	payload = append(binary.BigEndian.AppendUint32(payload, uint32(len(table))), table...)
	return frame(headerFrame, append(payload, 2, 'i', 'd'))
}

func entry(name string, kind byte, value ...byte) []byte {
	return append(append([]byte{byte(len(name))}, name...), append([]byte{kind}, value...)...)
}

// However the stream is split, everything readable passes unchanged, and only unreadable headers are replaced.
func TestStreamOfFramesIsKept(t *testing.T) {
	t.Parallel()
	bad := contentHeader(entry("x", '?'))
	rapid.Check(t, func(t *rapid.T) {
		var stream, want []byte
		for range rapid.IntRange(0, 20).Draw(t, "frames") {
			kind := rapid.SampledFrom([]byte{methodFrame, bodyFrame, beatFrame}).Draw(t, "type")
			sent := frame(kind, rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "payload"))
			expected := sent
			switch rapid.IntRange(0, 3).Draw(t, "kind") {
			case 0:
				sent = contentHeader(entry("x", 'S', 0, 0, 0, 1, 'v'))
				expected = sent
			case 1:
				sent, expected = bad, append(readable(bad[:len(bad)-1]), 0xCE)
			}
			stream, want = append(stream, sent...), append(want, expected...)
		}
		var source io.Reader = bytes.NewReader(stream)
		switch rapid.IntRange(0, 2).Draw(t, "pieces") {
		case 0:
			source = iotest.OneByteReader(source)
		case 1:
			source = iotest.HalfReader(source)
		}
		buffer := make([]byte, rapid.IntRange(1, 5000).Draw(t, "buffer"))
		conn, got := newReadableConn(sourceConn{Reader: source}), []byte(nil)
		for {
			n, err := conn.Read(buffer)
			got = append(got, buffer[:n]...)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("got  %q\nwant %q", got, want)
		}
	})
}

func TestHeadersThatCannotBeRead(t *testing.T) {
	t.Parallel()
	list := func(n int) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(n)), bytes.Repeat([]byte{'V'}, n)...)
	}
	for name, test := range map[string]struct {
		table []byte
		flaw  string
	}{
		"Readable": {entry("x", 'A', list(maxElements)...), ""},
		"Empty":    {nil, ""},
		"LongList": {
			entry("x", 'A', list(maxElements+1)...), "a header or the header table has more than 8192 elements",
		},
		"UnknownType":  {entry("x", 'L', 1, 2, 3, 4, 5, 6, 7, 8), `a header has unknown type 'L'`},
		"Truncated":    {entry("x", 'l', 1, 2, 3), "a field is truncated"},
		"LengthTooBig": {entry("x", 'S', 0xff, 0xff, 0xff, 0xff), "a field is truncated"},
	} {
		t.Run(name, func(t *testing.T) {
			whole := contentHeader(test.table)
			got := readable(whole[:len(whole)-1])
			reason := []byte(test.flaw)
			if test.flaw == "" && !bytes.Equal(got, whole[:len(whole)-1]) || !bytes.Contains(got, reason) {
				t.Errorf("got %q", got)
			}
			if size := binary.BigEndian.Uint32(got[3:]); int(size) != len(got)-frameOverhead {
				t.Errorf("the frame size is %d, want %d", size, len(got)-frameOverhead)
			}
		})
	}
}

func FuzzReadable(f *testing.F) {
	f.Add(contentHeader(entry("x", 'A', 0, 0, 0, 1, 'V')))
	f.Add(contentHeader(entry("x", '?')))
	f.Fuzz(func(t *testing.T, stream []byte) {
		_, _ = io.Copy(io.Discard, newReadableConn(sourceConn{Reader: bytes.NewReader(stream)})) // ends for every input
	})
}

// While unreleased messages have too many bytes, nothing more is read, until some are released or the connection ends.
func TestHold(t *testing.T) {
	t.Parallel()
	var stream []byte
	header := contentHeader(nil)
	binary.BigEndian.PutUint64(header[bodySizeAt:], 60)
	for range 5 {
		stream = append(stream, frame(methodFrame, []byte("deliver"))...)
		stream = append(stream, header...)
		for range 2 {
			stream = append(stream, frame(bodyFrame, make([]byte, 30))...)
		}
	}
	messageSize := len(stream) / 5
	conn := newReadableConn(sourceConn{Reader: bytes.NewReader(stream)})
	conn.messages.setLimit(100)
	got := make(chan int, 100)
	go func() {
		defer close(got)
		buffer := make([]byte, 7)
		for {
			n, err := conn.Read(buffer)
			if err != nil {
				return
			}
			got <- n
		}
	}()
	read := func(messages int) {
		t.Helper()
		for total := 0; total < messages*messageSize; {
			n, open := <-got
			if total += n; !open || total > messages*messageSize {
				t.Fatalf("%d bytes were read, want %d", total, messages*messageSize)
			}
		}
	}
	full := func() {
		t.Helper()
		for conn.messages.full() == nil {
			t.Fatal("there is room")
		}
		if len(got) > 0 {
			t.Fatal("more bytes were read")
		}
	}
	read(2)
	full()
	conn.messages.release(60)
	read(1)
	full()
	conn.messages.end()
	read(2)
	if _, open := <-got; open {
		t.Error("more bytes were read than sent")
	}
}
