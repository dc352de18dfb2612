//go:build unix

package testenv_test

import (
	"testing"

	"example.com/shop/internal/dev/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }
