package rpcserver

import (
	"context"
	"io"
	"sync"

	"connectrpc.com/connect/v2"
	"example.com/shop/internal/bounds"
)

// Weights of what a call holds, in bytes of memory.
const (
	// callWeight is a call that has said nothing yet: goroutine, stream, context.
	callWeight = 16 << 10
	// arrivingWeight is for each byte of a message that is not decoded yet: the buffer that it is read into grows by doubling, and what it is
	// decoded into comes on top.
	arrivingWeight = 4
	// decodedWeight is for each byte of a message that is decoded.
	decodedWeight = 2
	// shareOfBudget is the part of a budget that one caller may hold.
	shareOfBudget = 4
)

// Budget bounds the memory that the requests of a process hold at once, whatever they came by: from their first byte to the end of their call.
// A caller that holds back the end of a message keeps paying for what has arrived. A nil Budget bounds nothing.
type Budget struct {
	size, share int64

	mu      sync.Mutex
	used    int64
	callers map[string]int64
}

// NewBudget makes a budget of size bytes for requests whose messages have at most largest bytes. A caller may hold a quarter of it. Budget and
// quarter are never too small for one largest message with the most fields.
func NewBudget(size, largest int64) *Budget {
	least := (arrivingWeight+1)*largest + bounds.MaxFields*bounds.FieldBytes
	return &Budget{size: max(size, least), share: max(size/shareOfBudget, least), callers: make(map[string]int64)}
}

// Used is how much of the budget is held, in bytes.
func (b *Budget) Used() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.used
}

// load is what one call holds of a budget. Its methods may be called at the same time.
type load struct {
	budget  *Budget
	account string // of the caller; "" while nobody knows
	held    int64
	message int64 // part of held: what has arrived of the message, or its bytes
	fields  int64 // part of held: what the message is decoded into
}

func newLoad(budget *Budget) *load { return &load{budget: budget} }

// weigh is the memory that headers take.
func weigh(header *connect.Header) (bytes int64) {
	for name, values := range header.All() {
		for _, value := range values {
			bytes += int64(len(name) + len(value))
		}
	}
	return bytes
}

// add takes n bytes more, or says that they are not there.
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

// arrive takes a part of a message.
func (l *load) arrive(n int) error {
	err := l.add(arrivingWeight * int64(n))
	if err == nil {
		l.budget.mu.Lock()
		l.message += arrivingWeight * int64(n)
		l.budget.mu.Unlock()
	}
	return err
}

// decode says that a message of so many bytes and fields is about to be decoded. If it was compressed, less has arrived.
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

// settle says that the message is decoded and has n bytes, whatever its parts were.
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

// bill has a caller pay for what the call holds, or says that it cannot.
func (l *load) bill(account string) error {
	l.budget.mu.Lock()
	held := l.held
	l.take(-held)
	l.account = account
	l.budget.mu.Unlock()
	return l.add(held)
}

// release gives back all.
func (l *load) release() {
	l.budget.mu.Lock()
	defer l.budget.mu.Unlock()
	l.take(-l.held)
}

// take moves n bytes, with the budget's mutex held.
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

// errNoRoom is the budget's refusal, with the same hint as that of Limit.
var errNoRoom = exhaustedError("too much is being processed; nothing was done, try again later", concurrencyWait)

type loadKey struct{}

// loaded returns what the call of ctx holds; nil if nobody counts.
func loaded(ctx context.Context) *load {
	l, _ := ctx.Value(loadKey{}).(*load)
	return l
}

// meteredBody pays for what is read of it.
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

// meteredStream settles what each message costs when it is decoded.
type meteredStream struct {
	connect.ServerStream
	load *load
	info *connect.CallInfo
	// whole: the message is here and not decoded, and nobody has counted its fields.
	whole bool
}

// Receive implements connect.ServerStream.
func (m *meteredStream) Receive(message any) error {
	if m.whole {
		if err := m.load.decode(m.info.ReceiveStats.Size, min(m.info.ReceiveStats.Size/2, bounds.MaxFields)); err != nil {
			return err
		}
	}
	if err := m.ServerStream.Receive(message); err != nil {
		return err
	}
	return m.load.settle(m.info.ReceiveStats.Size)
}
