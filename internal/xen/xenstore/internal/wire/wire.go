// Package wire is xenstore's message format, as in Xen's public header
// io/xs_wire.h and docs/misc/xenstore.txt. It is shared by the client and by
// the in-memory server that tests the client; golden bytes in its tests keep
// the two from being wrong together.
package wire

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
)

const (
	// HeaderSize is the size of struct xsd_sockmsg.
	HeaderSize = 16
	// MaxRequest is the largest request with its header: the kernel's
	// xenbus_dev_frontend.c collects it in a buffer of XENSTORE_PAYLOAD_MAX bytes.
	MaxRequest = 4096
	// MaxPayload is XENSTORE_PAYLOAD_MAX, the largest payload of an answer.
	MaxPayload = 4096
	// MaxAbsPath and MaxRelPath are the longest paths, without the NUL.
	MaxAbsPath = 3072
	MaxRelPath = 2048
)

// Type is enum xsd_sockmsg_type.
type Type uint32

// The messages that this project uses. DirectoryPart is 22: 20 was RESTRICT and stays unused.
const (
	Directory        Type = 1
	Read             Type = 2
	GetPerms         Type = 3
	Watch            Type = 4
	Unwatch          Type = 5
	TransactionStart Type = 6
	TransactionEnd   Type = 7
	Write            Type = 11
	Mkdir            Type = 12
	Remove           Type = 13
	SetPerms         Type = 14
	WatchEvent       Type = 15
	Error            Type = 16
	DirectoryPart    Type = 22
)

var typeNames = map[Type]string{
	Directory: "directory", Read: "read", GetPerms: "get permissions", Watch: "watch", Unwatch: "unwatch",
	TransactionStart: "start transaction", TransactionEnd: "end transaction", Write: "write", Mkdir: "mkdir",
	Remove: "remove", SetPerms: "set permissions", WatchEvent: "watch event", Error: "error", DirectoryPart: "directory part",
}

func (t Type) String() string {
	if name, ok := typeNames[t]; ok {
		return name
	}
	return fmt.Sprintf("type %d", uint32(t))
}

// Message is one request, answer or watch event.
type Message struct {
	Type    Type
	ReqID   uint32
	TxID    uint32
	Payload []byte
}

// Append appends m as it stands on the wire. Both architectures are little-endian.
func (m Message) Append(b []byte) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(m.Type))
	b = binary.LittleEndian.AppendUint32(b, m.ReqID)
	b = binary.LittleEndian.AppendUint32(b, m.TxID)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.Payload)))
	return append(b, m.Payload...)
}

// Receive reads one message. The error is io.EOF only between messages, and
// wraps io.ErrUnexpectedEOF inside one.
func Receive(r io.Reader) (Message, error) {
	var h [HeaderSize]byte
	if n, err := io.ReadFull(r, h[:]); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%d of the %d bytes of a header: %w", n, HeaderSize, err)
		}
		return Message{}, err
	}
	m := Message{
		Type:  Type(binary.LittleEndian.Uint32(h[0:])),
		ReqID: binary.LittleEndian.Uint32(h[4:]),
		TxID:  binary.LittleEndian.Uint32(h[8:]),
	}
	size := binary.LittleEndian.Uint32(h[12:])
	if size > MaxPayload {
		return Message{}, fmt.Errorf("bad header: payload of %d bytes in a message of type %q, the limit is %d", size, m.Type, MaxPayload)
	}
	m.Payload = make([]byte, size)
	if n, err := io.ReadFull(r, m.Payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return Message{}, fmt.Errorf("%d of the %d bytes of a message of type %q: %w", n, size, m.Type, err)
	}
	return m, nil
}

// Join ends every string with a NUL.
func Join(list ...string) []byte {
	var b []byte
	for _, s := range list {
		b = append(append(b, s...), 0)
	}
	return b
}

// Split undoes Join. No bytes are no strings; a last string without its NUL is an error.
func Split(payload []byte) ([]string, error) {
	if len(payload) == 0 {
		return nil, nil
	}
	if payload[len(payload)-1] != 0 {
		return nil, errors.New("the last string does not end in NUL")
	}
	return strings.Split(string(payload[:len(payload)-1]), "\x00"), nil
}

// errnos is xsd_errors, the only names that xenstored may answer with.
var errnos = map[string]syscall.Errno{
	"EINVAL": syscall.EINVAL, "EACCES": syscall.EACCES, "EEXIST": syscall.EEXIST, "EISDIR": syscall.EISDIR,
	"ENOENT": syscall.ENOENT, "ENOMEM": syscall.ENOMEM, "ENOSPC": syscall.ENOSPC, "EIO": syscall.EIO,
	"ENOTEMPTY": syscall.ENOTEMPTY, "ENOSYS": syscall.ENOSYS, "EROFS": syscall.EROFS, "EBUSY": syscall.EBUSY,
	"EAGAIN": syscall.EAGAIN, "EISCONN": syscall.EISCONN, "E2BIG": syscall.E2BIG, "EPERM": syscall.EPERM,
}

// ParseError returns what an answer of type Error says: a syscall.Errno where
// the header knows the name, else an error that quotes it.
func ParseError(payload []byte) error {
	if list, err := Split(payload); err == nil && len(list) == 1 {
		if errno, ok := errnos[list[0]]; ok {
			return errno
		}
	}
	return fmt.Errorf("xenstored answered with an unknown error %q", payload)
}

// ErrorName is the name of errno on the wire; one that has none becomes EINVAL.
func ErrorName(errno syscall.Errno) string {
	for name, e := range errnos {
		if e == errno {
			return name
		}
	}
	return "EINVAL"
}
