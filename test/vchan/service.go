// Package vchan is what the two ends of the conformance test of internal/xen/vchan agree on: domu, a domain with servers,
// and test/e2e, which runs client/client.c against them in dom0.
package vchan

// A Kind is what serves a vchan.
type Kind string

const (
	// Echo is our Listener, which sends back what it gets.
	Echo Kind = "echo"
	// Bridge is our Listener as stubinit has it, and qmpbridge, in front of a QMP server on a unix socket.
	Bridge Kind = "bridge"
	// Pipe is our Listener in front of a server on a unix socket, bytes unchanged.
	Pipe Kind = "pipe"
	// Reference is Xen's vchan-socket-proxy --mode=server in front of a server on a unix socket.
	Reference Kind = "reference"
)

// A Service is one vchan of the test domain, served by a process of its own.
type Service struct {
	Name string // published below data/NAME of the domain
	Kind Kind
	// Left and Right are ring orders of an Echo; 0 is the default.
	Left, Right uint
	Socket      string // of the server behind it
}

// Sockets of the servers behind services: QMP servers, and ones that send back what they get. A server has one client at
// a time, as QEMU's monitors do, so that ours and the reference have one each.
const (
	SocketQMP           = "/run/qmp"
	SocketQMPReference  = "/run/qmp-reference"
	SocketEcho          = "/run/echo"
	SocketEchoReference = "/run/echo-reference"
)

// Services are what the test domain serves.
var Services = []Service{
	{Name: "echo-10-11", Kind: Echo, Left: 10, Right: 11},
	{Name: "echo-11-10", Kind: Echo, Left: 11, Right: 10},
	{Name: "echo-12-12", Kind: Echo, Left: 12, Right: 12},
	{Name: "echo-default", Kind: Echo},
	{Name: "echo-20-20", Kind: Echo, Left: 20, Right: 20},
	{Name: "qmp", Kind: Bridge, Socket: SocketQMP},
	{Name: "qmp-reference", Kind: Reference, Socket: SocketQMPReference},
	{Name: "pipe", Kind: Pipe, Socket: SocketEcho},
	{Name: "pipe-reference", Kind: Reference, Socket: SocketEchoReference},
}

// Nodes below /local/domain/ID by which dom0 and the test domain talk.
const (
	// ReadyNode is there when all services are.
	ReadyNode = "data/ready"
	// RequestNode is written by dom0, and AnswerNode when that is done.
	RequestNode = "data/request"
	AnswerNode  = "data/answer"
	// ExitsNode is how often a Reference has ended by itself and was started again.
	ExitsNode = "data/reference-exits"
)

// What dom0 can request.
const (
	// RequestSwitches is followed by a space and a number of seconds. The answer is a JSON object from each service's name to
	// the context switches of all its threads in that time.
	RequestSwitches = "switches"
	// RequestRestart starts every Reference anew.
	RequestRestart = "restart"
)

// Commands of the QMP servers beside qmp_capabilities and query-status.
const (
	CommandLarge    = "x-large"     // an answer of 900 KiB
	CommandStormOn  = "x-storm-on"  // from now on every session gets events
	CommandStormOff = "x-storm-off" // no more
)
