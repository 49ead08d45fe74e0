"""Model families: their configuration and tensors (no torch), and their forward passes."""
