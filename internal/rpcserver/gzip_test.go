package rpcserver

import (
	"bytes"
	"compress/gzip"
	"io"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
)

func compressed(t *testing.T, content io.Reader) *bytes.Buffer {
	t.Helper()
	var buffer bytes.Buffer
	w := gzip.NewWriter(&buffer)
	if _, err := io.Copy(w, content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &buffer
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// counting counts the bytes that are read from a compressed message.
type counting struct {
	*bytes.Buffer
	n int
}

func (c *counting) Read(p []byte) (int, error) {
	n, err := c.Buffer.Read(p)
	c.n += n
	return n, err
}

func (c *counting) ReadByte() (byte, error) {
	b, err := c.Buffer.ReadByte()
	if err == nil {
		c.n++
	}
	return b, err
}

func TestInflatingStopsAtTheLimit(t *testing.T) {
	t.Parallel()
	const limit = 64 << 10
	g := newBoundedGzip(limit, nil)
	for size, fits := range map[int64]bool{
		0: true, 1: true, limit - 1: true, limit: true, limit + 1: false, 20 << 20: false,
	} {
		source := &counting{Buffer: compressed(t, io.LimitReader(zeros{}, size))}
		total := source.Len()
		reader, err := g.Decompress(source)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, reader)
		if fits && (err != nil || n != size) {
			t.Errorf("%d bytes: got %d, %v", size, n, err)
		}
		if !fits && (connect.CodeOf(err) != connect.CodeResourceExhausted || n > limit+1) {
			t.Errorf("%d bytes: got %d, %v", size, n, err)
		}
		if size > 100*limit && source.n > total/100 {
			t.Errorf("%d bytes: read %d of %d compressed bytes", size, source.n, total)
		}
		if err := reader.Close(); err != nil {
			t.Error(err)
		}
	}
}

func TestInflatingAcceptsOneMember(t *testing.T) {
	t.Parallel()
	g := newBoundedGzip(1<<20, nil)
	read := func(source *bytes.Buffer) (string, error) {
		reader, err := g.Decompress(source)
		if err != nil {
			return "", err
		}
		defer reader.Close()
		text, err := io.ReadAll(reader)
		return string(text), err
	}
	hello := compressed(t, strings.NewReader("hello")).Bytes()
	for range 2 { // the second time, with a reader from the pool
		if text, err := read(bytes.NewBuffer(hello)); err != nil || text != "hello" {
			t.Errorf("got %q, %v", text, err)
		}
		for name, source := range map[string][]byte{
			"two members":   append(bytes.Clone(hello), hello...),
			"empty members": bytes.Repeat(compressed(t, strings.NewReader("")).Bytes(), 1000),
			"garbage after": append(bytes.Clone(hello), 0),
			"cut":           hello[:len(hello)-1],
			"bad checksum":  append(bytes.Clone(hello[:len(hello)-8]), 0, 0, 0, 0, 0, 0, 0, 0),
			"no gzip":       []byte("hello"),
			"nothing":       nil,
		} {
			if text, err := read(bytes.NewBuffer(source)); err == nil {
				t.Errorf("%s: got %q and no error", name, text)
			}
		}
	}
}
