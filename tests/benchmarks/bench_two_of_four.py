"""2-of-4 blocks of weights, against one in-place product."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_wgsef import prox_multipliers
from tests.benchmarks.bench_elements import LARGE, vector
from tests.benchmarks.measure import Rounds


@pytest.mark.parametrize("power", [7, LARGE])
def test_two_of_four(benchmark: Any, power: int) -> None:
    values = vector(10**power)
    original = values.clone()

    def step(anchored: bool) -> None:
        factors = prox_multipliers(values.abs(), 0.05, 2, segments=4, debias=1.0, anchored=anchored)
        values.mul_(factors)

    measured = Rounds(
        benchmark,
        {
            "anchored": lambda: step(True),
            "exact": lambda: step(False),
            "product": lambda: values.mul_(1.0000001),
        },
        before=lambda: values.copy_(original),
        rounds={7: 9, 8: 3}[power],
        warmup=1,
    )
    for kind in ("anchored", "exact"):
        measured.row(
            kind,
            "product",
            target=4,
            case="two of four",
            name=f"10^{power} weights",
            what=f"|v|, multipliers (debias 1, {kind}), product",
            floor="v.mul_(1.0000001)",
        )
