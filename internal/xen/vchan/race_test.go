//go:build race

package vchan_test

// underRace: the exploration is one goroutine at a time and takes ten times as
// long.
const underRace = true
