"""A physically smaller network without its zero groups, proved equivalent."""
