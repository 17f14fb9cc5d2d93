package peer

import (
	"encoding/binary"
	"hash/crc32"
)

// Pattern fills b with the guest's test pattern for seed, starting at byte off of the stream: little-endian 32-bit
// words, each a hash of the seed and the word's index (pattern_word in ../src/lib.c). A disk's stream starts at LBA 0,
// a transfer's at its first byte.
func Pattern(seed uint32, off uint64, b []byte) {
	var word [4]byte
	for len(b) > 0 {
		binary.LittleEndian.PutUint32(word[:], patternWord(seed, uint32(off/4)))
		n := copy(b, word[off%4:])
		b = b[n:]
		off += uint64(n)
	}
}

func patternWord(seed, index uint32) uint32 {
	x := seed*0x9e3779b1 + index
	x = (x ^ x>>16) * 0x85ebca6b
	x = (x ^ x>>13) * 0xc2b2ae35
	return x ^ x>>16
}

// PatternCRC is the CRC-32 (IEEE) of size bytes of the pattern from byte off on.
func PatternCRC(seed uint32, off, size uint64) uint32 {
	var crc uint32
	chunk := make([]byte, 64<<10)
	for size > 0 {
		part := chunk[:min(size, uint64(len(chunk)))]
		Pattern(seed, off, part)
		crc = crc32.Update(crc, crc32.IEEETable, part)
		off += uint64(len(part))
		size -= uint64(len(part))
	}
	return crc
}
