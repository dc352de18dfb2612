package main

import (
	"encoding/base64"

	"github.com/compose-spec/compose-go/v2/types"
)

func init() { projectChecks = append(projectChecks, checkCallKeys) }

// checkCallKeys checks that durable calls are enabled: api, which takes the calls, and consumer, which executes them,
// must have the same key of at least 32 bytes.
func checkCallKeys(project *types.Project) string {
	text := func(service string) string {
		if value := project.Services[service].Environment["CALL_KEYS"]; value != nil {
			return *value
		}
		return ""
	}
	if key, err := base64.StdEncoding.DecodeString(text("api")); err != nil || len(key) < 32 {
		return "api: CALL_KEYS is not a key of 32 bytes in base64"
	}
	if text("api") != text("consumer") {
		return "api and consumer have different CALL_KEYS"
	}
	return ""
}
