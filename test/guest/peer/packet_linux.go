package peer

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// Layout of struct tpacket_auxdata (linux/if_packet.h): the socket's view of a frame whose VLAN tag the kernel took out.
const (
	auxStatus = 0 // u32
	auxTCI    = 16
	auxTPID   = 18
	auxSize   = 20
)

type packet struct {
	file *os.File
	raw  syscall.RawConn
	name string
}

// OpenPacket opens an AF_PACKET socket on the interface, promiscuous, without the frames it sends itself. VLAN tags are
// put back where the kernel took them out.
func OpenPacket(iface string) (Link, error) {
	dev, err := net.InterfaceByName(iface)
	if err != nil {
		return nil, fmt.Errorf("packet socket on %s: %w", iface, err)
	}
	// Protocol 0: nothing arrives before bind has named the interface.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("packet socket on %s: %w", iface, err)
	}
	file := os.NewFile(uintptr(fd), "packet:"+iface)
	if err := setUp(fd, dev.Index); err != nil {
		file.Close()
		return nil, fmt.Errorf("packet socket on %s: %w", iface, err)
	}
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("packet socket on %s: %w", iface, err)
	}
	return &packet{file, raw, iface}, nil
}

func setUp(fd, ifindex int) error {
	for _, option := range []struct {
		name       string
		level, opt int
		value      int
	}{
		{"PACKET_AUXDATA", unix.SOL_PACKET, unix.PACKET_AUXDATA, 1},
		{"PACKET_IGNORE_OUTGOING", unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1},
		{"SO_RCVBUFFORCE", unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4 << 20},
	} {
		if err := unix.SetsockoptInt(fd, option.level, option.opt, option.value); err != nil {
			return fmt.Errorf("%s: %w", option.name, err)
		}
	}
	member := unix.PacketMreq{Ifindex: int32(ifindex), Type: unix.PACKET_MR_PROMISC}
	if err := unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP, &member); err != nil {
		return fmt.Errorf("promiscuous mode: %w", err)
	}
	all := binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, unix.ETH_P_ALL))
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: all, Ifindex: ifindex}); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	return nil
}

func (p *packet) ReadFrame(b []byte) (int, bool, error) {
	oob := make([]byte, unix.CmsgSpace(auxSize))
	var n, oobn int
	var err error
	if waitErr := p.raw.Read(func(fd uintptr) bool {
		// ENETDOWN comes once when the interface goes down; the socket serves on when it is up again.
		for err = unix.EINTR; err == unix.EINTR || err == unix.ENETDOWN; {
			n, oobn, _, _, err = unix.Recvmsg(int(fd), b, oob, 0)
		}
		return err != unix.EAGAIN
	}); waitErr != nil {
		// A socket without deadlines: the wait ends early only because it was closed, which has no exported error here.
		return 0, false, fmt.Errorf("read a frame from %s: %w", p.name, os.ErrClosed)
	}
	if err != nil {
		return 0, false, fmt.Errorf("read a frame from %s: %w", p.name, err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return 0, false, fmt.Errorf("read a frame's auxiliary data from %s: %w", p.name, err)
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_PACKET && m.Header.Type == unix.PACKET_AUXDATA && len(m.Data) >= auxSize {
			frame, partial := withTag(b[:n], m.Data)
			return copy(b, frame), partial, nil
		}
	}
	return n, false, nil
}

// withTag returns the frame with its VLAN tag, if aux (a struct tpacket_auxdata) has one, and whether its checksum is
// still to be made.
func withTag(frame, aux []byte) ([]byte, bool) {
	status := binary.NativeEndian.Uint32(aux[auxStatus:])
	if status&unix.TP_STATUS_VLAN_VALID != 0 && len(frame) >= 14 {
		tpid := uint16(unix.ETH_P_8021Q)
		if status&unix.TP_STATUS_VLAN_TPID_VALID != 0 {
			tpid = binary.NativeEndian.Uint16(aux[auxTPID:])
		}
		tag := binary.BigEndian.AppendUint16(nil, tpid)
		tag = binary.BigEndian.AppendUint16(tag, binary.NativeEndian.Uint16(aux[auxTCI:]))
		frame = slices.Insert(slices.Clone(frame), 12, tag...)
	}
	return frame, status&unix.TP_STATUS_CSUMNOTREADY != 0
}

func (p *packet) WriteFrame(frame []byte) error {
	var err error
	if waitErr := p.raw.Write(func(fd uintptr) bool {
		for err = unix.EINTR; err == unix.EINTR; {
			_, err = unix.Write(int(fd), frame)
		}
		return err != unix.EAGAIN
	}); waitErr != nil {
		err = os.ErrClosed
	}
	if err != nil {
		return fmt.Errorf("write a frame of %d bytes to %s: %w", len(frame), p.name, err)
	}
	return nil
}

func (p *packet) Close() error { return p.file.Close() }
