//go:build integration

package vchan_test

import "testing"

// TestMoreInterleavings needs half a minute and no root.
func TestMoreInterleavings(t *testing.T) {
	testInterleavings(t, []exploration{
		{"three clients", rules{clients: 3, greet: 1}},
		{"clients talk", rules{clients: 2, greet: 1, talk: true}},
		{"two publications fail", rules{clients: 2, greet: 1, failures: 2}},
		{"a publication fails and the server closes", rules{clients: 2, greet: 1, failures: 1, closes: 1}},
		{"the server closes twice", rules{clients: 2, greet: 1, closes: 2}},
	})
}
