"""Training: what follows every step of an optimizer, from the proximal step to the freeze."""
