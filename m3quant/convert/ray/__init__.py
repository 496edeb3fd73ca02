"""Conversion over the GPUs of a Ray cluster."""
