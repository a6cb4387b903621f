//go:build tools

// Package clients names what .ci/peers builds, so that its version and hashes are kept in go.mod and go.sum.
package clients

import _ "github.com/peak/s5cmd/v2"
