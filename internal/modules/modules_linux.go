// Package modules loads the kernel modules that an image's builder listed.
package modules

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
)

// List is the file that the image's builder made: one module a line in
// load order, its path and then its parameters. A kernel without modules has none.
const List = "/etc/stubinit/modules"

type module struct {
	path, params string
}

func parse(r io.Reader) ([]module, error) {
	var list []module
	s := bufio.NewScanner(r)
	for n := 1; s.Scan(); n++ {
		line := strings.TrimSpace(s.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		path, params, _ := strings.Cut(line, " ")
		if !strings.HasPrefix(path, "/") {
			return nil, fmt.Errorf("%s:%d: %q is not an absolute path", List, n, path)
		}
		list = append(list, module{path, strings.TrimSpace(params)})
	}
	return list, s.Err()
}

// Load loads the list in one pass, and tells log at debug level what each took.
func Load(log *slog.Logger) error {
	f, err := os.Open(List)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	list, err := parse(f)
	if err != nil {
		return err
	}
	for _, m := range list {
		start := time.Now()
		if err := load(m); err != nil {
			return fmt.Errorf("load module %s: %w", m.path, err)
		}
		log.Debug("module loaded", "path", m.path, "took", time.Since(start))
	}
	return nil
}

func load(m module) error {
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
