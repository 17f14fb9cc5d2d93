package main

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/stubinit/stubinit/initramfs/initramfstest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"mkinitramfs": func() {
			os.Exit(mkinitramfs(context.Background(), os.Args[1:], os.Stdout, os.Stderr))
		},
	})
}

func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			// A small Debian in root, its manifest, and a static init.
			files := map[string]string{
				"manifest": initramfstest.DebianManifest,
				"stubinit": string(initramfstest.ELF{}.Bytes()),
			}
			if err := initramfstest.WriteTree(env.WorkDir, files); err != nil {
				return err
			}
			return initramfstest.WriteTree(filepath.Join(env.WorkDir, "root"), initramfstest.Debian())
		},
	})
}
