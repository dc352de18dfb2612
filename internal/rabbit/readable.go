package rabbit

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math"
	"net"

	amqp "github.com/rabbitmq/amqp091-go"
)

// unreadableHeader replaces all headers of a message if the client library cannot read them. Its value is the reason. A
// sender that sets it harms only that message.
const unreadableHeader = "x-unreadable"

// Unreadable returns the reason why the headers of a delivery could not be read, or "".
func Unreadable(headers amqp.Table) string {
	reason, _ := headers[unreadableHeader].(string)
	return reason
}

// Limits of the client library. A message whose headers exceed them makes it close the connection, with everything else
// in flight.
const (
	maxElements = 8192
	maxDepth    = 32
)

// AMQP 0-9-1 frames: one byte for the type, two for the channel, four for the size, the payload, and one for the end.
const (
	frameOverhead = 7
	methodFrame   = 1
	headerFrame   = 2
	bodyFrame     = 3
	beatFrame     = 8
	// maxHeaderFrame is more than any broker sends: brokers negotiate 128 KiB.
	maxHeaderFrame = 1 << 20
)

// readableConn passes on what the broker sends, but replaces headers that the client library cannot read. Between two
// messages it waits while unhandled messages have too many bytes.
type readableConn struct {
	net.Conn
	source *bufio.Reader
	frame  []byte // buffer for a content header, reused
	ready  []byte // unread rest of the content header
	pass   int64  // bytes to pass on unchanged
	body   int64  // missing bytes of the current message's body

	messages *hold
}

func newReadableConn(conn net.Conn) *readableConn {
	return &readableConn{Conn: conn, source: bufio.NewReaderSize(conn, 64<<10), messages: new(hold)}
}

// Read implements net.Conn.
func (c *readableConn) Read(p []byte) (n int, err error) {
	for n < len(p) {
		if len(c.ready) == 0 && c.pass == 0 {
			if n > 0 && (!c.buffered() || c.body == 0 && c.messages.full() != nil) {
				return n, nil // without waiting for more
			}
			if c.body == 0 {
				c.awaitRoom()
			}
			if err := c.next(); err != nil {
				return n, err
			}
		}
		var got int
		if len(c.ready) > 0 {
			got = copy(p[n:], c.ready)
			c.ready = c.ready[got:]
		} else if n == 0 || c.source.Buffered() > 0 {
			got, err = c.source.Read(p[n:min(int64(len(p)), int64(n)+c.pass)])
			c.pass -= int64(got)
		}
		if n += got; err != nil || got == 0 {
			return n, err
		}
	}
	return n, nil
}

// buffered reports whether the next frame, or the part of it that must be examined, has arrived.
func (c *readableConn) buffered() bool {
	if c.source.Buffered() < frameOverhead {
		return false
	}
	start, _ := c.source.Peek(frameOverhead)
	return start[0] != headerFrame || c.source.Buffered() >= frameOverhead+int(binary.BigEndian.Uint32(start[3:]))
}

// next starts the next frame.
func (c *readableConn) next() error {
	start, err := c.source.Peek(frameOverhead)
	if err != nil {
		return err
	}
	size := int64(binary.BigEndian.Uint32(start[3:]))
	switch {
	case start[0] == headerFrame && size <= maxHeaderFrame:
		if int64(cap(c.frame)) < frameOverhead+size {
			c.frame = make([]byte, frameOverhead+size)
		}
		c.frame = c.frame[:frameOverhead+size]
		if _, err := io.ReadFull(c.source, c.frame); err != nil {
			return err
		}
		if len(c.frame) >= propertiesAt {
			c.body = int64(binary.BigEndian.Uint64(c.frame[bodySizeAt:]))
		}
		c.ready, c.pass = readable(c.frame), 1 // the frame's end
	case start[0] == bodyFrame:
		c.body = max(0, c.body-size)
		c.messages.add(size)
		fallthrough
	case start[0] == methodFrame, start[0] == beatFrame:
		c.pass = frameOverhead + size + 1
	default: // not an AMQP frame: the library reports that
		c.pass = math.MaxInt64 / 2
	}
	return nil
}

