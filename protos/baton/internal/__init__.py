"""Protos between the parts of a cluster."""
