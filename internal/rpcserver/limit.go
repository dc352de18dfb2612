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

// LimitConfig limits the calls of one caller. Callers are distinguished by auth.Identify, or else by address (for
// IPv6, the /64).
type LimitConfig struct {
	// Rate is how many calls per second a caller may make on average. 0 means no limit.
	Rate float64
	// Burst is how many calls a caller may make at once after a pause. Default twice the rate, at least 1.
	Burst int
	// Concurrent is how many calls of a caller, including streams, may run at once. 0 means no limit.
	Concurrent int
	// MaxCallers bounds the table of callers. Default 10,000, about 2 MB. If all of them are active, new callers share one
	// account.
	MaxCallers int
	// Budget bounds the memory of all callers together. Nil means no limit. It must be the same as Config.Budget.
	Budget *Budget
}

// Limit returns the interceptor that refuses calls over the limits with resource_exhausted, google.rpc.RetryInfo and a
// retry-after header. It belongs between auth.Identify and auth.Authorize, so that it also limits attempts to guess
// credentials.
func Limit(config LimitConfig) connect.ServerInterceptor {
	l := newLimiter(config)
	return func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			info, _ := connect.CallInfoForServerContext(ctx)
			payer := account(ctx, info.PeerAddr)
			mine, wait := l.enter(payer, time.Now())
			if wait > 0 {
				err := exhaustedError("you have made too many calls; nothing was done, try again later", wait)
				return exhausted(info, err, wait)
			}
			defer l.leave(mine)
			if config.Budget == nil {
				return next(ctx, spec, stream)
			}
			load := loadOf(ctx)
			whole := load == nil
			if whole { // not over HTTP: the whole message has arrived
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

// account returns the name of the account that pays for the call.
func account(ctx context.Context, peer string) string {
	if caller, ok := auth.FromContext(ctx); ok {
		return caller.By + ":" + caller.Subject
	}
	return network(peer)
}

// network returns the host of an address. For IPv6 it returns the /64, because one client usually has all of its
// addresses.
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

// exhausted adds the retry hint to the response headers, too.
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

// limiter is the table of callers. A caller with a full bucket is like a new caller, so its entry can be deleted.
type limiter struct {
	config LimitConfig

	mu      sync.Mutex
	callers map[string]*bucket
	rest    *bucket // shared by the callers that do not fit into the table
	swept   time.Time
}

// bucket has the state of one caller.
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

// concurrencyWait is the retry hint if too many calls are running. It is a guess, because their ends are unknown.
const concurrencyWait = time.Second

// enter admits a call of the named caller, or returns how long to wait before the next attempt.
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
	if len(l.callers) >= l.config.MaxCallers && now.Sub(l.swept) >= time.Second { // not at every call of a flood
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
	for name, b := range l.callers {
		if b.active == 0 && (l.config.Rate == 0 || b.rate.TokensAt(now) >= float64(l.config.Burst)) {
			delete(l.callers, name)
		}
	}
}
