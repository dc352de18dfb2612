package rpcserver

import (
	"strings"
	"testing"

	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
)

// Names of enum values must exist at every place in a message. Unknown fields may contain anything.
func TestUnknownEnumNames(t *testing.T) {
	t.Parallel()
	file, health := new(descriptorpb.FileDescriptorProto), new(healthv1.HealthListResponse)
	for name, test := range map[string]struct {
		into  proto.Message
		text  string
		field string // the field that the error names, "" for no error
	}{
		"Known":         {file, `{"messageType":[{"field":[{"type":"TYPE_STRING"}]}]}`, ""},
		"UnknownField":  {file, `{"none":"TYPE_NONE","messageType":[{"more":{"type":"TYPE_NONE"}}]}`, ""},
		"UnknownNumber": {new(healthv1.HealthCheckResponse), `{"status":77}`, ""},
		"Null":          {file, `{"none":1,"messageType":null,"options":{"optimizeFor":null}}`, ""},
		"Single":        {new(healthv1.HealthCheckResponse), `{"status":"SERVED"}`, "status"},
		"ProtoName":     {file, `{"options":{"optimize_for":"NEATNESS"}}`, "optimize_for"},
		"InLists":       {file, `{"messageType":[{},{"field":[{"type":"TYPE_STRING"},{"type":"TYPE_NONE"}]}]}`, "type"},
		"InMaps":        {health, `{"statuses":{"a":{"status":"SERVING"},"b":{"status":"SERVED"}}}`, "status"},
		"InRepeated": {new(descriptorpb.FieldOptions), `{"targets":["TARGET_TYPE_FILE","TARGET_TYPE_NONE"]}`,
			"targets"},
		"BesideUnknown": {new(healthv1.HealthCheckResponse), `{"none":1,"status":"SERVED"}`, "status"},
		"OtherMistake":  {new(healthv1.HealthCheckResponse), `{"status":[]}`, "status"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := newEnumCodec().UnmarshalRead(t.Context(), strings.NewReader(test.text), proto.Clone(test.into))
			if (err != nil) != (test.field != "") || err != nil && !strings.Contains(err.Error(), test.field) {
				t.Errorf("got error %v, want field %q in it", err, test.field)
			}
		})
	}
}
