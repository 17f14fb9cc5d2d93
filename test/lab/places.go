package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A lab in -icount mode keeps one processor busy, and no limit in it depends on this machine's clock: two of them may run
// beside each other. One in parallel mode wants both processors to itself.
const placeCount = 2

// places are held locks on the machine's places for labs.
type places []*os.File

// Close gives the places back; a second Close does nothing.
func (p *places) Close() {
	for _, f := range *p {
		f.Close()
	}
	*p = nil
}

func placeFile(n int) string { return filepath.Join(Top(), "build", "lab", fmt.Sprintf("place.%d", n)) }

// takePlaces waits until there is room for a lab.
func takePlaces(ctx context.Context, icount bool, progress io.Writer) (places, error) {
	if !icount {
		var all places
		for n := range placeCount {
			f, err := lockFile(ctx, placeFile(n), progress)
			if err != nil {
				all.Close()
				return nil, err
			}
			all = append(all, f)
		}
		return all, nil
	}
	for n := range placeCount {
		if f, err := tryLock(placeFile(n)); f != nil || err != nil {
			return places{f}, err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		f   *os.File
		err error
	}
	got := make(chan result, placeCount)
	for n := range placeCount {
		go func() {
			f, err := lockFile(ctx, placeFile(n), progress)
			got <- result{f, err}
		}()
	}
	var mine places
	var failed error
	for range placeCount {
		r := <-got
		switch {
		case r.err != nil:
			failed = errors.Join(failed, r.err)
		case mine == nil:
			mine = places{r.f}
			cancel() // the other wait
		default:
			r.f.Close()
		}
	}
	if mine == nil {
		return nil, failed
	}
	return mine, nil
}

// tryLock takes the lock on a file, which is made if need be. It returns nil if the lock is held.
func tryLock(name string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return f, nil
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, nil
	}
	return nil, fmt.Errorf("flock %s: %w", name, err)
}

// lockFile waits for the lock on a file.
func lockFile(ctx context.Context, name string, progress io.Writer) (*os.File, error) {
	if f, err := tryLock(name); f != nil || err != nil {
		return f, err
	}
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(progress, "lab: another run holds %s: waiting\n", name)
	got := make(chan error, 1)
	go func() { got <- unix.Flock(int(f.Fd()), unix.LOCK_EX) }()
	select {
	case err = <-got:
		if err == nil {
			return f, nil
		}
	case <-ctx.Done():
		// The goroutine above still has the descriptor: it closes the file when the lock comes.
		go func() { <-got; f.Close() }()
		return nil, fmt.Errorf("%s: held by another run: %w", name, context.Cause(ctx))
	}
	f.Close()
	return nil, fmt.Errorf("flock %s: %w", name, err)
}
