"""The same checkpoint in several engines, each in a process of its own."""
