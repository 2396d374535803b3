"""Patterns of layer names, with wildcards as in file names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase


def check_patterns(
    argument: str, patterns: str | Sequence[str] | None, names: Iterable[str]
) -> list[str] | None:
    """Return ``patterns`` as a list.

    Raises:
        ValueError: a pattern is no string, or matches none of the layers' ``names``.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        patterns = [patterns]
    listed = list(patterns)
    for pattern in listed:
        if not isinstance(pattern, str):
            raise ValueError(f"{argument}: a pattern must be a string, got {pattern!r}")
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches no layer; the layers are "
                f"{', '.join(names) or '(none)'}"
            )
    return listed


def matches(pattern: str, name: str) -> bool:
    """Tell whether ``pattern`` stands for this layer, or for a module that holds it.

    >>> matches("encoder.*", "encoder.conv1"), matches("encoder", "encoder.conv1")
    (True, True)
    """
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def by_pattern(values: Mapping[str, int]) -> dict[str, int]:
    """Return values of layers by patterns that match them in whatever module they are.

    The first pattern that matches counts: the longest name stands first.

    >>> by_pattern({"conv": 3, "blocks.0.conv": 2})
    {'*blocks.0.conv': 2, '*conv': 3}
    """
    return {f"*{name}": values[name] for name in sorted(values, key=lambda x: (-len(x), x))}
