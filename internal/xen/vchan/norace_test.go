//go:build !race

package vchan_test

const underRace = false
