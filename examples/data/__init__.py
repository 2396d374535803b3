"""Data sets of the examples and the benchmark."""
