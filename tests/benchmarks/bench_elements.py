"""Single weights: against torch.topk and against sorting; growth and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_wgsef import GroupedLayer, Groups, Member, prox_multipliers
from tests.benchmarks.measure import Rounds, add_row, once
from tests.benchmarks.steps import HOMOTOPY, VARIANTS, groups_step, prox_by_sorting

CASE = "single weights"
LARGE = pytest.param(8, marks=pytest.mark.large)


def vector(size: int) -> Tensor:
    return torch.empty(size).normal_(generator=torch.Generator().manual_seed(0))


def elements(values: Tensor) -> Groups:
    member = Member("values", values, (0,))
    count = len(values)
    return Groups([GroupedLayer("all", "element", count, (member,), budget=count // 10)])


TOPK = {
    "torch.topk of a tenth (sorted=True, its default)": True,
    "torch.topk of a tenth, sorted=False": False,
}


def topk(values: Tensor) -> dict[str, Callable[[], Any]]:
    tenth = len(values) // 10
    return {
        name: lambda in_order=order: values.topk(tenth, sorted=in_order)
        for name, order in TOPK.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_against_topk(benchmark: Any, variant: str) -> None:
    values = vector(10**7)
    original = values.clone()
    measured = Rounds(
        benchmark,
        {"step": groups_step(elements(values), variant), **topk(values)},
        before=lambda: values.copy_(original),
        rounds=9,
        warmup=1,
    )
    for name in TOPK:
        measured.row(
            "step",
            name,
            target=1,
            case=CASE,
            name="10^7 numbers",
            floor=name,
            what=f"norms, multipliers, scaling: {variant}",
        )


@pytest.mark.large
def test_large_against_topk_and_growth(benchmark: Any) -> None:
    values, few = vector(10**8), vector(10**7)
    originals = values.clone(), few.clone()
    small = "the step on 10^7 numbers"
    measured = Rounds(
        benchmark,
        {
            "step": groups_step(elements(values), HOMOTOPY),
            small: groups_step(elements(few), HOMOTOPY),
            **topk(values),
        },
        before=lambda: (values.copy_(originals[0]), few.copy_(originals[1])),
        rounds=3,
        warmup=1,
    )
    for name, target in {**dict.fromkeys(TOPK, 1), small: 12}.items():
        measured.row(
            "step",
            name,
            target=target,
            case=CASE,
            name="10^8 numbers",
            floor=name,
            what=f"norms, multipliers, scaling: {HOMOTOPY}",
        )


@pytest.mark.parametrize("power", [7, LARGE])
def test_against_sorting(benchmark: Any, power: int) -> None:
    settings = VARIANTS[HOMOTOPY]
    check_sorting(settings)
    values = vector(10**power)
    original = values.clone()
    tenth = len(values) // 10
    measured = Rounds(
        benchmark,
        {
            "step": groups_step(elements(values), HOMOTOPY),
            "sorting": lambda: prox_by_sorting(values, k=tenth, **settings),
        },
        before=lambda: values.copy_(original),
        rounds={7: 5, 8: 2}[power],
        warmup=1 if power == 7 else 0,
    )
    measured.row(
        "step",
        "sorting",
        target=1,
        case=CASE,
        name=f"10^{power} numbers",
        what=f"norms, multipliers, scaling: {HOMOTOPY}",
        floor="the same step by torch.sort, prefix sums and bisection",
    )


def check_sorting(settings: dict[str, Any]) -> None:
    values = vector(10**5)
    wanted = values * prox_multipliers(values.abs(), k=10**4, **settings)
    prox_by_sorting(values, k=10**4, **settings)
    torch.testing.assert_close(values, wanted, rtol=1e-4, atol=1e-6)


WEIGHED = {
    "function": "peak of |v|, prox_multipliers, v.mul_ beyond v",
    "step": "peak of Groups.norms, prox_multipliers, Groups.scale_ beyond v and Groups",
    "groups": "peak of building Groups of single weights beyond v",
    "kept": "what Groups of single weights keep beyond v",
}


@pytest.mark.large
@pytest.mark.parametrize("kind", WEIGHED)
def test_memory(benchmark: Any, kind: str) -> None:
    script = Path(__file__).with_name("peak_memory.py")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, str(script), kind, str(10**8)]

    def child() -> float:
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return float(json.loads(run.stdout)["vectors"])

    add_row(
        benchmark,
        value=once(benchmark, child),
        case=CASE,
        name="memory at 10^8",
        what=WEIGHED[kind],
        floor="the vector's own bytes",
        target=2.5 if kind in ("function", "step") else None,
    )
