package console

import (
	"context"
	"log/slog"
	"strconv"
	"time"
)

// Prefix starts each of the agent's own lines.
const Prefix = "stubinit"

// A Handler writes slog records as one line each:
//
//	stubinit 1.234567 info step done step=mounts took=1.2ms
//
// The time is seconds since the stubdomain's kernel started, the clock of the kernel's own log lines.
type Handler struct {
	log   *Log
	level slog.Leveler
	now   func() time.Duration
	attrs string // " key=value" of With, ready
	group string // "a.b." of WithGroup
}

// NewHandler makes a handler; now gives the time since boot.
func NewHandler(log *Log, level slog.Leveler, now func() time.Duration) *Handler {
	return &Handler{log: log, level: level, now: now}
}

// Enabled is slog.Handler's.
func (h *Handler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level.Level() }

// Handle is slog.Handler's. It never blocks and never fails.
func (h *Handler) Handle(_ context.Context, r slog.Record) error {
	b := stamp(nil, Prefix, h.now())
	b = append(b, levelName(r.Level)...)
	b = append(b, ' ')
	b = Escape(b, []byte(r.Message))
	b = append(b, h.attrs...)
	r.Attrs(func(a slog.Attr) bool {
		b = appendAttr(b, h.group, a)
		return true
	})
	h.log.Add(b)
	return nil
}

// WithAttrs is slog.Handler's.
func (h *Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	b := []byte(h.attrs)
	for _, a := range attrs {
		b = appendAttr(b, h.group, a)
	}
	c.attrs = string(b)
	return &c
}

// WithGroup is slog.Handler's.
func (h *Handler) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	c := *h
	c.group += name + "."
	return &c
}

func appendAttr(b []byte, group string, a slog.Attr) []byte {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			group += a.Key + "."
		}
		for _, g := range v.Group() {
			b = appendAttr(b, group, g)
		}
		return b
	}
	if a.Key == "" {
		return b
	}
	var s string
	switch v.Kind() {
	case slog.KindDuration:
		s = v.Duration().Round(10 * time.Microsecond).String()
	default:
		s = v.String()
	}
	b = append(b, ' ')
	b = append(b, group...)
	b = append(b, a.Key...)
	b = append(b, '=')
	return append(b, quote(s)...)
}

func levelName(l slog.Level) string {
	switch {
	case l < slog.LevelInfo:
		return "debug"
	case l < slog.LevelWarn:
		return "info"
	case l < slog.LevelError:
		return "warn"
	}
	return "error"
}

// stamp appends "source seconds.micros ".
func stamp(b []byte, source string, t time.Duration) []byte {
	b = append(b, source...)
	b = append(b, ' ')
	b = strconv.AppendFloat(b, t.Seconds(), 'f', 6, 64)
	return append(b, ' ')
}
