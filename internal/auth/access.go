package auth

import (
	"context"
	"log/slog"
	"slices"
	"strings"

	"connectrpc.com/connect/v2"
	authv1 "example.com/shop/internal/gen/auth/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// listed holds the access to third-party services. We cannot put an access option into their proto files.
var listed = map[string]*authv1.Access{
	// Load balancers and orchestrators have no credentials. The answer is one word.
	"grpc.health.v1.Health": {Public: true},
	// Reflection shows every proto file that is linked in.
	"grpc.reflection.v1.ServerReflection":      {Authenticated: true},
	"grpc.reflection.v1alpha.ServerReflection": {Authenticated: true},
}

// AccessTo returns the access to a procedure from listed or from the procedure's proto file. If neither defines it,
// AccessTo returns an empty Access, which admits nobody.
func AccessTo(spec connect.Spec) *authv1.Access {
	service, _, _ := strings.Cut(strings.TrimPrefix(spec.Procedure, "/"), "/")
	if access, ok := listed[service]; ok {
		return access
	}
	method, ok := spec.Schema.(protoreflect.MethodDescriptor)
	if !ok {
		return &authv1.Access{}
	}
	options, ok := method.Options().(*descriptorpb.MethodOptions)
	if !ok || !proto.HasExtension(options, authv1.E_Access) {
		return &authv1.Access{}
	}
	return proto.GetExtension(options, authv1.E_Access).(*authv1.Access)
}

// Authorize returns an interceptor that admits a call if AccessTo its procedure allows it. It must follow Identify.
func Authorize(log *slog.Logger) connect.ServerInterceptor {
	return func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			if err := authorize(ctx, log, spec); err != nil {
				return err
			}
			return next(ctx, spec, stream)
		}
	}
}

func authorize(ctx context.Context, log *slog.Logger, spec connect.Spec) error {
	v, _ := ctx.Value(visitorKey{}).(*visitor)
	access := AccessTo(spec)
	switch {
	case v == nil: // Identify did not run
		return errNone
	case v.denied == errNone && access.GetPublic(), v.By == "nothing":
		return nil
	case v.denied != nil:
		return v.denied
	case access.GetPublic(), access.GetAuthenticated(), overlap(access.GetRoles(), v.Roles):
		return nil
	case len(access.GetRoles()) == 0:
		log.ErrorContext(ctx, "procedure is closed: its proto file does not declare its access",
			"procedure", spec.Procedure)
	}
	return connect.NewError(connect.CodePermissionDenied, "none of your roles may call this procedure")
}

func overlap(a, b []string) bool {
	return slices.ContainsFunc(a, func(role string) bool { return slices.Contains(b, role) })
}
