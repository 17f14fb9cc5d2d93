package netup

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
)

// tapArg is one `-netdev tap` of dm-argv that names its link.
type tapArg struct {
	id     string // netdev id, "net0"
	ifname string
}

// nicArg is one `-device` of dm-argv that uses a netdev.
type nicArg struct {
	id     string // device id, "nic0"; may be empty
	driver string
	netdev string
	mac    net.HardwareAddr // nil when QEMU chooses one
}

// parseArgv finds the taps and the NICs in QEMU's arguments. Options that are neither are passed over; what QEMU itself
// would refuse in the ones that matter here (no id, an id twice) is an error, since QEMU would exit on it later.
func parseArgv(argv []string) (taps []tapArg, nics []nicArg, err error) {
	netdevs := make(map[string]bool)
	for i := 0; i+1 < len(argv); i++ {
		opt, isOpt := strings.CutPrefix(argv[i], "-")
		if !isOpt {
			continue
		}
		switch strings.TrimPrefix(opt, "-") { // QEMU takes --netdev too
		case "name": // its value is the guest's name, which may look like an option
			i++
		case "netdev":
			i++
			kv, err := parseOption(argv[i], "type")
			if err != nil {
				return nil, nil, fmt.Errorf("parse -netdev %q: %w", argv[i], err)
			}
			if kv["id"] == "" {
				return nil, nil, fmt.Errorf("parse -netdev %q: it has no id", argv[i])
			}
			if netdevs[kv["id"]] {
				return nil, nil, fmt.Errorf("parse -netdev %q: id %q is used twice", argv[i], kv["id"])
			}
			netdevs[kv["id"]] = true
			// Without ifname= the tap is a descriptor that QEMU gets, or one that it names itself: nothing to make.
			if kv["type"] != "tap" || kv["ifname"] == "" {
				continue
			}
			taps = append(taps, tapArg{id: kv["id"], ifname: kv["ifname"]})
		case "device":
			i++
			kv, err := parseOption(argv[i], "driver")
			if err != nil {
				return nil, nil, fmt.Errorf("parse -device %q: %w", argv[i], err)
			}
			if kv["netdev"] == "" {
				continue
			}
			nic := nicArg{id: kv["id"], driver: kv["driver"], netdev: kv["netdev"]}
			if s := kv["mac"]; s != "" {
				if nic.mac, err = parseMAC(s); err != nil {
					return nil, nil, fmt.Errorf("parse -device %q: %w", argv[i], err)
				}
			}
			nics = append(nics, nic)
		}
	}
	return taps, nics, nil
}

// parseOption reads the value of a QEMU option: JSON if it starts with '{', otherwise key=value pairs between commas, where
// ",," stands for a comma, the first pair may leave out its key (then it is implied), and the last of equal keys counts
// (QEMU, docs of QemuOpts in util/qemu-option.c, and of -device and -netdev in qemu-options.hx).
func parseOption(s, implied string) (map[string]string, error) {
	if strings.HasPrefix(s, "{") {
		return parseJSON(s)
	}
	kv := make(map[string]string)
	for first := true; s != ""; first = false {
		key, rest, hasValue := s, "", false
		if end := strings.IndexAny(s, "=,"); end >= 0 {
			key, rest, hasValue = s[:end], s[end+1:], s[end] == '='
		}
		switch {
		case hasValue:
			s = rest
			kv[key], s = cutValue(s)
		case first:
			kv[implied], s = cutValue(s)
		default: // a bare key is a switch that is on
			kv[key], s = "on", rest
		}
		if key == "" && hasValue {
			return nil, errors.New("a value without a key")
		}
	}
	return kv, nil
}

// cutValue returns the value at the start of s, unescaped, and what comes after the comma that ends it.
func cutValue(s string) (value, rest string) {
	var b strings.Builder
	for {
		i := strings.IndexByte(s, ',')
		if i < 0 {
			b.WriteString(s)
			return b.String(), ""
		}
		b.WriteString(s[:i])
		if s = s[i+1:]; !strings.HasPrefix(s, ",") {
			return b.String(), s
		}
		b.WriteByte(',')
		s = s[1:]
	}
}

// parseJSON reads the JSON form of an option. Only scalar members matter here; the others are left out.
func parseJSON(s string) (map[string]string, error) {
	var members map[string]any
	if err := json.Unmarshal([]byte(s), &members); err != nil {
		return nil, err
	}
	kv := make(map[string]string, len(members))
	for key, value := range members {
		switch v := value.(type) {
		case string:
			kv[key] = v
		case bool:
			kv[key] = map[bool]string{false: "off", true: "on"}[v]
		case float64:
			kv[key] = strconv.FormatFloat(v, 'f', -1, 64)
		}
	}
	return kv, nil
}

// parseMAC reads a 48-bit address; net.ParseMAC takes longer ones too.
func parseMAC(s string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(s)
	if err == nil && len(mac) != 6 {
		err = &net.AddrError{Err: "not a 48-bit MAC address", Addr: s}
	}
	if err != nil {
		return nil, err
	}
	return mac, nil
}
