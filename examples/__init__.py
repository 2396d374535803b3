"""Data, networks and benchmarks for lightning-wgsef; never imported by the package."""
