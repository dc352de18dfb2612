package rpcserver

import (
	"compress/gzip"
	"errors"
	"io"
	"sync"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectgzip"
)

// compressMinBytes is the least message in bytes that is compressed. What fits into one packet arrives no sooner for being smaller, and gzip spends more
// processor time on it than many a call on everything else.
const compressMinBytes = 1 << 10

// boundedGzip inflates no more than a message may have, and one gzip member only. Connect bounds what comes out, but not what it costs:
// 4 MiB hold 200,000 members that are empty, and each takes the time of a header and a checksum.
type boundedGzip struct {
	*connectgzip.Compressor
	limit   int
	budget  *Budget // pays for what is inflated until it belongs to its call; nil for none
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

// inflating is one message that is being decompressed.
type inflating struct {
	gzip   *boundedGzip
	reader *gzip.Reader
	src    io.Reader // has ReadByte, as Connect's buffers do: else gzip would read ahead
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
		return n, connect.Errorf(connect.CodeResourceExhausted, "message is larger than configured max %d", i.gzip.limit)
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
