package rpcserver

import (
	"compress/gzip"
	"errors"
	"io"
	"sync"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectgzip"
)

// compressMinBytes is the size in bytes from which messages are compressed. A message that fits into one packet does
// not arrive sooner if it is smaller, and for many calls gzip would take more CPU time than everything else.
const compressMinBytes = 1 << 10

// boundedGzip inflates at most one message of the largest size, and only one gzip member. Connect bounds the output
// but not its cost: 4 MiB can contain 200,000 empty members, and each takes the time of a header and a checksum.
type boundedGzip struct {
	*connectgzip.Compressor
	limit   int
	budget  *Budget // pays for the inflated bytes until the call pays for them; may be nil
	readers sync.Pool
}

func newBoundedGzip(limit int, budget *Budget) *boundedGzip {
	return &boundedGzip{Compressor: connectgzip.New(), limit: limit, budget: budget}
}

// Decompress implements connect.Compressor.
func (g *boundedGzip) Decompress(src io.Reader) (io.ReadCloser, error) {
	reader, ok := g.readers.Get().(*gzip.Reader)
	if !ok {
		reader = new(gzip.Reader)
	}
	if err := reader.Reset(src); err != nil {
		return nil, err
	}
	reader.Multistream(false)
	i := &inflating{gzip: g, reader: reader, src: src, left: g.limit + 1}
	if g.budget != nil {
		i.load = newLoad(g.budget)
	}
	return i, nil
}

// inflating is a message that is being decompressed.
type inflating struct {
	gzip   *boundedGzip
	reader *gzip.Reader
	src    io.Reader // must have ReadByte, as Connect's buffers do; otherwise gzip would read ahead
	left   int
	load   *load
}

func (i *inflating) Read(p []byte) (int, error) {
	n, err := i.reader.Read(p[:min(len(p), i.left)])
	if i.load != nil {
		if refused := i.load.arrive(n); refused != nil {
			return 0, refused
		}
	}
	if i.left -= n; i.left == 0 {
		return n, connect.Errorf(connect.CodeResourceExhausted, "message is larger than configured max %d",
			i.gzip.limit)
	}
	if errors.Is(err, io.EOF) {
		if more, _ := i.src.Read(make([]byte, 1)); more > 0 {
			return n, errors.New("data after the end of the compressed message")
		}
	}
	return n, err
}

func (i *inflating) Close() error {
	if i.load != nil {
		i.load.release()
	}
	i.gzip.readers.Put(i.reader)
	return nil
}
