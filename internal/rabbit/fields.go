package rabbit

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"

	"example.com/shop/internal/messaging"
	amqp "github.com/rabbitmq/amqp091-go"
)

// plainText returns the text of a header's value if every sender would write the same: of strings, integers, booleans,
// and bytes that are text.
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

// toText returns some text for a header's value of any type, so that it can be kept and read: plain text, void as "",
// other bytes in base64, times as RFC 3339, decimals such as 1250e-2, and lists and tables as JSON.
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

// kindOf says in words of which type a header's value is, of those that are no plain text.
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
