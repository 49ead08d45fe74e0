"""Public protos."""
