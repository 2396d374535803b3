"""Time and memory of forward passes, of one network or of several in turn, and of modules."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Integral
from operator import itemgetter
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
    tensors,
    with_batch_size,
)
from lightning_wgsef.network.layers import modules_by_name
from lightning_wgsef.utils.tables import format_table
from lightning_wgsef.utils.validation import check_kind, check_model

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
    check_model("model", model)
    if against is not None:
        check_model("against", against)
    check_kind("batch_sizes", batch_sizes, Sequence, "numbers of samples, such as (1, 64)")
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
    records: Any = profiler.profiler.kineto_results
    # Only what this run allocates counts: it may free what an earlier recorded one left behind.
    changes = [x for x in _walked(records.experimental_event_tree()) if hasattr(x[1], "alloc_size")]
    sizes: dict[int, int] = {}
    held = peak = 0
    for _, change in sorted(changes, key=itemgetter(0)):
        if change.alloc_size > 0:
            sizes[change.ptr] = change.alloc_size
            held += change.alloc_size
        else:
            held -= sizes.pop(change.ptr, 0)
        peak = max(peak, held)
    return int(peak)


def _walked(events: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """Yield the start and the kind of fields of every event that torch's profiler recorded."""
    for event in events:
        yield event.start_time_ns, event.extra_fields
        yield from _walked(event.children)


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


@dataclass(frozen=True)
class ModuleCall:
    """A call of a module in a forward pass.

    Attributes:
        name: of the module.
        within: the modules that it ran in, the outermost first, itself included.
        read: shapes of the tensors that it was given.
        made: shapes of those that it returned.
    """

    name: str
    within: tuple[str, ...]
    read: tuple[torch.Size, ...]
    made: tuple[torch.Size, ...]


def module_calls(model: nn.Module, example_input: Any) -> list[ModuleCall]:
    """List the calls of all modules in one forward pass, in the order in which they return.

    >>> [(x.name, x.made) for x in module_calls(nn.Sequential(nn.Linear(3, 4)), torch.ones(2, 3))]
    [('0', (torch.Size([2, 4]),)), ('', (torch.Size([2, 4]),))]
    """
    found: list[ModuleCall] = []
    inside: list[tuple[str, tuple[torch.Size, ...]]] = []

    def enter(name: str, _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        inside.append((name, _shapes([*inputs, *named.values()])))

    def leave(name: str, _: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        within = tuple(own for own, _ in inside)
        found.append(ModuleCall(name, within, inside.pop()[1], _shapes(output)))

    modules = modules_by_name(model)
    with evaluation(model), torch.no_grad(), observed(modules, enter, leave):
        run_example(model, example_input)
    return found


def _shapes(value: Any) -> tuple[torch.Size, ...]:
    return tuple(x.shape for x in tensors(value))


@dataclass(frozen=True)
class PassTimes:
    """What a forward pass takes where nothing else disturbs it, in seconds.

    Attributes:
        whole: of the pass.
        modules: of every module by name, without those that it calls; all calls together.
    """

    whole: float
    modules: dict[str, float]


# Turns to warm up, at least and at most so many to measure, and about so many seconds for it.
_WARM_UP, _FEWEST, _MOST, _ABOUT = 1, 6, 40, 8.0


def pass_times(networks: Sequence[nn.Module], example_input: Any) -> list[PassTimes]:
    """Measure forward passes of networks, and how their modules share in them.

    All networks run in every turn, in random order: once as they are, and once with a mark where a
    module begins and ends, which takes time of its own. Times are the lowest of all turns: others
    that use the machine only ever add to them. On a CPU or one CUDA device; a compiled model runs
    as it is written.

    Raises:
        ValueError: a forward pass fails.

    >>> (times,) = pass_times([nn.Sequential(nn.Linear(3, 4))], torch.ones(1, 3))
    >>> times.whole > 0, sorted(times.modules)
    (True, ['', '0'])
    """
    device = device_of(networks[0])
    gpu = device if device.type == "cuda" else None
    inputs = on_device_of(networks[0], example_input)
    marks: list[tuple[str | None, Any]] = []  # of what begins, None of what ends; and when
    modules: list[dict[str, float]] = [{} for _ in networks]

    def mark(name: str | None, *_: object) -> None:
        now: Any = perf_counter()
        if gpu:
            now = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch gives none
            now.record()
        marks.append((name, now))

    def run(network: nn.Module) -> None:
        network(**inputs) if isinstance(inputs, dict) else network(*inputs)

    def run_marked(number: int) -> None:
        marks.clear()
        with observed(modules_by_name(networks[number]), mark, lambda *_: mark(None)):
            run(networks[number])
        if gpu:
            torch.cuda.synchronize(gpu)
        least = modules[number]
        for name, spent in _own_times(marks).items():
            least[name] = min(spent, least.get(name, spent))

    calls: list[Callable[[], object]] = [partial(run, network) for network in networks]
    calls += [partial(run_marked, number) for number in range(len(networks))]
    with evaluation(*networks), torch.no_grad(), torch.cuda.device(gpu) if gpu else nullcontext():
        run_example(networks[0], example_input)  # a failure says what was given
        start = perf_counter()
        alternating_times(calls, 0, _WARM_UP, gpu)
        turn = max((perf_counter() - start) / _WARM_UP, 1e-9)
        turns = min(_MOST, max(_FEWEST, round(_ABOUT / turn)))
        seconds = alternating_times(calls, turns, 0, gpu)
    return [PassTimes(min(own), found) for own, found in zip(seconds, modules, strict=False)]


def _own_times(marks: Sequence[tuple[str | None, Any]]) -> dict[str, float]:
    """Sum up the time between marks for the innermost module that has begun and not ended."""
    inside: list[str] = []
    seconds: dict[str, float] = {}
    for (name, start), (_, end) in itertools.pairwise(marks):
        if name is None:
            inside.pop()
        else:
            inside.append(name)
        spent = end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
        if inside:
            seconds[inside[-1]] = seconds.get(inside[-1], 0.0) + spent
    return seconds
