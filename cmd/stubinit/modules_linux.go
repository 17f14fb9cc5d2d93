package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/xen/privcmd"
)

// modulesFile is the list that the image's builder made: one module a line in
// load order, its path and then its parameters. A kernel without modules has none.
const modulesFile = "/etc/stubinit/modules"

type module struct {
	path, params string
}

func parseModules(r io.Reader) ([]module, error) {
	var list []module
	s := bufio.NewScanner(r)
	for n := 1; s.Scan(); n++ {
		line := strings.TrimSpace(s.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		path, params, _ := strings.Cut(line, " ")
		if !strings.HasPrefix(path, "/") {
			return nil, fmt.Errorf("%s:%d: %q is not an absolute path", modulesFile, n, path)
		}
		list = append(list, module{path, strings.TrimSpace(params)})
	}
	return list, s.Err()
}

// loadModules loads the list in one pass.
func loadModules(log *slog.Logger) error {
	f, err := os.Open(modulesFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	list, err := parseModules(f)
	if err != nil {
		return err
	}
	for _, m := range list {
		start := time.Now()
		if err := loadModule(m); err != nil {
			return hint(fmt.Errorf("load module %s: %w", m.path, err), "kernel and initrd must come from one mkinitramfs run")
		}
		log.Debug("module loaded", "path", m.path, "took", time.Since(start))
	}
	return nil
}

func loadModule(m module) error {
	fd, err := unix.Open(m.path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	flags := 0
	if !strings.HasSuffix(m.path, ".ko") { // .ko.xz, .ko.zst: CONFIG_MODULE_DECOMPRESS
		flags = unix.MODULE_INIT_COMPRESSED_FILE
	}
	if err := unix.FinitModule(fd, m.params, flags); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return nil
}

// xenDevices are what QEMU and we cannot do without, each with the module that makes it.
var xenDevices = []struct{ path, module string }{
	{"/dev/xen/privcmd", "xen-privcmd"},
	{"/dev/xen/evtchn", "xen-evtchn"},
	{"/dev/xen/gntalloc", "xen-gntalloc"},
	{"/dev/xen/gntdev", "xen-gntdev"},
}

func checkXenDevices(root string) error {
	var missing []string
	for _, d := range xenDevices {
		if _, err := os.Stat(root + d.path); err != nil {
			missing = append(missing, fmt.Sprintf("%s (module %s)", d.path, d.module))
		}
	}
	if missing != nil {
		return hint(fmt.Errorf("missing %s", strings.Join(missing, ", ")),
			"the module is not in the image (mkinitramfs -list shows what is) or not built into the kernel")
	}
	return nil
}

// checkUnrestricted finds out before QEMU does whether privcmd is restricted to what QEMU cannot start with.
func checkUnrestricted() error {
	f, err := privcmd.Open()
	if err != nil {
		return err
	}
	defer f.Close()
	restricted, err := f.Restricted()
	if err != nil {
		return err
	}
	if restricted {
		return hint(errors.New("/dev/xen/privcmd is restricted (XSA-482): QEMU could not create its ioreq server"),
			"add xen_privcmd.unrestricted=1 to stubdomain_cmdline in xl.cfg, or unrestricted=1 to the module in the image's manifest")
	}
	return nil
}
