"""Networks of the examples and the benchmark."""
