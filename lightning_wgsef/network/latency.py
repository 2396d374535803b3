"""Time and memory of forward passes, of one network or of two in turn, and of its layers."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Integral
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lightning_wgsef.network.example_input import (
    device_of,
    evaluation,
    observed,
    on_device_of,
    run_example,
    with_batch_size,
)
from lightning_wgsef.network.layers import weighted_layers
from lightning_wgsef.utils.tables import format_table

MEMORY_OF_CPU = "allocations of torch during one pass, as its profiler records them"

MEMORY_OF_CUDA = "torch.cuda.max_memory_allocated of one pass, less what was held before"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Those of some numbers.

        >>> Spread.of([1.0, 2.0, 3.0, 4.0, 5.0])
        Spread(median=3.0, lower=2.0, upper=4.0)
        """
        points = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        return cls(*torch.tensor(values, dtype=torch.float64).quantile(points).tolist())


@dataclass(frozen=True)
class BatchLatency:
    """What passes of one batch size take.

    Attributes:
        batch_size: number of samples.
        seconds: of a pass of the model.
        peak_memory: bytes that one pass holds at most on top of weights and inputs.
        against_seconds: of a pass of the other network; None without one, like what follows.
        against_peak_memory: bytes of the other network.
        ratio: time of the model over that of the other network in the same turn.
    """

    batch_size: int
    seconds: Spread
    peak_memory: int
    against_seconds: Spread | None = None
    against_peak_memory: int | None = None
    ratio: Spread | None = None


@dataclass(frozen=True)
class LatencyReport:
    """Times and memory by batch size, and how they were measured."""

    batches: tuple[BatchLatency, ...]
    device: str
    threads: int
    repeats: int
    warmup: int
    memory: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "batches": [asdict(batch) for batch in self.batches]}

    def __str__(self) -> str:
        header = ["batch size", "ms (quartiles)", "peak bytes"]
        paired = any(batch.ratio for batch in self.batches)
        header += ["against: ms (quartiles)", "peak bytes", "ratio (quartiles)"] if paired else []
        rows = []
        for batch in self.batches:
            row = [f"{batch.batch_size}", _shown(batch.seconds, 1e3), f"{batch.peak_memory:,}"]
            if batch.against_seconds and batch.ratio:
                row += [_shown(batch.against_seconds, 1e3), f"{batch.against_peak_memory:,}"]
                row.append(_shown(batch.ratio))
            rows.append(row)
        how = f"{self.device}, {self.threads} threads, {self.repeats} runs after {self.warmup}"
        return "\n".join([format_table(header, rows), how, f"peak bytes: {self.memory}"])


def measure_latency(
    model: nn.Module,
    example_input: Any,
    *,
    against: nn.Module | None = None,
    batch_sizes: Sequence[int] = (1,),
    repeats: int = 30,
    warmup: int = 5,
    threads: int | None = None,
) -> LatencyReport:
    """Time forward passes in evaluation mode without gradients.

    With another network both run in every turn, in random order, so that whatever else slows the
    machine down slows both. On CUDA every pass is waited for before and after. Peak memory is that
    of one more pass (see ``memory`` of the report).

    Args:
        model: the network; its mode is restored.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them. The
            first axis of the first tensor is the batch; every tensor whose first axis is as long is
            repeated or cut to the batch size.
        against: another network that takes the same input.
        batch_sizes: numbers of samples.
        repeats: number of turns that count.
        warmup: number of turns before them.
        threads: number of threads of torch on the CPU while measuring; None: what is set.

    Raises:
        ValueError: an argument is out of range, or a forward pass fails.

    >>> report = measure_latency(nn.Linear(4, 2), torch.ones(3, 4), batch_sizes=(1, 8), repeats=3)
    >>> [batch.batch_size for batch in report.batches]
    [1, 8]
    >>> report.batches[1].peak_memory  # the output, in float32
    64
    """
    if not batch_sizes:
        raise ValueError("batch_sizes must name at least one number of samples, got none")
    for size in batch_sizes:
        _check_count("batch_sizes", size, 1)
    _check_count("repeats", repeats, 1)
    _check_count("warmup", warmup, 0)
    if threads is not None:
        _check_count("threads", threads, 1)
    networks = [model] if against is None else [model, against]
    with evaluation(*networks), torch.no_grad(), _threads(threads):
        batches = tuple(
            _measured(networks, with_batch_size(example_input, size), size, repeats, warmup)
            for size in batch_sizes
        )
        device = device_of(model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        memory = MEMORY_OF_CUDA if device.type == "cuda" else MEMORY_OF_CPU
        return LatencyReport(batches, name, torch.get_num_threads(), repeats, warmup, memory)


def alternating_times(
    calls: Sequence[Callable[[], object]],
    repeats: int,
    warmup: int,
    device: torch.device | None = None,
) -> list[list[float]]:
    """Seconds of every run of each call; all run in every turn, in random order.

    >>> [len(seconds) for seconds in alternating_times([list, dict], repeats=4, warmup=1)]
    [4, 4]
    """
    wait = device is not None and device.type == "cuda"
    shuffled = random.Random(0)  # its own, so that the order changes no random numbers elsewhere
    order = list(range(len(calls)))
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + repeats):
        shuffled.shuffle(order)
        for number in order:
            if wait:
                torch.cuda.synchronize(device)
            start = perf_counter()
            calls[number]()
            if wait:
                torch.cuda.synchronize(device)
            spent = perf_counter() - start
            if turn >= warmup:
                seconds[number].append(spent)
    return seconds


