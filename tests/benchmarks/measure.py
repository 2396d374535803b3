"""Ratios of times measured interleaved, and the rows of the table that they become."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

Action = Callable[[], Any]


class Rounds:
    """Every action once a round, round after round, so that what disturbs one disturbs all.

    pytest-benchmark counts the rounds and times the first action; the others are timed just before
    it in every round.

    Args:
        benchmark: pytest-benchmark's fixture.
        actions: what is timed, by name.
        before: called before every action, not timed.
        each_round: called once at the start of every round, not timed.
        rounds: how many are measured.
        warmup: how many come first and are dropped.
    """

    def __init__(
        self,
        benchmark: Any,
        actions: dict[str, Action],
        *,
        before: Action | None = None,
        each_round: Action | None = None,
        rounds: int = 15,
        warmup: int = 2,
    ) -> None:
        self.benchmark = benchmark
        first, *others = actions
        times: dict[str, list[float]] = {name: [] for name in others}

        def prepare() -> None:
            if each_round is not None:
                each_round()
            for name in others:
                if before is not None:
                    before()
                start = time.perf_counter()
                actions[name]()
                times[name].append(time.perf_counter() - start)
            if before is not None:
                before()

        gc.collect()
        gc.disable()
        try:
            benchmark.pedantic(actions[first], setup=prepare, rounds=rounds, warmup_rounds=warmup)
        finally:
            gc.enable()
        measured = slice(warmup, warmup + rounds)
        self.seconds = {name: kept[measured] for name, kept in times.items()}
        self.seconds[first] = list(benchmark.stats.stats.data)

    def row(self, over: str, under: str, *, target: float | None = None, **texts: str) -> None:
        """Report the median of the ratios of ``over`` to ``under`` in the same round.

        Args:
            over: the action whose cost is asked for.
            under: the floor.
            target: what the ratio should not exceed, if anything was asked for.
            **texts: the columns "case", "name", "what", "floor"; "note" goes under the table.
        """
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        add_row(
            self.benchmark,
            value=[one / other for one, other in pairs],
            target=target,
            seconds=statistics.median(self.seconds[over]),
            floor_seconds=statistics.median(self.seconds[under]),
            **texts,
        )


def add_row(
    benchmark: Any,
    *,
    value: float | list[float] | None,
    target: float | None = None,
    seconds: float | None = None,
    floor_seconds: float | None = None,
    **texts: str,
) -> None:
    """Put a row into pytest-benchmark's JSON; no value: there is none, and the note says why."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    low, middle, high = _quartiles(values) if values else (None, None, None)
    row = {
        **texts,
        "target": target,
        "median": middle,
        "q1": low,
        "q3": high,
        "rounds": len(values),
        "seconds": seconds,
        "floor_seconds": floor_seconds,
    }
    benchmark.extra_info.setdefault("rows", []).append(row)


def once(benchmark: Any, action: Action) -> Any:
    """Run something that is counted or weighed, not timed."""
    return benchmark.pedantic(action, rounds=1)


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
