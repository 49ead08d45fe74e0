"""Hot operations: a name, a reference in plain torch, and overrides where a device has better."""
