// Command peer is the other end of the test guest's network, on an interface of dom0 (see package peer). It answers
// ARP, ICMP echo and UDP echo while it runs. A command on the command line is run once; without one, commands are read
// from standard input, a line each, until its end. Every command answers with one line, `ok …` or `err …`.
//
//	serve                       answer only, until SIGINT or SIGTERM
//	ping IP [SIZE]              one ICMP echo
//	udp IP SIZE SEED            one datagram to the echo service and back
//	send IP PORT BYTES SEED     bulk transfer of the pattern of SEED
//	recv PORT                   bulk transfer from the other side
//	raw HEX                     send an Ethernet frame
//	frame ETHERTYPE             take a received frame that is neither IP nor ARP
//	frames ETHERTYPE            take all that have been received: their number, and the frames
//	stats                       counts
package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/stubinit/stubinit/test/guest/peer"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out io.Writer) error {
	flags := flag.NewFlagSet("peer", flag.ContinueOnError)
	iface := flags.String("i", "", "interface")
	ip := flags.String("ip", "", "our IPv4 address")
	mac := flags.String("mac", "02:73:74:75:62:01", "our MAC address")
	mtu := flags.Int("mtu", 1500, "MTU")
	limit := flags.Duration("timeout", time.Minute, "limit of each command")
	if err := flags.Parse(args); err != nil {
		return err
	}
	cfg := peer.Config{MTU: *mtu}
	var err error
	if cfg.IP, err = netip.ParseAddr(*ip); err != nil || !cfg.IP.Is4() {
		return fmt.Errorf("-ip %q is no IPv4 address", *ip)
	}
	if cfg.MAC, err = net.ParseMAC(*mac); err != nil || len(cfg.MAC) != 6 {
		return fmt.Errorf("-mac %q is no MAC address", *mac)
	}
	link, err := peer.OpenPacket(*iface)
	if err != nil {
		return err
	}
	host := peer.NewHost(link, cfg)
	defer host.Close()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if flags.NArg() > 0 {
		return answer(ctx, out, host, *limit, flags.Args())
	}
	// One command's failure is told by its line; the next one runs all the same.
	scan := bufio.NewScanner(in)
	scan.Buffer(nil, 64<<10)
	for scan.Scan() && ctx.Err() == nil {
		if words := strings.Fields(scan.Text()); len(words) > 0 {
			answer(ctx, out, host, *limit, words)
		}
	}
	return scan.Err()
}

// answer runs a command and prints its line.
func answer(ctx context.Context, out io.Writer, host *peer.Host, limit time.Duration, words []string) error {
	text, err := execute(ctx, host, limit, words)
	if err != nil {
		fmt.Fprintf(out, "err %s %v\n", words[0], err)
		return err
	}
	fmt.Fprintf(out, "ok %s %s\n", words[0], text)
	return nil
}

var usage = map[string]int{"serve": 0, "ping": 1, "udp": 3, "send": 4, "recv": 1, "raw": 1, "frame": 1, "frames": 1, "stats": 0}

func execute(ctx context.Context, host *peer.Host, limit time.Duration, words []string) (string, error) {
	name, args := words[0], arguments{words: words[1:]}
	if least, ok := usage[name]; !ok {
		return "", errors.New("unknown command")
	} else if len(args.words) < least {
		return "", fmt.Errorf("needs %d arguments", least)
	}
	if name == "serve" {
		select {
		case <-ctx.Done():
			return "", nil
		case <-host.Done():
			return "", errors.New("the interface is gone")
		}
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	switch name {
	case "ping":
		ip, size := args.ip(0), 56
		if len(args.words) > 1 {
			size = int(args.number(1, 16))
		}
		if args.err != nil {
			return "", args.err
		}
		took, err := host.Ping(ctx, ip, size)
		return fmt.Sprintf("us=%d", took.Microseconds()), err
	case "udp":
		ip, size, seed := args.ip(0), args.number(1, 16), args.number(2, 32)
		if args.err != nil {
			return "", args.err
		}
		return fmt.Sprintf("bytes=%d", size), host.Echo(ctx, ip, int(size), seed)
	case "send":
		ip, port, size, seed := args.ip(0), args.number(1, 16), args.number(2, 32), args.number(3, 32)
		if args.err != nil {
			return "", args.err
		}
		t, err := host.Send(ctx, ip, uint16(port), size, seed)
		return transfer(t), err
	case "recv":
		port := args.number(0, 16)
		if args.err != nil {
			return "", args.err
		}
		t, err := host.Receive(ctx, uint16(port))
		return transfer(t), err
	case "raw":
		frame, err := hex.DecodeString(args.words[0])
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("length=%d", len(frame)), host.SendFrame(frame)
	case "frame":
		etherType := args.number(0, 16)
		if args.err != nil {
			return "", args.err
		}
		frame, err := host.Frame(ctx, uint16(etherType))
		return fmt.Sprintf("length=%d hex=%x", len(frame), frame), err
	case "frames":
		etherType := args.number(0, 16)
		if args.err != nil {
			return "", args.err
		}
		frames := host.Frames(uint16(etherType))
		text := fmt.Sprintf("count=%d", len(frames))
		for _, f := range frames {
			text += fmt.Sprintf(" %x", f)
		}
		return text, nil
	default: // stats
		s := host.Stats()
		return fmt.Sprintf("frames=%d arp=%d icmp=%d udp=%d other=%d bad_sum=%d partial_sum=%d malformed=%d unclaimed=%d overrun=%d unsent=%d",
			s.Frames, s.ARP, s.ICMP, s.UDP, s.Other, s.BadChecksum, s.PartialChecksum, s.Malformed, s.Unclaimed, s.Overrun, s.Unsent), nil
	}
}

func transfer(t peer.Transfer) string {
	return fmt.Sprintf("bytes=%d crc=%08x ms=%d resent=%d", t.Bytes, t.CRC, t.Elapsed.Milliseconds(), t.Resent)
}

// arguments parses words and keeps the first error.
type arguments struct {
	words []string
	err   error
}

func (a *arguments) ip(i int) netip.Addr {
	ip, err := netip.ParseAddr(a.words[i])
	if err == nil && !ip.Is4() {
		err = fmt.Errorf("%s is no IPv4 address", a.words[i])
	}
	a.keep(err)
	return ip
}

func (a *arguments) number(i, bits int) uint32 {
	n, err := strconv.ParseUint(a.words[i], 0, bits)
	a.keep(err)
	return uint32(n)
}

func (a *arguments) keep(err error) {
	if a.err == nil {
		a.err = err
	}
}
