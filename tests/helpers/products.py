"""Products of parameters of which the tests run enough that every two values meet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def every_pair(**axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by a product; ``make sweep`` runs what no pair of values needs.

    Faults of one parameter, or of two together, are met by the cases that always run: the ones with
    the most pairs that were not there before, one after another.

    >>> mark = every_pair(a=[0, 1], b=[0, 1], c=[0, 1])
    >>> [case.values for case in mark.args[1] if not case.marks]
    [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]
    """
    cases = list(itertools.product(*(range(len(values)) for values in axes.values())))
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    missing, chosen = set().union(*pairs.values()), set()
    while missing:
        case = max(cases, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[case]
        chosen.add(case)
    marked = [
        pytest.param(
            *(values[number] for values, number in zip(axes.values(), case, strict=True)),
            marks=() if case in chosen else pytest.mark.sweep,
        )
        for case in cases
    ]
    return pytest.mark.parametrize(tuple(axes), marked)
