"""Solvers for the multiplier that spends a budget exactly; one algorithm a file."""
