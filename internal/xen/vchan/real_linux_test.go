package vchan

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/internal/xen/evtchn"
	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/internal/xen/xenstore/xenstoretest"
)

// TestPublish: what the toolstack finds in xenstore, and who may read it.
func TestPublish(t *testing.T) {
	store := xenstoretest.New(t)
	client := store.Dial(8)
	defer client.Close()
	x := &xen{cfg: Config{Client: 0, Path: "device-model/7/qmp-vchan", Store: client}, self: 8}
	const path = "/local/domain/8/device-model/7/qmp-vchan"
	for _, v := range []struct {
		ref, port       uint32
		refNode, portNo string
	}{{101, 11, "101", "11"}, {4294967295, 12, "4294967295", "12"}} {
		if err := x.Publish(t.Context(), v.ref, v.port); err != nil {
			t.Fatal(err)
		}
		for node, want := range map[string]string{"ring-ref": v.refNode, "event-channel": v.portNo} {
			if got, ok := store.Get(path + "/" + node); !ok || got != want {
				t.Errorf("%s is %q, want %q", node, got, want)
			}
			if diff := cmp.Diff([]string{"n8", "r0"}, store.Perms(path+"/"+node)); diff != "" {
				t.Errorf("permissions of %s (-want +got):\n%s", node, diff)
			}
		}
	}
	if err := x.Unpublish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, ok := store.Get(path + "/ring-ref"); ok {
		t.Error("ring-ref is still there")
	}
	if err := x.Unpublish(t.Context()); err != nil {
		t.Errorf("second Unpublish: %v", err)
	}
}

// TestPublishFails: the error names the node.
func TestPublishFails(t *testing.T) {
	store := xenstoretest.New(t)
	client := store.Dial(8)
	client.Close()
	x := &xen{cfg: Config{Path: "device-model/7/qmp-vchan", Store: client}, self: 8}
	if err := x.Publish(t.Context(), 1, 2); err == nil {
		t.Error("no error from a closed xenstore")
	}
	if err := x.Unpublish(t.Context()); err == nil || !strings.Contains(err.Error(), "device-model/7/qmp-vchan") {
		t.Errorf("%v, want the path", err)
	}
}

// TestListenWithoutXen: without event channels the error says what is missing.
func TestListenWithoutXen(t *testing.T) {
	store := xenstoretest.New(t)
	client := store.Dial(8)
	defer client.Close()
	cfg := Config{Path: "device-model/7/qmp-vchan", Store: client}

	_, err := Listen(t.Context(), cfg)
	var xe *xenstore.Error
	if !errors.As(err, &xe) || xe.Path != "domid" || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v, want that node domid is missing", err)
	}
	store.Set("/local/domain/8/domid", "x")
	if _, err := Listen(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "node domid") {
		t.Errorf("%v, want that node domid is bad", err)
	}
	if _, err := os.Stat(evtchn.Device); err == nil {
		return // under Xen: the lab listens
	}
	store.Set("/local/domain/8/domid", "8")
	if _, err := Listen(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), evtchn.Device) {
		t.Errorf("%v, want %s", err, evtchn.Device)
	}
}
