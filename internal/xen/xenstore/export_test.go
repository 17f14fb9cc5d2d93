package xenstore

// OpenPath is Open for another device.
func OpenPath(path string) (*Client, error) { return open(path) }

// Waiting is the number of requests without an answer.
func (c *Client) Waiting() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.calls)
}
