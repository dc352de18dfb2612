package rabbit

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"

	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
)

// plainText returns the text of a header value if its text form is unambiguous: for strings, integers, booleans, and
// bytes that are valid text.
func plainText(value any) (text string, ok bool) {
	switch value := value.(type) {
	case string:
		return value, true
	case []byte:
		return string(value), messaging.ValidText(string(value))
	case bool, int8, byte, int16, uint16, int32, uint32, int64:
		return fmt.Sprint(value), true
	}
	return "", false
}

// toText returns a readable text for a header value of any type: plain text as it is, void as "", other bytes in
// base64, times as RFC 3339, decimals such as 1250e-2, and lists and tables as JSON.
func toText(value any) string {
	if text, ok := plainText(value); ok {
		return text
	}
	switch value := value.(type) {
	case nil:
		return ""
	case []byte:
		return base64.StdEncoding.EncodeToString(value)
	case time.Time:
		return value.UTC().Format(time.RFC3339)
	case amqp.Decimal:
		return fmt.Sprintf("%de-%d", value.Value, value.Scale)
	case []any, amqp.Table:
		if text, err := json.Marshal(value); err == nil {
			return string(text)
		}
	}
	return fmt.Sprint(value)
}

// kindOf names the type of a header value for which plainText has no text.
func kindOf(value any) string {
	switch value.(type) {
	case nil:
		return "void"
	case []byte:
		return "bytes that are not UTF-8"
	case time.Time:
		return "a time"
	case amqp.Decimal:
		return "a decimal"
	case float32, float64:
		return "a floating-point number"
	case []any:
		return "a list"
	}
	return "a table"
}
