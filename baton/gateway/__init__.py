"""The front door: HTTP and gRPC, tokenizer, token streams, journal."""
