//go:build unix

package testenv_test

import (
	"testing"

	"example.com/orders/internal/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
