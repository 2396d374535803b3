"""Utilities of every package: validation of arguments, files, tables."""
