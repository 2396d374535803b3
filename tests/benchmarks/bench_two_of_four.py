"""2-of-4 blocks of weights, against one in-place product; operation by operation, and compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from lightning_wgsef import prox_multipliers
from lightning_wgsef.utils import fusion
from tests.benchmarks.bench_elements import LARGE, vector
from tests.benchmarks.measure import Rounds, add_row, once

CASE = "two of four"
# From how many numbers on a step is compiled.
FORMS = {"eager": 2**60, "compiled": 0}
KINDS: dict[str, dict[str, Any]] = {
    "anchored": {"k": 2, "anchored": True},
    "exact": {"k": 2},
    "anchored, K = 2.5 as on the way to 2": {"k": 2.5, "anchored": True},
    "the projection": {"k": 2, "step": 1.0},
}


def two_of_four(values: Tensor, kind: str, form: str) -> Callable[[], None]:
    """Norms, multipliers, scaling."""

    def step() -> None:
        fusion.LEAST = FORMS[form]
        settings = {"step": 0.05, "debias": 1.0, **KINDS[kind]}
        values.mul_(prox_multipliers(values.abs(), segments=4, **settings))

    return step


@pytest.fixture(autouse=True)
def threshold() -> Any:
    least = fusion.LEAST
    yield
    fusion.LEAST = least


@pytest.mark.parametrize("power", [7, LARGE])
def test_two_of_four(benchmark: Any, power: int) -> None:
    values = vector(10**power)
    original = values.clone()
    steps = {(kind, form): two_of_four(values, kind, form) for kind in KINDS for form in FORMS}
    measured = Rounds(
        benchmark,
        {
            **{", ".join(key): step for key, step in steps.items()},
            "product": lambda: values.mul_(1.0000001),
        },
        before=lambda: values.copy_(original),
        rounds={7: 9, 8: 3}[power],
        warmup=1,
    )
    for kind, form in steps:
        measured.row(
            f"{kind}, {form}",
            "product",
            target=6 if form == "compiled" else None,
            case=CASE,
            name=f"10^{power} weights",
            what=f"|v|, multipliers (debias 1, {kind}), product: {form}",
            floor="v.mul_(1.0000001)",
        )


FIRST = """
import json, time
from tests.benchmarks.bench_elements import vector
from tests.benchmarks.bench_two_of_four import two_of_four
values, seconds = vector(10**7), {}
for form in ("eager", "eager", "compiled", "compiled"):
    start = time.perf_counter()
    two_of_four(values, "anchored", form)()
    seconds.setdefault(form, []).append(time.perf_counter() - start)
print(json.dumps(seconds))
"""


@pytest.mark.parametrize("kept", ["nothing", "the kernels of an earlier run"])
def test_first_step(benchmark: Any, kept: str, tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}

    def child() -> dict[str, list[float]]:
        run = subprocess.run(
            [sys.executable, "-c", FIRST],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(run.stdout.splitlines()[-1])

    if kept != "nothing":
        child()
    seconds = once(benchmark, child)
    first, eager = seconds["compiled"][0], seconds["eager"][1]
    add_row(
        benchmark,
        value=first / eager,
        seconds=first,
        floor_seconds=eager,
        case=CASE,
        name="10^7 weights",
        what=f"the first compiled step; kept on disk: {kept}",
        floor="the same step, eager",
    )
