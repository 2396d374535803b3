"""Latency by widths: what was measured at some is foretold for others."""

import itertools

import pytest
import torch
from torch import nn

from lightning_wgsef import WGSEF, Groups, group_parameters, slim
from lightning_wgsef.groupings.costs import KnownLatency
from lightning_wgsef.groupings.latency_table import (
    MADE,
    ONE,
    OPERATIONS,
    READ,
    fitted,
    nonnegative,
)
from lightning_wgsef.network import latency
from tests.helpers.groups import raises_naming

EXAMPLE = torch.ones(2, 4)


class Clock:
    """Tells a time that passes only where a network works."""

    now = 0.0
    calls = 0

    def __call__(self):
        return Clock.now


class Timed(nn.Linear):
    """Takes as long as its widths and its operations say, and a while to start."""

    def forward(self, inputs):
        made, read = self.weight.shape
        Clock.calls += 1
        Clock.now += 1e-3 + 1e-4 * read + 2e-4 * made + 1e-5 * read * made
        return super().forward(inputs)


class Passing(nn.ReLU):
    """Takes time for everything that passes."""

    def forward(self, inputs):
        Clock.now += 5e-5 * inputs.shape[1]
        return super().forward(inputs)


class Network(nn.Sequential):
    """Three layers, and something between them that takes time, too."""

    def __init__(self):
        super().__init__(Timed(4, 12), Passing(), Timed(12, 10), Passing(), Timed(10, 3))

    def forward(self, inputs):
        Clock.now += 4e-3
        return super().forward(inputs)


def milliseconds(*widths):
    """By hand, for the widths of all layers."""
    total = 4e-3 + sum(5e-5 * width for width in widths[1:-1])
    for read, made in itertools.pairwise(widths):
        total += 1e-3 + 1e-4 * read + 2e-4 * made + 1e-5 * read * made
    return 1000 * total


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    Clock.calls = 0
    monkeypatch.setattr(latency, "perf_counter", Clock())
    monkeypatch.setattr(latency, "_MOST", 2)


def found(k, **arguments):
    torch.manual_seed(0)
    model = Network()
    groups = group_parameters(model, "structure", k, example_input=EXAMPLE, **arguments)
    return model, groups


def test_widths_that_were_not_measured():
    """All of them, to the last digits: this clock knows no noise."""
    _, groups = found(0.5, costs="latency", scope="global")
    size = groups.size
    assert (size.unit, float(size.total)) == ("ms", pytest.approx(milliseconds(4, 12, 10, 3)))
    for one, two in itertools.product(range(1, 13), range(1, 11)):
        alive = torch.cat([torch.arange(12) < one, torch.arange(10) < two])
        assert float(size.of(alive)) == pytest.approx(milliseconds(4, one, two, 3), rel=1e-6)
    more = torch.cat([torch.arange(12) < 8, torch.arange(10) < 7])
    costs = size.costs(more)  # one channel more, of the first layer and of the second
    assert float(costs[0]) == pytest.approx(milliseconds(4, 9, 7, 3) - milliseconds(4, 8, 7, 3))
    assert float(costs[-1]) == pytest.approx(milliseconds(4, 8, 8, 3) - milliseconds(4, 8, 7, 3))


