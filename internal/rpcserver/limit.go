package rpcserver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"example.com/shop/internal/auth"
	"golang.org/x/time/rate"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/protobuf/types/known/durationpb"
)

// LimitConfig bounds what one caller may take. A caller is who auth.Identify found, or else an address, of IPv6 a /64.
type LimitConfig struct {
	// Rate is the calls a second that a caller may make in the long run; 0 is no limit.
	Rate float64
	// Burst is how many calls a caller may make at once after a rest. Default twice the rate, at least 1.
	Burst int
	// Concurrent is how many calls of a caller may be under way, streams included; 0 is no limit.
	Concurrent int
	// MaxCallers bounds the table of callers. Default 10,000, about 2 MB. When all of those are active, new ones share one account.
	MaxCallers int
	// Budget is what all callers together may hold in memory; nil is no limit. It must be the one of Config.Budget.
	Budget *Budget
}

// Limit returns the interceptor that answers resource_exhausted, with google.rpc.RetryInfo and a retry-after header, to a caller who asks for
// too much. It belongs between auth.Identify and auth.Authorize, so that guessing credentials is limited, too.
func Limit(config LimitConfig) connect.ServerInterceptor {
	l := newLimiter(config)
	return func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			info, _ := connect.CallInfoForServerContext(ctx)
			payer := account(ctx, info.PeerAddr)
			mine, wait := l.enter(payer, time.Now())
			if wait > 0 {
				return exhausted(info, exhaustedError("you have made too many calls; nothing was done, try again later", wait), wait)
			}
			defer l.leave(mine)
			if config.Budget == nil {
				return next(ctx, spec, stream)
			}
			load := loaded(ctx)
			whole := load == nil
			if whole { // it did not come by HTTP, and is here as a whole
				load = newLoad(config.Budget)
				defer load.release()
			}
			if err := load.bill(payer); err != nil {
				return exhausted(info, err, concurrencyWait)
			}
			if err := load.add(callWeight + weigh(info.RequestHeader()) + int64(info.ReceiveStats.Size)); err != nil {
				return exhausted(info, err, concurrencyWait)
			}
			err := next(ctx, spec, &meteredStream{stream, load, info, whole})
			if errors.Is(err, errNoRoom) {
				return exhausted(info, errNoRoom, concurrencyWait)
			}
			return err
		}
	}
}

// account names the caller who pays.
func account(ctx context.Context, peer string) string {
	if caller, ok := auth.FromContext(ctx); ok {
		return caller.By + ":" + caller.Subject
	}
	return network(peer)
}

// network names who is at an address: the host, or of IPv6 the /64, for whoever has one address of it has all.
func network(peer string) string {
	host, _, err := net.SplitHostPort(peer)
	if err != nil {
		return peer
	}
	address, err := netip.ParseAddr(host)
	if err != nil || address.Unmap().Is4() {
		return host
	}
	prefix, _ := address.Prefix(64)
	return prefix.String()
}

const retryAfterHeader = "Retry-After"

// exhausted says in a header, too, when to try again.
func exhausted(info *connect.CallInfo, err error, wait time.Duration) error {
	info.ResponseHeader().Set(retryAfterHeader, strconv.Itoa(int(math.Ceil(wait.Seconds()))))
	return err
}

func exhaustedError(text string, wait time.Duration) error {
	detail, err := connectproto.NewErrorDetail(&errdetails.RetryInfo{RetryDelay: durationpb.New(wait)})
	if err != nil {
		return fmt.Errorf("make retry hint: %w", err)
	}
	return connect.NewError(connect.CodeResourceExhausted, text).WithDetail(detail)
}

// limiter is the table of callers. One who has rested until his bucket is full is like one who never called, so he can be forgotten.
type limiter struct {
	config LimitConfig

	mu      sync.Mutex
	callers map[string]*bucket
	rest    *bucket // of those whom the table has no room for
	swept   time.Time
}

// bucket is one caller's.
type bucket struct {
	rate   *rate.Limiter
	active int
}

func newLimiter(config LimitConfig) *limiter {
	config.Burst = cmp.Or(config.Burst, max(1, int(2*config.Rate)))
	config.MaxCallers = cmp.Or(config.MaxCallers, 10_000)
	l := &limiter{config: config, callers: make(map[string]*bucket)}
	l.rest = l.newBucket()
	return l
}

func (l *limiter) newBucket() *bucket {
	limit := rate.Limit(l.config.Rate)
	if l.config.Rate == 0 {
		limit = rate.Inf
	}
	return &bucket{rate: rate.NewLimiter(limit, l.config.Burst)}
}

// concurrencyWait is the hint when too many calls are under way: nobody knows when one will end.
const concurrencyWait = time.Second

// enter takes a call on account, or says how long to wait before another try.
func (l *limiter) enter(name string, now time.Time) (mine *bucket, wait time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	mine = l.find(name, now)
	if l.config.Concurrent > 0 && mine.active >= l.config.Concurrent {
		return nil, concurrencyWait
	}
	reservation := mine.rate.ReserveN(now, 1)
	if wait := reservation.DelayFrom(now); wait > 0 {
		reservation.CancelAt(now)
		return nil, wait
	}
	mine.active++
	return mine, 0
}

func (l *limiter) leave(mine *bucket) {
	l.mu.Lock()
	defer l.mu.Unlock()
	mine.active--
}

func (l *limiter) find(name string, now time.Time) *bucket {
	if mine, ok := l.callers[name]; ok {
		return mine
	}
	if len(l.callers) >= l.config.MaxCallers && now.Sub(l.swept) >= time.Second { // not for every call of a flood
		l.swept = now
		l.sweep(now)
	}
	if len(l.callers) >= l.config.MaxCallers {
		return l.rest
	}
	mine := l.newBucket()
	l.callers[name] = mine
	return mine
}

func (l *limiter) sweep(now time.Time) {
	for name, one := range l.callers {
		if one.active == 0 && (l.config.Rate == 0 || one.rate.TokensAt(now) >= float64(l.config.Burst)) {
			delete(l.callers, name)
		}
	}
}
