"""Weights that FSDP2 shards over processes end like those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import processes
from tests.scripts.fsdp2_plain import CASES, FREEZE, HALF, STEPS, Network, resumed, train, work

pytestmark = pytest.mark.processes
# Placements with three or more processes, or along other axes, with one case of every kind.
FEWER = ("columns", "tiles", "coupled", "global", "metric")
ON_TWO = [
    *(("rows", case) for case in CASES),
    *(("columns", case) for case in FEWER),
    *(("ignored", case) for case in ("coupled", "metric")),
]
ON_FOUR = [
    (placement, case) for placement in ("rows", "hybrid", "tensor parallel") for case in FEWER
]


def run(count: int, tasks: list[tuple[str, str]], folder: Path) -> dict[tuple[str, str], Any]:
    processes.run(work, (count, tasks, str(folder)), count)
    return {
        task: [torch.load(folder / f"{number}.{rank}", weights_only=True) for rank in range(count)]
        for number, task in enumerate(tasks)
    }


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    return run(2, ON_TWO, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    return run(4, ON_FOUR, tmp_path_factory.mktemp("four"))


def check(found: list[Any], case: str) -> None:
    arguments, sums = CASES[case]
    alone = train(Network(), arguments)
    assert alone["frozen"]
    assert any(not mask.all() for mask in alone["masks"].values())
    for rank in found:
        assert rank["frozen"]
        assert rank["printed"] == alone["printed"]
        for name, mask in alone["masks"].items():
            assert torch.equal(rank["masks"][name], mask), name
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-9, atol=1e-12)
            assert torch.equal(rank["weights"][name] == 0, weight == 0), name
        for name, moment in alone["moments"].items():  # those of dead groups were cleared once
            torch.testing.assert_close(rank["moments"][name], moment, rtol=1e-9, atol=1e-12)
        for name, value in alone["metrics"].items():
            assert rank["metrics"][name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
        # Norms are summed once a step (in the first one also those to tell a collapse by), and no
        # more once there is a mask.
        assert 0 < rank["sums"][0] <= sums + 1
        end = FREEZE - 2  # who is cut is counted before and where the mask is fixed
        assert set(rank["sums"][1:end] + rank["sums"][FREEZE:]) <= set(range(sums + 1))
        assert all(number <= sums + 1 for number in rank["sums"][end:FREEZE])
        assert rank["sums"][-1] == 0
        assert rank["sums"] == found[0]["sums"]


@pytest.mark.parametrize(("placement", "case"), ON_TWO)
def test_two_processes_end_like_one(on_two: Any, placement: str, case: str) -> None:
    check(on_two[placement, case], case)


@pytest.mark.sweep
@pytest.mark.parametrize(("placement", "case"), ON_FOUR)
def test_four_processes_end_like_one(on_four: Any, placement: str, case: str) -> None:
    """fc2 has three rows: one process holds none of it."""
    check(on_four[placement, case], case)


def test_resumed_on_another_number_of_processes(tmp_path: Path) -> None:
    arguments = CASES["coupled"][0]
    network = Network()
    first = train(network, arguments, range(HALF))
    torch.save({name: first[name] for name in ("weights", "state")}, tmp_path / "first")
    alone = train(network, arguments, range(HALF, STEPS), first["state"])
    count = 3
    processes.run(resumed, (count, "coupled", str(tmp_path)), count)
    for rank in range(count):
        found = torch.load(tmp_path / f"second.{count}.{rank}", weights_only=True)
        assert found["frozen"]
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], weight, rtol=1e-9, atol=1e-12)
