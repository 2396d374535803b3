"""Lightning: the callback, and all else that knows it; nothing outside of this package does."""
