"""The engine: schedule, execute, commit. Knows sequences and blocks, not roles."""
