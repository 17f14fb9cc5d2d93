// Package faults holds what the tests of faults need beside the code under test.
package faults

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

const matrix = "docs/faults.md"

// testName is a test's place in the matrix: `folder TestName/scenario/…`.
var testName = regexp.MustCompile("`([a-z0-9/]+) ((?:Test|Fuzz)[^`/]+)((?:/[^`]+)?)`")

// Every row of the matrix names tests, and all of them exist.
func TestMatrix(t *testing.T) {
	const top = "../.."
	text, err := os.ReadFile(filepath.Join(top, matrix))
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]names{}
	rows := 0
	for i, line := range strings.Split(string(text), "\n") {
		cells := strings.Split(line, "|")
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(line, "| fault ") || strings.HasPrefix(line, "| ---") {
			continue
		}
		rows++
		if len(cells) != 6 {
			t.Errorf("%s:%d: %d columns, want 4", matrix, i+1, len(cells)-2)
			continue
		}
		tests := testName.FindAllStringSubmatch(cells[4], -1)
		if rest := strings.Trim(testName.ReplaceAllString(cells[4], ""), " ,"); len(tests) == 0 || rest != "" {
			t.Errorf("%s:%d: the last column is not a list of `folder TestName/scenario`: %q", matrix, i+1, rest)
		}
		for _, m := range tests {
			dir, name, scenarios := m[1], m[2], strings.Split(m[3], "/")[1:]
			if names[dir] == nil {
				names[dir] = declared(t, filepath.Join(top, dir))
			}
			literals, ok := names[dir][name]
			if !ok {
				t.Errorf("%s:%d: %s has no %s", matrix, i+1, dir, name)
				continue
			}
			for _, s := range scenarios {
				if s != "" && !literals[s] {
					t.Errorf("%s:%d: %s in %s has no scenario %q", matrix, i+1, name, dir, s)
				}
			}
		}
	}
	if rows < 20 {
		t.Errorf("%s has only %d rows", matrix, rows)
	}
}

// names maps a folder's test functions, with any build tag, to the strings in each.
type names map[string]map[string]bool

func declared(t *testing.T, dir string) names {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	found := names{}
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || f.Recv != nil {
				continue
			}
			literals := map[string]bool{}
			ast.Inspect(f, func(n ast.Node) bool {
				if lit, ok := n.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					if s, err := strconv.Unquote(lit.Value); err == nil {
						literals[s] = true
					}
				}
				return true
			})
			found[f.Name.Name] = literals
		}
	}
	return found
}
