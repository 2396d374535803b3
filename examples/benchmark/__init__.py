"""WGSEF and its rivals side by side: ``python -m examples.benchmark --suite cpu``."""
