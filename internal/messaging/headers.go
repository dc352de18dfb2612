package messaging

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
)

// StoredHeaders scans the headers of a row of the outbox. A value that is not an object of strings sets Malformed, and
// does not fail the scan: otherwise one such row would stop everything behind it.
type StoredHeaders struct {
	Map       map[string]string
	Malformed error
}

// ScanBytes implements pgtype.BytesScanner.
func (h *StoredHeaders) ScanBytes(stored []byte) error {
	var all map[string]*string // distinguishes null from ""
	if stored == nil {
		return nil
	}
	err := json.Unmarshal(stored, &all)
	h.Map = make(map[string]string, len(all))
	for name, value := range all {
		if value == nil {
			err = errors.Join(err, fmt.Errorf("%.100q is null", name))
			break
		}
		h.Map[name] = *value
	}
	if err != nil || all == nil {
		h.Map, h.Malformed = nil, fmt.Errorf("%.300s: %w", stored, cmp.Or(err, errors.New("null")))
	}
	return nil
}
