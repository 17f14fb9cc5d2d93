// Package wire is what the host and dom0's agent say to each other over the lab's virtio-serial port: frames that carry
// the input and output of processes run in dom0, several at once.
//
// The host starts a process with a Start frame under an id of its choosing; Stdin frames follow, each answered by an Ack
// when the process has taken it, so that the host never has more than Window of them on the way. Stdout and Stderr
// frames come back, and an Exit frame ends the id.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
)

// Kind says what a frame is.
type Kind uint8

// Frame kinds. Data is raw bytes except where a type is named.
const (
	Hello      Kind = iota + 1 // agent: dom0 is up; the first frame of all
	Start                      // host: JSON of Process
	Stdin                      // host
	StdinClose                 // host: end of standard input
	Ack                        // agent: one Stdin frame was taken
	Signal                     // host: one byte, the signal's number, for the process group
	Stdout                     // agent
	Stderr                     // agent
	Exit                       // agent: JSON of Status
)

const (
	// MaxData is the longest Data of a frame.
	MaxData = 32 << 10
	// Window is how many Stdin frames of one process may be unacknowledged.
	Window = 32

	headerSize = 9
)

// Process says what to run.
type Process struct {
	Argv []string `json:"argv"`
	Env  []string `json:"env,omitempty"` // added to the agent's own
}

// Status says how a process ended.
type Status struct {
	Code  int    `json:"code"`            // as a shell reports it: 128+n for signal n
	Error string `json:"error,omitempty"` // why it could not be started
}

// Frame is one message. ID names the process; it is 0 in Hello.
type Frame struct {
	Kind Kind
	ID   uint32
	Data []byte
}

// Append appends the encoding of f: length of Data (32 bits, big-endian), kind (8), id (32), Data.
func Append(b []byte, f Frame) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.Data)))
	b = append(b, byte(f.Kind))
	b = binary.BigEndian.AppendUint32(b, f.ID)
	return append(b, f.Data...)
}

// Write writes f in one Write call.
func Write(w io.Writer, f Frame) error {
	if len(f.Data) > MaxData {
		return fmt.Errorf("frame of %d bytes: at most %d fit", len(f.Data), MaxData)
	}
	_, err := w.Write(Append(make([]byte, 0, headerSize+len(f.Data)), f))
	return err
}

// Read reads one frame. The error is io.EOF only between frames.
func Read(r io.Reader) (Frame, error) {
	var h [headerSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return Frame{}, err
	}
	n := binary.BigEndian.Uint32(h[:])
	f := Frame{Kind: Kind(h[4]), ID: binary.BigEndian.Uint32(h[5:])}
	if n > MaxData || f.Kind < Hello || f.Kind > Exit {
		return Frame{}, fmt.Errorf("frame header % x: not one of ours", h)
	}
	f.Data = make([]byte, n)
	if _, err := io.ReadFull(r, f.Data); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return Frame{}, err
	}
	return f, nil
}

// JSON returns the frame with v as its data. It panics when v cannot be encoded, which Process and Status always can.
func JSON(kind Kind, id uint32, v any) Frame {
	b, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return Frame{kind, id, b}
}
