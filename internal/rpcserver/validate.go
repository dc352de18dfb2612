package rpcserver

import (
	"errors"

	"buf.build/go/protovalidate"
	"connectrpc.com/connect/v2"
	"connectrpc.com/validate"
	"example.com/shop/internal/bounds"
	"google.golang.org/protobuf/proto"
)

// validateAllBytes is the size of the largest request that is searched for all violations. Every element of a list can
// violate a rule, and each violation takes some hundred times the bytes of its element.
const validateAllBytes = 512

// validateRequests validates received messages against the rules in the proto file.
func validateRequests() connect.ServerInterceptor {
	return validate.NewServerInterceptor(validate.WithValidator(boundedValidator{protovalidate.GlobalValidator}))
}

// boundedValidator finds only the first violation, except in small messages, where it finds all.
type boundedValidator struct{ protovalidate.Validator }

// Validate implements protovalidate.Validator.
func (v boundedValidator) Validate(message proto.Message, options ...protovalidate.ValidationOption) error {
	err := v.Validator.Validate(message, append(options, protovalidate.WithFailFast())...)
	if err == nil {
		return nil
	}
	if proto.Size(message) <= validateAllBytes {
		err = v.Validator.Validate(message, options...)
	}
	var invalid *protovalidate.ValidationError
	if !errors.As(err, &invalid) {
		return err
	}
	return &protovalidate.ValidationError{Violations: fitting(invalid.Violations)}
}

// fitting returns the violations that fit into one detail of an error, but at least one for the error's text.
func fitting(violations []*protovalidate.Violation) []*protovalidate.Violation {
	const overhead = 64 // at most, for the tags, the lengths and the type's name
	size := overhead
	for i, violation := range violations {
		if size += proto.Size(violation.Proto) + 3; size > bounds.MaxErrorDetails {
			return violations[:max(1, i)]
		}
	}
	return violations
}
