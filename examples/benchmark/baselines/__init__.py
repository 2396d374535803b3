"""Other methods, as the benchmark runs them."""
