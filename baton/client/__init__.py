"""Client library for applications and tools."""