// Property flags of a content header, and offsets in its frame. The properties follow class, weight, size and flags.
const (
	contentTypeFlag     = 1 << 15
	contentEncodingFlag = 1 << 14
	headersFlag         = 1 << 13

	bodySizeAt   = frameOverhead + 4
	flagsAt      = frameOverhead + 12
	propertiesAt = flagsAt + 2
)

// readable returns the content header, with its headers replaced if the client library cannot read them.
func readable(frame []byte) []byte {
	if len(frame) < propertiesAt {
		return frame
	}
	flags := binary.BigEndian.Uint16(frame[flagsAt:])
	if flags&headersFlag == 0 {
		return frame
	}
	properties := fields{rest: frame[propertiesAt:]}
	for _, flag := range []uint16{contentTypeFlag, contentEncodingFlag} {
		if flags&flag != 0 {
			properties.shortString()
		}
	}
	before := frame[:len(frame)-len(properties.rest)]
	table := fields{rest: properties.longString()}
	if properties.flaw != "" {
		return frame
	}
	table.table(0)
	if table.flaw == "" {
		return frame
	}
	reason := table.flaw
	replaced := append([]byte{}, before...)
	replaced = binary.BigEndian.AppendUint32(replaced, uint32(1+len(unreadableHeader)+1+4+len(reason)))
	replaced = append(append(replaced, byte(len(unreadableHeader))), unreadableHeader...)
	replaced = binary.BigEndian.AppendUint32(append(replaced, 'S'), uint32(len(reason)))
	replaced = append(append(replaced, reason...), properties.rest...)
	binary.BigEndian.PutUint32(replaced[3:], uint32(len(replaced)-frameOverhead))
	return replaced
}

// fields parses encoded fields until it finds a flaw.
type fields struct {
	rest []byte
	flaw string
}

func (f *fields) take(n int) []byte {
	if n < 0 || n > len(f.rest) {
		f.flaw, f.rest = "a field is truncated", nil
		return nil
	}
	taken := f.rest[:n]
	f.rest = f.rest[n:]
	return taken
}

func (f *fields) shortString() {
	if length := f.take(1); length != nil {
		f.take(int(length[0]))
	}
}

func (f *fields) longString() []byte {
	if length := f.take(4); length != nil {
		return f.take(int(binary.BigEndian.Uint32(length)))
	}
	return nil
}

func (f *fields) table(depth int) {
	f.elements(depth, func() {
		f.shortString()
		f.value(depth)
	})
}

func (f *fields) array(depth int) { f.elements(depth, func() { f.value(depth) }) }

// elements parses the elements of a table or an array.
func (f *fields) elements(depth int, element func()) {
	if depth > maxDepth {
		f.flaw = fmt.Sprintf("headers are nested more than %d levels deep", maxDepth)
	}
	for n := 1; len(f.rest) > 0 && f.flaw == ""; n++ {
		if n > maxElements {
			f.flaw = fmt.Sprintf("a header or the header table has more than %d elements", maxElements)
			return
		}
		element()
	}
}

// widths are the sizes in bytes of the fixed-size types.
var widths = map[byte]int{
	't': 1, 'b': 1, 'B': 1, 's': 2, 'u': 2, 'I': 4, 'i': 4, 'f': 4, 'l': 8, 'd': 8, 'T': 8, 'D': 5, 'V': 0,
}

func (f *fields) value(depth int) {
	kind := f.take(1)
	if kind == nil {
		return
	}
	width, fixed := widths[kind[0]]
	switch {
	case fixed:
		f.take(width)
	case kind[0] == 'S', kind[0] == 'x':
		f.longString()
	case kind[0] == 'F', kind[0] == 'A':
		inner := fields{rest: f.longString()}
		if f.flaw != "" {
			return
		}
		if kind[0] == 'F' {
			inner.table(depth + 1)
		} else {
			inner.array(depth + 1)
		}
		f.flaw = inner.flaw
	default:
		f.flaw = fmt.Sprintf("a header has unknown type %q", kind[0])
	}
}
