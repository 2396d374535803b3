"""The callback and all else that knows Lightning; nothing outside of this package does."""
