package vchan_test

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stubinit/stubinit/internal/xen/vchan"
)

// A tried is a Conn whose calls wait by Notify alone.
type tried struct {
	*vchan.Conn
	news chan struct{}
}

func tries(t *testing.T, c net.Conn) *tried {
	s := &tried{c.(*vchan.Conn), make(chan struct{}, 1)}
	s.Notify(func() {
		select {
		case s.news <- struct{}{}:
		default:
		}
	})
	return s
}

func (s *tried) wait() error {
	select {
	case <-s.news:
		return nil
	case <-time.After(10 * time.Second):
		return errors.New("never told")
	}
}

// Without loss and without a wake-up that is missed, the session's two directions in one goroutine.
func TestTryEcho(t *testing.T) {
	for _, o := range orders {
		t.Run(name(o), func(t *testing.T) {
			t.Parallel()
			server, c, _, _ := pair(t, o)
			s := tries(t, server)
			done := make(chan error, 1)
			go func() {
				var held []byte // read and not yet written
				buf := make([]byte, 3000)
				for {
					n, err := 0, error(nil)
					if len(held) == 0 {
						n, err = s.TryRead(buf)
						held = buf[:n]
					}
					wrote := 0
					if err == nil {
						wrote, err = s.TryWrite(held)
						held = held[wrote:]
					}
					if err == nil && n == 0 && wrote == 0 {
						err = s.wait()
					}
					if err != nil {
						done <- err
						return
					}
				}
			}()
			wantEcho(t, c)
			c.Close()
			if err := <-done; err != io.EOF {
				t.Errorf("the server's copy ended with %v, want end of file", err)
			}
		})
	}
}

// A session that waits is told of its end, whoever ends it.
func TestTryEnds(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(c io.Closer, l *vchan.Listener)
		want error
	}{
		{"client", func(c io.Closer, _ *vchan.Listener) { c.Close() }, io.EOF},
		{"listener", func(_ io.Closer, l *vchan.Listener) { l.Close() }, net.ErrClosed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			server, c, l, _ := pair(t, vchan.Options{LeftOrder: 10, RightOrder: 11})
			s := tries(t, server)
			for n := 0; n == 0; { // the session stands when it takes output
				var err error
				if n, err = s.TryWrite([]byte("x")); err == nil && n == 0 {
					err = s.wait()
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			if n, err := s.TryRead(make([]byte, 1)); n != 0 || err != nil {
				t.Fatalf("nothing yet: %d, %v", n, err)
			}
			tt.end(c, l)
			for {
				n, err := s.TryRead(make([]byte, 1))
				if errors.Is(err, tt.want) {
					break
				}
				if n != 0 || err != nil {
					t.Fatalf("%d, %v, want %v", n, err, tt.want)
				}
				if err := s.wait(); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}
