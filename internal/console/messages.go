package console

import (
	"cmp"
	"context"
	"time"

	"connectrpc.com/connect/v2"
	opsv1 "example.com/shop/internal/gen/ops/v1"
	"example.com/shop/internal/ops"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// pageRows is how many rows a page of any list has.
const pageRows = 50

// SearchMessages implements ops.v1.OpsService.
func (c *Console) SearchMessages(
	ctx context.Context, req *opsv1.SearchMessagesRequest,
) (*opsv1.SearchMessagesResponse, error) {
	if err := cmp.Or(storable(req.GetType(), req.GetKey()), validTimes(req.GetSince(), req.GetUntil())); err != nil {
		return nil, err
	}
	search := ops.Search{
		Type: req.GetType(), Key: req.GetKey(), Since: optionalTime(req.GetSince()), Until: optionalTime(req.GetUntil()),
	}
	found, last, err := ops.SearchLog(ctx, c.db, search, req.GetPageToken(), pageRows)
	if err != nil {
		return nil, publicError(err)
	}
	response := &opsv1.SearchMessagesResponse{}
	for _, e := range found {
		response.Messages = append(response.Messages, messageOf(e))
	}
	if len(found) == pageRows {
		response.NextPageToken = last
	}
	return response, nil
}

func messageOf(e ops.Logged) *opsv1.Message {
	return &opsv1.Message{
		MessageId: e.ID.String(), Type: e.Type, Key: e.Key, InsertTime: timestamppb.New(e.CreatedAt),
		TransactionId: e.TransactionID, Shard: int32(e.Shard), Delivered: e.Delivered,
	}
}

// GetMessage implements ops.v1.OpsService.
func (c *Console) GetMessage(ctx context.Context, req *opsv1.GetMessageRequest) (*opsv1.GetMessageResponse, error) {
	if err := storable(req.GetMessageId()); err != nil {
		return nil, err
	}
	trace, err := ops.Trace(ctx, c.db, req.GetMessageId())
	switch {
	case err != nil:
		return nil, publicError(err)
	case !trace.Known():
		return nil, connect.NewError(connect.CodeNotFound,
			"the message is unknown: outbox, inbox and dead letters do not contain it, or no longer do")
	}
	response := &opsv1.GetMessageResponse{}
	for _, e := range trace.Log {
		response.Copies = append(response.Copies, messageOf(e))
	}
	for _, step := range trace.Steps(c.operator.Groups) {
		at := optionalTimestamp(step.At)
		response.Steps = append(response.Steps, &opsv1.Step{At: at, Where: step.Where, What: step.What})
	}
	for _, letter := range trace.Letters {
		response.LetterIds = append(response.LetterIds, letter.ID)
		response.Type, response.Key, response.Headers = letter.Type, letter.Key, letter.Headers
		response.Payload = show(letter.Type, letter.Payload)
	}
	if waiting := trace.Scheduled; waiting != nil {
		response.Type, response.Key, response.Headers = waiting.Type, waiting.Key, waiting.Headers
		response.Payload = show(waiting.Type, waiting.Payload)
	}
	if len(trace.Log) > 0 {
		first := trace.Log[0]
		response.Type, response.Key, response.Headers = first.Type, first.Key, first.Headers
		response.Payload = show(first.Type, first.Payload)
	}
	return response, nil
}

// optionalTimestamp converts a time that may be nil.
func optionalTimestamp(at *time.Time) *timestamppb.Timestamp {
	if at == nil {
		return nil
	}
	return timestamppb.New(*at)
}

// validTimes refuses times outside of the years 1 to 9999. Postgres accepts all others.
func validTimes(times ...*timestamppb.Timestamp) error {
	for _, at := range times {
		if at != nil && !at.IsValid() {
			return connect.NewError(connect.CodeInvalidArgument, "times must be between the years 1 and 9999")
		}
	}
	return nil
}

// optionalTime converts a time that may be nil, which becomes the zero time.
func optionalTime(at *timestamppb.Timestamp) time.Time {
	if at == nil {
		return time.Time{}
	}
	return at.AsTime()
}
