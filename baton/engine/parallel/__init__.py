"""Several ranks as one engine: axes, collectives, exchanges of experts' tokens, rank processes."""
