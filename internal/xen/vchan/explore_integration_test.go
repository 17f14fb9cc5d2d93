//go:build integration

package vchan_test

import "testing"

// TestMoreInterleavings needs half a minute and no root.
func TestMoreInterleavings(t *testing.T) {
	testInterleavings(t, []exploration{
		{"four clients", rules{clients: 4, greet: 1}},
		{"two publications fail", rules{clients: 3, greet: 1, failures: 2}},
		{"the server closes twice", rules{clients: 3, greet: 1, closes: 2}},
	})
}
