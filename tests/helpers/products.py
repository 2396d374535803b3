"""Products of parameters, and lists of cases, of which the tests run what meets all values."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import pytest


def every_pair(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by a product; ``make sweep`` runs what no pair of values needs.

    Faults of one parameter, or of two together, are met by the cases that always run.

    >>> mark = every_pair(a=[0, 1], b=[0, 1], c=[0, 1])
    >>> [case.values for case in mark.args[1] if not case.marks]
    [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]
    """
    numbers = list(itertools.product(*(range(len(values)) for values in axes.values())))
    chosen = _covering(numbers, 2)
    values = [[x[i] for x, i in zip(axes.values(), case, strict=True)] for case in numbers]
    return _marked(tuple(axes), values, [case in chosen for case in numbers])


def every_value(names: str, cases: Iterable[tuple[Hashable, ...]]) -> pytest.MarkDecorator:
    """Parametrize a test by cases; ``make sweep`` runs those whose values others meet.

    >>> mark = every_value("network, grouping", itertools.product("abcd", [1, 2]))
    >>> [case.values for case in mark.args[1] if not case.marks]
    [('a', 1), ('b', 2), ('c', 1), ('d', 2)]
    """
    cases = list(cases)
    chosen = _covering(cases, 1)
    return _marked(names, cases, [case in chosen for case in cases])


def _covering(cases: Sequence[tuple[Hashable, ...]], together: int) -> set[tuple[Hashable, ...]]:
    """Cases that meet as many values together as all do.

    In turn the one with the most new; of several, whose values were met the fewest times.
    """
    met = {case: set(itertools.combinations(enumerate(case), together)) for case in cases}
    missing, chosen = set().union(*met.values()), set()
    times = Counter[Hashable]()

    def gain(case: tuple[Hashable, ...]) -> tuple[int, int]:
        return len(met[case] & missing), -sum(times[values] for values in met[case])

    while missing:
        case = max(cases, key=gain)
        missing -= met[case]
        times.update(met[case])
        chosen.add(case)
    return chosen


def _marked(
    names: str | tuple[str, ...], cases: Iterable[Iterable[Any]], always: Iterable[bool]
) -> pytest.MarkDecorator:
    """All cases; of which some are for ``make sweep``."""
    params = [
        pytest.param(*case, marks=() if runs else pytest.mark.sweep)
        for case, runs in zip(cases, always, strict=True)
    ]
    return pytest.mark.parametrize(names, params)
