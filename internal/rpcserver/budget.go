package rpcserver

import (
	"context"
	"io"
	"sync"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/bounds"
)

// The weights estimate the memory that a call uses, in bytes.
const (
	// callWeight is the weight of a call before its message: goroutine, stream, context.
	callWeight = 16 << 10
	// arrivingWeight is the weight of each byte of a message that is not decoded yet. The buffer for the message grows by
	// doubling, and the decoded message comes on top.
	arrivingWeight = 4
	// decodedWeight is the weight of each byte of a decoded message.
	decodedWeight = 2
	// shareOfBudget is the divisor for the part of a budget that one caller may use.
	shareOfBudget = 4
)

// Budget bounds the memory that the requests of a process use at once, over all transports. A request counts from its
// first byte to the end of its call. A caller that withholds the end of a message keeps paying for the part that has
// arrived. A nil Budget bounds nothing.
type Budget struct {
	size, share int64

	mu      sync.Mutex
	used    int64
	callers map[string]int64
}

// NewBudget makes a budget of size bytes for requests whose messages have at most largest bytes. One caller may use a
// quarter of it. The budget and the quarter are always large enough for one largest message with the most fields.
func NewBudget(size, largest int64) *Budget {
	least := (arrivingWeight+1)*largest + bounds.MaxFields*bounds.FieldBytes
	return &Budget{size: max(size, least), share: max(size/shareOfBudget, least), callers: make(map[string]int64)}
}

// Used returns how much of the budget is in use, in bytes.
func (b *Budget) Used() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// load is the part of a budget that one call uses. It is safe for concurrent use.
type load struct {
	budget  *Budget
	account string // of the caller; "" until the caller is known
	held    int64
	message int64 // part of held: for the bytes of the message that have arrived
	fields  int64 // part of held: for the fields of the decoded message
}

func newLoad(budget *Budget) *load { return &load{budget: budget} }

// weigh returns the memory that headers use.
func weigh(header *connect.Header) (bytes int64) {
	for name, values := range header.All() {
		for _, value := range values {
			bytes += int64(len(name) + len(value))
		}
	}
	return bytes
}

// add takes n more bytes, or returns errNoRoom if the budget or the caller's share does not have them.
func (l *load) add(n int64) error {
	b := l.budget
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.used+n > b.size || l.account != "" && b.callers[l.account]+n > b.share {
		return errNoRoom
	}
	l.take(n)
	return nil
}

// arrive pays for n bytes of a message that have arrived.
func (l *load) arrive(n int) error {
	err := l.add(arrivingWeight * int64(n))
	if err == nil {
		l.budget.mu.Lock()
		l.message += arrivingWeight * int64(n)
		l.budget.mu.Unlock()
	}
	return err
}

// decode pays for the decoding of a message with that many bytes and fields. If the message was compressed, fewer bytes
// have arrived.
func (l *load) decode(bytes, fields int) error {
	inflated := max(0, arrivingWeight*int64(bytes)-l.message)
	decoded := int64(fields)*bounds.FieldBytes - l.fields
	if err := l.add(inflated + decoded); err != nil {
		return err
	}
	l.fields += decoded
	l.budget.mu.Lock()
	l.message += inflated
	l.budget.mu.Unlock()
	return nil
}

// settle replaces the payment for the parts of a message with that for the decoded message of n bytes.
func (l *load) settle(n int) error {
	l.budget.mu.Lock()
	more := decodedWeight*int64(n) - l.message
	l.message += more
	if more <= 0 {
		l.take(more)
	}
	l.budget.mu.Unlock()
	if more <= 0 {
		return nil
	}
	return l.add(more)
}

// bill charges a caller for everything that the call uses. It returns errNoRoom if that exceeds the caller's share.
func (l *load) bill(account string) error {
	l.budget.mu.Lock()
	held := l.held
	l.take(-held)
	l.account = account
	l.budget.mu.Unlock()
	return l.add(held)
}

// release returns everything to the budget.
func (l *load) release() {
	l.budget.mu.Lock()
	defer l.budget.mu.Unlock()
	l.take(-l.held)
}

// take moves n bytes from the budget to the call. The caller must have locked the budget's mutex.
func (l *load) take(n int64) {
	b := l.budget
	b.used += n
	l.held += n
	if l.account == "" {
		return
	}
	if b.callers[l.account] += n; b.callers[l.account] == 0 {
		delete(b.callers, l.account)
	}
}

// errNoRoom means that the budget is used up. It has the same retry hint as the errors of Limit.
var errNoRoom = exhaustedError("too much data is being processed; nothing was done, try again later", concurrencyWait)

type loadKey struct{}

// loadOf returns the load of ctx's call, or nil if there is none.
func loadOf(ctx context.Context) *load {
	l, _ := ctx.Value(loadKey{}).(*load)
	return l
}

// meteredBody pays for the bytes that are read from it.
type meteredBody struct {
	io.ReadCloser
	load *load
}

func (m *meteredBody) Read(p []byte) (int, error) {
	n, err := m.ReadCloser.Read(p)
	if refused := m.load.arrive(n); refused != nil {
		return 0, refused
	}
	return n, err
}

// meteredStream settles the payment for each message when it is decoded.
type meteredStream struct {
	connect.ServerStream
	load *load
	info *connect.CallInfo
	// whole means that the message has arrived but is not decoded, and that its fields were not counted.
	whole bool
}

// Receive implements connect.ServerStream.
func (m *meteredStream) Receive(message any) error {
	if m.whole {
		size := m.info.ReceiveStats.Size
		if err := m.load.decode(size, min(size/2, bounds.MaxFields)); err != nil {
			return err
		}
	}
	if err := m.ServerStream.Receive(message); err != nil {
		return err
	}
	return m.load.settle(m.info.ReceiveStats.Size)
}
