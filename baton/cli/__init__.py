"""The `baton` command: the only place that knows all parts."""
