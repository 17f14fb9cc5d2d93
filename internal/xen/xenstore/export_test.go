package xenstore

// OpenPath is Open for another device.
func OpenPath(path string) (*Client, error) { return open(path) }

// Requests returns how many requests wait for their turn and which one has it.
func (c *Client) Requests() (queued int, wire string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.onWire != nil {
		wire = c.onWire.String()
	}
	return len(c.queue), wire
}
