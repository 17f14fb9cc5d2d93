package vchan

import "context"

// Transport is what a Listener needs of Xen. The real one is behind Listen;
// package vchantest has one in memory.
type Transport interface {
	// Bind makes an event channel that the client's domain may bind to.
	Bind() (port uint32, err error)
	// Unbind closes an event channel.
	Unbind(port uint32) error
	// Notify sends an event to the other end, if there is one.
	Notify(port uint32) error
	// Wait blocks until an event has come on any port since the last Wait.
	// Events may be merged; none may be lost. After Close, and after
	// Interrupt, it returns an error that is net.ErrClosed.
	Wait() error
	// Interrupt ends Wait for good.
	Interrupt()
	// Share grants pages zeroed pages to the client's domain, one mapping.
	// When they are unmapped here, however that comes about, the byte at
	// offset live is cleared and port is notified.
	Share(pages, live int, port uint32) (Memory, error)
	// Publish tells clients where to find the endpoint: both values at once, or
	// port first. Clients read ref first, so that one who looks meanwhile finds
	// the old ref with the new port, but never the new ref with the old port.
	// Calls do not overlap. A context that has an end is passed.
	Publish(ctx context.Context, ref, port uint32) error
	// Unpublish takes that back.
	Unpublish(ctx context.Context) error
	// Close gives everything back.
	Close() error
}

// Memory is memory shared with the client's domain.
type Memory struct {
	Bytes []byte   // whole pages
	Refs  []uint32 // the grant reference of each page
	Free  func() error
}
