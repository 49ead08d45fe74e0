"""Generated gRPC stubs and their conversions to the vocabulary."""
