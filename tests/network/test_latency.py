"""The bookkeeping of times and memory, with a clock that only networks advance."""

import json
import random
from collections import Counter

import pytest
import torch
from torch import nn

from lightning_wgsef.network import latency as latency
from lightning_wgsef.network.example_input import with_batch_size
from lightning_wgsef.network.latency import (
    Spread,
    alternating_times,
    compared,
    measure_latency,
    module_calls,
    pass_times,
)
from tests.helpers.groups import raises_naming


class Clock:
    """Tells the time, which passes only when a network runs."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now


class Timed(nn.Module):
    """Takes the seconds it is told, one after the other, times the number of samples."""

    def __init__(self, clock, name, seconds):
        super().__init__()
        self.clock, self.name, self.seconds = clock, name, seconds
        self.runs, self.sizes, self.threads, self.modes = 0, [], set(), set()

    def forward(self, inputs):
        self.clock.now += self.seconds[self.runs % len(self.seconds)] * len(inputs)
        self.runs += 1
        self.clock.log.append(self.name)
        self.sizes.append(len(inputs))
        self.threads.add(torch.get_num_threads())
        self.modes.add((self.training, torch.is_grad_enabled()))
        return inputs


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "perf_counter", clock)
    return clock


INPUT = torch.ones(2, 3)


def test_median_and_quartiles(clock):
    # The first run checks the input, the second warms up, five count; one more is for the memory.
    network = Timed(clock, "a", [100.0, 50.0, 5.0, 1.0, 4.0, 2.0, 3.0, 70.0])
    report = measure_latency(network, INPUT, repeats=5, warmup=1)
    (batch,) = report.batches
    assert network.runs == 8
    assert batch.seconds == Spread(3.0, 2.0, 4.0)
    assert (batch.batch_size, batch.ratio, batch.against_seconds) == (1, None, None)
    assert (report.repeats, report.warmup, report.device) == (5, 1, "cpu")


def test_batch_sizes(clock):
    network = Timed(clock, "a", [0.5])
    report = measure_latency(network, INPUT, batch_sizes=(1, 2, 7), repeats=3, warmup=0)
    assert Counter(network.sizes) == {1: 5, 2: 5, 7: 5}
    assert [batch.seconds.median for batch in report.batches] == [0.5, 1.0, 3.5]


def test_pairs_run_in_turns_in_random_order(clock):
    one, other = Timed(clock, "a", [2.0]), Timed(clock, "b", [8.0])
    before = torch.random.get_rng_state(), random.getstate()
    report = measure_latency(one, INPUT, against=other, repeats=20, warmup=4)
    log = clock.log[2:-2]
    turns = Counter(zip(log[::2], log[1::2], strict=True))
    assert sum(turns.values()) == 24
    assert turns.keys() == {("a", "b"), ("b", "a")}
    assert min(turns.values()) >= 5
    (batch,) = report.batches
    assert (batch.seconds.median, batch.against_seconds.median) == (2.0, 8.0)
    assert batch.ratio == Spread(0.25, 0.25, 0.25)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_ratios_are_those_of_the_same_turn(clock):
    """A machine that gets slower changes both times, and not their ratio."""
    slower = [2.0**turn for turn in range(7)]
    one = Timed(clock, "a", [1.0, *slower])
    other = Timed(clock, "b", [1.0, *(4 * seconds for seconds in slower)])
    (batch,) = measure_latency(one, INPUT, against=other, repeats=7, warmup=0).batches
    assert batch.ratio == Spread(0.25, 0.25, 0.25)
    assert batch.seconds == Spread(8.0, 3.0, 24.0)


def test_the_ratio_is_the_median_of_those_of_the_turns():
    """That of the medians need not lie between the quartiles: it does not know the turns."""
    assert compared([1.0, 2.0, 9.0], [1.0, 4.0, 1.0]) == Spread(1.0, 0.75, 5.0)
    slower_in_the_third_turn = [1.0, 1.0, 4.0, 4.0, 4.0], [2.0, 2.0, 2.0, 8.0, 8.0]
    assert compared(*slower_in_the_third_turn) == Spread(0.5, 0.5, 0.5)  # and not 4 / 2


def test_one_repeat(clock):
    (batch,) = measure_latency(Timed(clock, "a", [3.0]), INPUT, repeats=1, warmup=0).batches
    assert batch.seconds == Spread(3.0, 3.0, 3.0)


def test_warmup_does_not_count(clock):
    network = Timed(clock, "a", [8.0, 8.0, 8.0, 1.0])
    assert alternating_times([lambda: network(torch.ones(1))], repeats=1, warmup=3) == [[1.0]]


@pytest.mark.parametrize("threads", [1, 2, None])
def test_threads_are_set_and_restored(clock, threads):
    before = torch.get_num_threads()
    network = Timed(clock, "a", [1.0])
    report = measure_latency(network, INPUT, repeats=2, threads=threads)
    assert network.threads == {report.threads} == {threads or before}
    assert torch.get_num_threads() == before


def test_everything_is_restored_after_a_failure(clock):
    before = torch.get_num_threads()
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    network[0].eval()
    with raises_naming("example_input", "(1, 3)"):
        measure_latency(network, INPUT, threads=before + 1)
    assert torch.get_num_threads() == before
    assert [module.training for module in network.modules()] == [True, False, True]


def test_evaluation_without_gradients(clock):
    network = Timed(clock, "a", [1.0])
    measure_latency(network, INPUT, repeats=2)
    assert network.modes == {(False, False)}
    assert network.training


def test_arguments_by_name_and_place(clock):
    class Sum(nn.Module):
        def forward(self, one, other, kind):
            assert kind == "sum"
            return one + other

    for example in ((INPUT, INPUT, "sum"), {"other": INPUT, "kind": "sum", "one": INPUT}):
        report = measure_latency(Sum(), example, repeats=1, batch_sizes=(4,))
        assert report.batches[0].peak_memory == 4 * 3 * 4


# --- modules --------------------------------------------------------------------------------------


class Around(nn.Module):
    """Takes a second before and two after its parts."""

    def __init__(self, clock, *parts):
        super().__init__()
        self.clock, self.parts = clock, nn.ModuleList(parts)

    def forward(self, inputs):
        self.clock.now += 1.0
        for part in self.parts:
            inputs = part(inputs)
        self.clock.now += 2.0
        return inputs


def test_times_of_modules_are_their_own_and_the_lowest(clock):
    """Both calls of a shared part; every other run is slow, and all networks run in every turn."""
    shared = Timed(clock, "a", [3.0, 3.0, 70.0, 3.0])
    inner = Around(clock, shared, shared)
    other = Timed(clock, "b", [9.0, 5.0])
    one, two = pass_times([Around(clock, inner), other], INPUT[:1])
    assert one.modules == {"": 3.0, "parts.0": 3.0, "parts.0.parts.0": 6.0}
    assert (one.whole, two.whole, two.modules) == (12.0, 5.0, {"": 5.0})
    runs = {name: clock.log.count(name) for name in "ab"}
    assert runs["a"] == 2 * (
        runs["b"] + 1
    )  # the first network runs once more, to see whether it does
    assert inner.training


def test_calls_of_modules():
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.Flatten(0)))
    calls = module_calls(model, INPUT)
    assert [(x.name, x.within) for x in calls] == [
        ("0", ("", "0")),
        ("0", ("", "1", "0")),
        ("1.1", ("", "1", "1.1")),
        ("1", ("", "1")),
        ("", ("",)),
    ]
    assert [(x.read, x.made) for x in calls[2:4]] == [(((2, 3),), ((6,),))] * 2


# --- memory --------------------------------------------------------------------------------------


class Scratch(nn.Module):
    """Needs tensors of 1000 numbers: one at a time, or all at once."""

    def __init__(self, count, at_once):
        super().__init__()
        self.count, self.at_once = count, at_once

    def forward(self, inputs):
        held = []
        for _ in range(self.count):
            if not self.at_once:
                held.clear()
            held.append(torch.empty(1000))
        return inputs


@pytest.mark.parametrize(
    ("count", "at_once", "tensors"), [(5, False, 1), (5, True, 5), (0, True, 0)]
)
def test_peak_memory(count, at_once, tensors):
    (batch,) = measure_latency(Scratch(count, at_once), INPUT, repeats=1, warmup=0).batches
    assert batch.peak_memory == 4000 * tensors


def test_peak_memory_leaves_out_what_an_earlier_pass_left_behind():
    class Remembering(nn.Linear):
        kept, most = (), 1000

        def forward(self, x):
            self.kept = self.kept[-self.most :]  # the oldest goes
            self.kept += (super().forward(x),)
            return self.kept[-1]

    def peak():
        return measure_latency(network, torch.randn(4, 3), repeats=2).batches[0].peak_memory

    network = Remembering(3, 250)
    first = peak()
    network.most = len(network.kept) - 1  # what goes in a pass is what it made in the last report
    assert first == peak() == 250 * 4


def test_peak_memory_is_not_the_sum_of_all():
    """Of four layers, input and output of one are held at a time."""
    network = nn.Sequential(*[nn.Linear(250, 250) for _ in range(4)])
    (batch,) = measure_latency(network, torch.ones(1, 250), batch_sizes=(8,), repeats=1).batches
    assert batch.peak_memory == 2 * 8 * 250 * 4


# --- what is shown -------------------------------------------------------------------------------


def test_table_and_plain_data(clock):
    one, other = Timed(clock, "a", [0.001]), Timed(clock, "b", [0.004])
    alone = measure_latency(one, INPUT, repeats=3, batch_sizes=(1, 8))
    paired = measure_latency(one, INPUT, against=other, repeats=3)
    assert "ratio" not in str(alone)
    first, second, third, *_ = str(alone).splitlines()
    assert first.split()[:3] == ["batch", "size", "ms"]
    assert second.split() == ["1", "1", "(1-1)", "0"]
    assert third.split() == ["8", "8", "(8-8)", "0"]
    assert "0.25 (0.25-0.25)" in str(paired)
    assert f"{torch.get_num_threads()} threads, 3 runs after 5" in str(paired)
    assert "profiler" in str(paired)
    data = json.loads(json.dumps(paired.as_dict()))
    assert data["batches"][0]["ratio"] == {"median": 0.25, "lower": 0.25, "upper": 0.25}
    assert data["batches"][0]["batch_size"] == 1
    assert data["repeats"] == 3


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_sizes", ()),
        ("batch_sizes", (1, 0)),
        ("batch_sizes", (1.5,)),
        ("repeats", 0),
        ("repeats", True),
        ("warmup", -1),
        ("threads", 0),
    ],
)
def test_wrong_arguments(name, value):
    with raises_naming(name):
        measure_latency(nn.Identity(), INPUT, **{name: value})


@pytest.mark.parametrize("example", [3, torch.tensor(1.0), torch.ones(0, 3), ()])
def test_examples_without_a_batch(example):
    with raises_naming("example_input", "samples"):
        measure_latency(nn.Identity(), example)


def test_batches():
    first, mask, single = torch.tensor([[1], [2], [3]]), torch.eye(2), torch.tensor(5)
    found = with_batch_size({"x": first, "mask": mask, "n": single, "y": first[:, 0], "s": "a"}, 5)
    assert found["x"].tolist() == [[1], [2], [3], [1], [2]]
    assert found["y"].tolist() == [1, 2, 3, 1, 2]
    assert found["mask"] is mask
    assert (found["n"], found["s"]) == (single, "a")
    assert with_batch_size(first, 2)[0].tolist() == [[1], [2]]
