"""Cache of a processor: how much of a tensor is worked on at a time."""

# Numbers of float32 that fill 1 MiB, which the second-level cache of a core holds. Where several
# tensors of a kind are needed at once, or float64, half of it is taken. Sums are formed chunk by
# chunk: another number would change the last bits of large networks.
CACHED = 2**18
