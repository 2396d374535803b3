"""Penalties on group norms: their values and proximal steps, as pure functions of tensors."""
