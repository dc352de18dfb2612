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
	if err := cmp.Or(storable(req.GetType(), req.GetKey()), dated(req.GetSince(), req.GetUntil())); err != nil {
		return nil, err
	}
	search := ops.Search{Type: req.GetType(), Key: req.GetKey(), Since: moment(req.GetSince()),
		Until: moment(req.GetUntil())}
	found, last, err := ops.SearchLog(ctx, c.db, search, req.GetPageToken(), pageRows)
	if err != nil {
		return nil, tell(err)
	}
	response := &opsv1.SearchMessagesResponse{}
	for _, one := range found {
		response.Messages = append(response.Messages, entry(one))
	}
	if len(found) == pageRows {
		response.NextPageToken = last
	}
	return response, nil
}

func entry(one ops.Logged) *opsv1.Message {
	return &opsv1.Message{
		MessageId: one.ID.String(), Type: one.Type, Key: one.Key, InsertTime: timestamppb.New(one.CreatedAt),
		TransactionId: one.TransactionID, Shard: int32(one.Shard), Delivered: one.Delivered,
	}
}

// GetMessage implements ops.v1.OpsService.
func (c *Console) GetMessage(ctx context.Context, req *opsv1.GetMessageRequest) (*opsv1.GetMessageResponse, error) {
	if err := storable(req.GetMessageId()); err != nil {
		return nil, err
	}
	journey, err := ops.Trace(ctx, c.db, req.GetMessageId())
	switch {
	case err != nil:
		return nil, tell(err)
	case !journey.Known():
		return nil, connect.NewError(connect.CodeNotFound,
			"no message of this ID is known: neither outbox nor inbox nor dead letters hold it, or not any more")
	}
	response := &opsv1.GetMessageResponse{}
	for _, one := range journey.Log {
		response.Copies = append(response.Copies, entry(one))
	}
	for _, step := range journey.Steps(c.groups) {
		response.Steps = append(response.Steps, &opsv1.Step{At: stamp(step.At), Where: step.Where, What: step.What})
	}
	for _, letter := range journey.Letters {
		response.LetterIds = append(response.LetterIds, letter.ID)
		response.Type, response.Key, response.Headers = letter.Type, letter.Key, letter.Headers
		response.Payload = show(letter.Type, letter.Payload)
	}
	if len(journey.Log) > 0 {
		first := journey.Log[0]
		response.Type, response.Key, response.Headers = first.Type, first.Key, first.Headers
		response.Payload = show(first.Type, first.Payload)
	}
	return response, nil
}

// stamp is a time that may be missing.
func stamp(at *time.Time) *timestamppb.Timestamp {
	if at == nil {
		return nil
	}
	return timestamppb.New(*at)
}

// dated refuses times that are none: between the years 1 and 9999 Postgres knows them, too.
func dated(times ...*timestamppb.Timestamp) error {
	for _, at := range times {
		if at != nil && !at.IsValid() {
			return connect.NewError(connect.CodeInvalidArgument, "a time is not one between the years 1 and 9999")
		}
	}
	return nil
}

// moment is a time that may be missing, as a zero.
func moment(at *timestamppb.Timestamp) time.Time {
	if at == nil {
		return time.Time{}
	}
	return at.AsTime()
}
