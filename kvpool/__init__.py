"""The KV pool: layouts, arenas, leases, transports, the pool node."""
