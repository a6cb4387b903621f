// The client that comes as a Go module, pinned with its dependencies by hash: see .ci/peers.
module clients

go 1.19

require github.com/peak/s5cmd/v2 v2.3.0
