package main

import (
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/stubinit/stubinit/test/vchan"
)

// greeting is QEMU's.
const greeting = `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}` + "\r\n"

// What a storm is: a burst of events, again and again.
const (
	burst      = 20
	burstEvery = 2 * time.Millisecond
)

var event = []byte(strings.Repeat(`{"timestamp": {"seconds": 1700000000, "microseconds": 123456}, "event": "STOP"}`+"\r\n", burst))

// large is what CommandLarge returns, 900 KiB, of the kind of query-qmp-schema's.
var large = sync.OnceValue(func() []byte {
	const one = `{"name": "135", "members": [{"name": "type", "type": "int"}, {"name": "filename", "default": null, "type": "str"}], "meta-type": "object"}`
	n := 900 << 10 / (len(one) + 2)
	return []byte("[" + strings.Repeat(one+", ", n-1) + one + "]")
})

// A qmpServer speaks QMP with one client at a time, as QEMU's monitor does, and knows a few commands.
type qmpServer struct{ storm atomic.Bool }

func (s *qmpServer) serve(ln net.Listener) error {
	return each(ln, s.session)
}

func (s *qmpServer) session(c net.Conn) {
	if _, err := c.Write([]byte(greeting)); err != nil {
		return
	}
	var events sync.WaitGroup
	over := make(chan struct{})
	defer events.Wait()
	defer c.Close() // which ends a write of events
	defer close(over)
	d := json.NewDecoder(c)
	for {
		var request struct {
			Execute string          `json:"execute"`
			ID      json.RawMessage `json:"id"`
		}
		if d.Decode(&request) != nil {
			return
		}
		id := ""
		if request.ID != nil {
			id = fmt.Sprintf(`, "id": %s`, request.ID)
		}
		answer := fmt.Sprintf(`{"error": {"class": "CommandNotFound", "desc": "The command %s has not been found"}`, request.Execute)
		var more []byte // without a copy: what is behind the services must not be what is measured
		switch request.Execute {
		case "qmp_capabilities":
			answer = `{"return": {}`
			if s.storm.Load() {
				events.Go(func() { sendEvents(c, over) })
			}
		case "query-status":
			answer = `{"return": {"status": "running", "singlestep": false, "running": true}`
		case vchan.CommandLarge:
			answer, more = `{"return": `, large()
		case vchan.CommandStormOn, vchan.CommandStormOff:
			s.storm.Store(request.Execute == vchan.CommandStormOn)
			answer = `{"return": {}`
		}
		line := net.Buffers{[]byte(answer), more, []byte(id + "}\r\n")}
		if more == nil {
			line = net.Buffers{[]byte(answer + id + "}\r\n")}
		}
		if _, err := line.WriteTo(c); err != nil {
			return
		}
	}
}

// sendEvents sends bursts of events to a session until it is over.
func sendEvents(c net.Conn, over <-chan struct{}) {
	t := time.NewTicker(burstEvery)
	defer t.Stop()
	for {
		if _, err := c.Write(event); err != nil {
			return
		}
		select {
		case <-t.C:
		case <-over:
			return
		}
	}
}
