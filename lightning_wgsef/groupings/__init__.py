"""Functions from a module to groups, one file per family, and the registry of their names."""
