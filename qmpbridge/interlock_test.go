package qmpbridge

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// What libxl sends of a save or migration, each on a connection of its own.
var saveParts = map[string]string{
	"on":   `{"execute":"xen-set-global-dirty-log","id":7,"arguments":{"enable":true}}`,
	"off":  `{"execute":"xen-set-global-dirty-log","id":7,"arguments":{"enable":false}}`,
	"save": `{"execute":"xen-save-devices-state","id":7,"arguments":{"filename":"/dev/fdset/1","live":false}}`,
	"cont": `{"execute":"cont","id":7}`,
}

// Each step is a save's name, a part, and what becomes of it: "qemu" gets it, the bridge says "ok" itself, or it is
// refused; "fails" is an error of QEMU's.
func TestInterlock(t *testing.T) {
	for _, tt := range []struct{ name, steps string }{
		{"a save", "A:on=qemu A:save=qemu A:off=qemu A:cont=qemu"},
		{"one after the other", "A:on=qemu A:save=qemu A:off=qemu A:cont=qemu B:on=qemu B:save=qemu B:off=qemu B:cont=qemu"},
		{"the later is refused whole", "A:on=qemu A:save=qemu B:on=underway B:cont=notyours A:off=qemu A:cont=qemu"},
		// Xen's log is off, which the earlier may still need.
		{"and spoils the earlier", "A:on=qemu B:on=underway B:cont=notyours A:save=spoiled A:off=qemu A:cont=qemu C:on=qemu C:save=qemu"},
		{"which ends before its state", "A:on=qemu B:on=underway B:cont=notyours A:off=qemu A:cont=qemu C:save=qemu"},
		{"its cont comes late", "A:on=qemu B:on=underway A:save=spoiled B:cont=notyours A:off=qemu A:cont=qemu C:on=qemu C:save=qemu"},
		{"refused while memory is read", "A:on=qemu A:save=qemu B:on=underway B:cont=notyours A:off=qemu A:cont=qemu C:on=qemu C:save=qemu"},
		{"refused when memory has been read", "A:on=qemu A:save=qemu A:off=qemu B:on=underway B:cont=notyours A:cont=qemu C:on=qemu"},
		{"two are refused", "A:on=qemu B:on=underway C:on=underway B:cont=notyours C:cont=notyours A:save=spoiled A:off=qemu A:cont=qemu"},
		{"the earlier fails", "A:on=qemu A:save=fails B:on=underway A:off=qemu B:cont=notyours A:cont=qemu C:on=qemu C:save=qemu"},
		// Whoever comes after the refusal is believed; the log of the first is still counted.
		{"the earlier was killed", "A:on=qemu B:on=underway B:cont=notyours C:on=ok C:save=qemu C:off=ok C:cont=qemu D:on=ok"},
		{"the earlier was not killed", "A:on=qemu B:on=underway B:cont=notyours C:on=ok A:save=qemu C:save=underway C:off=ok C:cont=notyours A:off=qemu A:cont=qemu"},
		{"killed while suspended, and resumed by hand", "A:on=qemu A:save=qemu B:on=underway B:cont=notyours X:cont=qemu C:on=ok"},
		{"a refused one never sends cont", "A:on=qemu A:save=qemu B:on=underway wait A:off=qemu A:cont=qemu"},
		{"a log that is off", "A:off=ok A:off=ok A:on=qemu A:off=qemu A:off=ok"},
		{"QEMU cannot log", "A:on=fails A:cont=qemu B:on=qemu"},
		{"QEMU cannot go on", "A:on=qemu A:save=qemu A:off=qemu A:cont=fails B:on=underway"},
		{"no save", "A:cont=qemu A:cont=qemu"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in(t, Options{Save: &fakeSaver{}}, func(t *testing.T, b *bench) {
				for _, step := range strings.Fields(tt.steps) {
					if step == "wait" {
						time.Sleep(refusedLimit + time.Second)
						continue
					}
					what, want, _ := strings.Cut(step, "=")
					_, part, _ := strings.Cut(what, ":")
					toolstack, qemu := b.session()
					toolstack.send(saveParts[part])
					const good, fails = "{\"return\": {}, \"id\": 7}\r\n", "{\"id\": 7, \"error\": {\"class\": \"GenericError\", \"desc\": \"no\"}}\r\n"
					t.Log(step)
					switch want {
					case "ok":
						toolstack.expect(good)
					case "underway":
						toolstack.expect(errorAnswer("7", errUnderWay.Error()))
					case "notyours":
						toolstack.expect(errorAnswer("7", errNotYours.Error()))
					case "spoiled":
						toolstack.expect(errorAnswer("7", errSpoiled.Error()))
					default:
						answer := map[string]string{"qemu": good, "fails": fails}[want]
						qemu.expect(saveParts[part] + "\n")
						qemu.send(answer)
						toolstack.expect(answer)
					}
					toolstack.Close()
					qemu.expectClose() // and has got nothing else
					synctest.Wait()
				}
			})
		})
	}
}

// Without a Saver, and for commands that only look like a save's, QEMU decides.
func TestInterlockLeavesOthers(t *testing.T) {
	on := saveParts["on"]
	for name, tt := range map[string]struct {
		o    Options
		text string
	}{
		"no saver":   {Options{}, on},
		"no enable":  {Options{Save: &fakeSaver{}}, `{"execute":"xen-set-global-dirty-log"}`},
		"odd enable": {Options{Save: &fakeSaver{}}, `{"execute":"xen-set-global-dirty-log","arguments":{"enable":1}}`},
	} {
		t.Run(name, func(t *testing.T) {
			in(t, tt.o, func(t *testing.T, b *bench) {
				toolstack, qemu := b.session()
				for range 2 {
					toolstack.send(tt.text)
					qemu.expect(tt.text + "\n")
				}
			})
		})
	}
}
