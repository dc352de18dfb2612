package rpcserver

import (
	"errors"

	"buf.build/go/protovalidate"
	"connectrpc.com/connect/v2"
	"connectrpc.com/validate"
	"example.com/shop/internal/bounds"
	"google.golang.org/protobuf/proto"
)

// validateAllBytes is the largest request of which every violation is looked for. A list of a few bytes an element can
// violate a rule with each of them, and each violation takes some hundred times the bytes of its element.
const validateAllBytes = 512

// validateRequests checks what is received against the rules of the proto file.
func validateRequests() connect.ServerInterceptor {
	return validate.NewServerInterceptor(validate.WithValidator(boundedValidator{protovalidate.GlobalValidator}))
}

// boundedValidator finds the first violation, and the others of small messages only.
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
	return &protovalidate.ValidationError{Violations: tellable(invalid.Violations)}
}

// tellable are as many violations as fit into one detail of an error, and at least one for its text.
func tellable(violations []*protovalidate.Violation) []*protovalidate.Violation {
	const around = 64 // bytes at most of the tags, the lengths and the type's name
	size := around
	for i, one := range violations {
		if size += proto.Size(one.Proto) + 3; size > bounds.MaxErrorDetails {
			return violations[:max(1, i)]
		}
	}
	return violations
}