def compared(seconds: Sequence[float], against: Sequence[float]) -> Spread:
    """Median and quartiles of the ratios of each turn.

    >>> compared([2.0, 4.0, 6.0], [1.0, 4.0, 2.0])
    Spread(median=2.0, lower=1.5, upper=2.5)
    """
    return Spread.of([one / other for one, other in zip(seconds, against, strict=True)])


def _measured(
    networks: list[nn.Module], example_input: Any, size: int, repeats: int, warmup: int
) -> BatchLatency:
    calls: list[Callable[[], Any]] = []
    for network in networks:
        run_example(network, example_input)  # a failure says what was given
        inputs = on_device_of(network, example_input)
        given = (
            partial(network, **inputs) if isinstance(inputs, dict) else partial(network, *inputs)
        )
        calls.append(given)
    gpu = next((device_of(x) for x in networks if device_of(x).type == "cuda"), None)
    times = alternating_times(calls, repeats, warmup, gpu)
    peaks = [_peak_memory(call, device_of(x)) for call, x in zip(calls, networks, strict=True)]
    own = BatchLatency(size, Spread.of(times[0]), peaks[0])
    if len(networks) == 1:
        return own
    ratio = compared(times[0], times[1])
    return BatchLatency(size, own.seconds, peaks[0], Spread.of(times[1]), peaks[1], ratio)


def _peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that one run holds at most, on top of what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler writes to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events: Any = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return int(peak)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_count(name: str, value: object, lowest: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < lowest:
        raise ValueError(f"{name} must be an int >= {lowest}, got {value!r}")


def _shown(spread: Spread, scale: float = 1.0) -> str:
    lower, upper = spread.lower * scale, spread.upper * scale
    return f"{spread.median * scale:.3g} ({lower:.3g}-{upper:.3g})"


_WARM_UP = 2


def layer_latencies(
    model: nn.Module, example_input: Any, repeats: int = 10
) -> tuple[dict[str, float], float]:
    """Seconds of every weighted layer that a forward pass calls, and of the whole pass.

    Medians over ``repeats`` passes, after two to warm up, on a CPU or one CUDA device; the calls of
    a layer are added up. A compiled model runs as it is written. Raises `ValueError` if the pass
    fails or ``repeats`` is no count.

    >>> seconds, whole = layer_latencies(nn.Sequential(nn.Linear(3, 4)), torch.ones(1, 3))
    >>> 0 < seconds["0"] < whole
    True
    """
    if not isinstance(repeats, Integral) or isinstance(repeats, bool) or repeats < 1:
        raise ValueError(f"repeats must be a number of forward passes (int >= 1), got {repeats!r}")
    device = device_of(model)
    gpu = device if device.type == "cuda" else None
    layers = {layer.name: layer.module for layer in weighted_layers(model)}
    marks: dict[str | None, list[Any]] = {}  # begin, end, begin, end ..; None: the whole pass
    seconds: dict[str | None, list[float]] = {}

    def mark(name: str | None, *_: object) -> None:
        now: Any = perf_counter()
        if gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        marks.setdefault(name, []).append(now)

    with (
        evaluation(model),
        torch.no_grad(),
        observed(layers, mark, mark),
        torch.cuda.device(gpu) if gpu else nullcontext(),
    ):
        for run in range(_WARM_UP + repeats):
            marks.clear()
            mark(None)
            run_example(model, example_input)
            mark(None)
            if gpu:
                torch.cuda.synchronize()
            for name, (*times,) in marks.items() if run >= _WARM_UP else ():
                pairs = zip(times[::2], times[1::2], strict=True)
                spent = sum(a.elapsed_time(b) / 1000 if gpu else b - a for a, b in pairs)
                seconds.setdefault(name, []).append(spent)
    whole = median(seconds.pop(None))
    return {name: median(times) for name, times in seconds.items() if name is not None}, whole
