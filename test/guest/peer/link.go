package peer

import "net"

// Link carries whole Ethernet frames without their check sequence. ReadFrame fails after Close; reading and writing may
// go on at the same time.
type Link interface {
	// ReadFrame reads one frame into b. partial says that the sender left the transport checksum to hardware, as a
	// paravirtual interface does between guests of one machine: the checksum field is then not to be verified.
	ReadFrame(b []byte) (n int, partial bool, err error)
	WriteFrame(frame []byte) error
	Close() error
}

type datagrams struct{ net.Conn }

// Datagrams is a Link over a datagram socket, one frame a datagram: the format of QEMU's "dgram" network backend and of
// its older "socket,udp".
func Datagrams(c net.Conn) Link { return datagrams{c} }

func (d datagrams) ReadFrame(b []byte) (int, bool, error) {
	n, err := d.Read(b)
	return n, false, err
}

func (d datagrams) WriteFrame(frame []byte) error {
	_, err := d.Write(frame)
	return err
}