@pytest.mark.parametrize(
    ("k", "arguments"),
    [
        (0.5, {"costs": "latency", "scope": "global"}),
        (0.7, {"costs": "latency", "scope": "global", "multiple_of": 4}),
        ("9 ms", {"scope": "global"}),
        ("0.009 s", {}),
        (9, {"costs": "latency", "scope": "global"}),
    ],
)
def test_what_slim_makes_takes_what_was_named(k, arguments):
    """At most, and with one multiple of groups more of any layer it would take more."""
    model, groups = found(k, **arguments)
    dense = milliseconds(4, 12, 10, 3)
    limit = k * dense if isinstance(k, float) else 9.0
    assert groups.limit == pytest.approx(limit)
    assert f"at most {limit:.3g} of {dense:.3g} ms ({limit / dense:.1%})" in str(groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regularizer = WGSEF(
        model, k, grouping="structure", example_input=EXAMPLE, freeze=1, **arguments
    ).attach(optimizer)
    model(EXAMPLE).sum().backward()
    optimizer.step()
    assert regularizer.frozen
    small = slim(model, EXAMPLE)
    widths = small[0].out_features, small[2].out_features
    left, step = milliseconds(4, *widths, 3), arguments.get("multiple_of", 1)
    assert left <= limit * (1 + 1e-6)
    assert all(width % step == 0 for width in widths)
    more = [
        milliseconds(4, *(n + step * (i == j) for j, n in enumerate(widths)), 3) for i in (0, 1)
    ]
    assert (
        min(more) if arguments.get("scope") else milliseconds(4, *(n + 1 for n in widths), 3)
    ) > limit


def test_a_layer_of_its_own():
    """A share of what its groups cost, which is the same for all of them."""
    _, groups = found(0.5, costs="latency")
    assert [x.budget / float(x.costs.sum()) for x in groups.layers] == pytest.approx([0.5, 0.5])


def test_a_known_latency_is_not_measured_again():
    _, first = found(0.5, costs="latency", scope="global")
    Clock.calls = 0
    known = 2 * first.latency
    _, again = found(0.5, costs=KnownLatency(known), scope="global")
    graph = Clock.calls
    assert graph < 100  # to find and to count the groups
    assert torch.equal(again.latency, known)
    assert again.limit == pytest.approx(2 * first.limit)
    _, other = found(0.5, costs=KnownLatency(known[:-1]), scope="global")  # of another network
    assert torch.allclose(other.latency, first.latency)
    assert Clock.calls > graph + 100


def test_times_that_cannot_be_had():
    with raises_naming("k = '1 ms', 1 ms of the slim network", "must lie between", "dense network"):
        found("1 ms", scope="global")
    with raises_naming("costs must be None or 'latency'", "'9 ms'"):
        found("9 ms", costs="flops")
    with raises_naming("k = '9 ms' needs an example_input"):
        group_parameters(Network(), "structure", "9 ms")


def test_noise_is_averaged_and_nothing_is_negative():
    """A layer whose time falls where it is wider, by chance, costs next to nothing, not less."""
    generator = torch.Generator().manual_seed(0)
    width = 1 + 30 * torch.rand(12, generator=generator, dtype=torch.float64)
    values = torch.stack([torch.ones(12).double(), width, 3 * width, width * 5], 1)
    names, kinds = ["fc"] * 4, [ONE, READ, MADE, OPERATIONS]
    noise = 1 + 0.1 * torch.randn(12, generator=generator, dtype=torch.float64)
    times = (2 + 0.5 * width) * noise
    units = fitted(names, kinds, values, times[:, None], 2 * times)
    assert bool((units >= 0).all())
    foretold = values @ units
    assert float((foretold / (4 + width) - 1).abs().max()) < 0.1
    falling = 50 - width
    units = fitted(names, kinds, values, falling[:, None], falling)
    assert units[OPERATIONS] > 0
    assert bool((units >= 0).all())
    narrow, wide = (torch.tensor([1.0, x, 3 * x, 5 * x]).double() @ units for x in (1.0, 30.0))
    assert float(narrow) < float(wide) < 1.1 * float(narrow)


def test_least_squares_without_negative_coefficients():
    """Against a grid: nothing on it is nearer."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        columns = torch.rand(6, 2, generator=generator, dtype=torch.float64)
        times = 0.1 + torch.rand(6, generator=generator, dtype=torch.float64)

        def errors(points, columns=columns, times=times):
            return (points @ columns.T / times - 1).square().sum(-1)

        found, steps = nonnegative(columns, times), torch.arange(60).double() / 20
        assert bool((found >= 0).all())
        assert (
            float(errors(found)) <= float(errors(torch.cartesian_prod(steps, steps)).min()) + 1e-9
        )


def test_a_layer_that_runs_twice_and_a_block_that_is_left_out():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Timed(6, 8), Timed(8, 6)

        def forward(self, x):
            return x + self.two(torch.relu(self.one(x)))

    torch.manual_seed(0)
    model = nn.Sequential(Timed(4, 6), Block(), Block(), Block(), Timed(6, 2))
    arguments = {"costs": "latency", "example_input": EXAMPLE, "scope": "global"}
    groups = group_parameters(model, "layer", 0.7, **arguments)
    alive = torch.tensor([True, False, True])
    block = milliseconds(6, 8, 6) - 4 - 0.05 * 8
    assert float(groups.size.total - groups.size.of(alive)) == pytest.approx(block, rel=1e-3)
    assert isinstance(groups, Groups)
