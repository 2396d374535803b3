"""Running statistics follow the groups exactly: what a norm makes of scaled groups, in float64.

What a norm returns before its scale and shift must not change when groups before it are scaled and
what their layers read stays as it is. Written out by hand from the buffers, for every channel.
"""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_wgsef import WGSEF, group_parameters, slim
from lightning_wgsef.groups.norm_statistics import NormStatistics
from lightning_wgsef.training.masks import apply_masks_to
from tests.helpers.networks.structure import randomised

IMAGE = torch.randn(3, 3, 6, 6, generator=torch.Generator().manual_seed(7)).double()
EXACT = 1e-9


class PreActivation(nn.Module):
    """A residual stream that two convolutions make and that two norms read."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.norm, self.narrow = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1)
        self.inner_norm, self.last_norm = nn.BatchNorm2d(4), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        y = self.inner_norm(self.narrow(functional.relu(self.norm(x)))).relu()
        x = x + self.inner(y)
        return self.head(functional.relu(self.last_norm(x)).mean((2, 3)))


class Concatenated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.norm, self.head = nn.BatchNorm2d(10), nn.Linear(10, 2)

    def forward(self, x):
        both = self.norm(torch.cat([self.a(x), self.b(x)], 1))
        return self.head(both.relu().mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self, activation):
        super().__init__()
        self.wide, self.norm, self.activation = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), activation
        self.depth, self.depth_norm = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.activation(self.norm(self.wide(x)))
        return self.head(self.depth_norm(self.depth(x)).relu().mean((2, 3)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.conv2 = (
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
        )
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv2(self.norm(self.conv1(x)).relu())).mean((2, 3)))


def plain(norm=nn.BatchNorm2d, **options):
    first = nn.Conv2d(3, 8, 3, bias=False), norm(8, **options), nn.ReLU(inplace=True)
    second = nn.Conv2d(8, 6, 3), norm(6, **options), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)
    return nn.Sequential(*first, *second)


def sequence(between):
    front = nn.Conv2d(3, 8, 3), between, nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3)
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(16, 2))


INSTANCE = {"affine": True, "track_running_stats": True}
# Network, grouping, and the norms of every layer that has some.
CASES = {
    "filter": (plain, "filter", {"0": ["1"], "3": ["4"]}),
    "structure": (plain, "structure", {"0": ["1"], "3": ["4"]}),
    "cumulative": (lambda: plain(momentum=None), "filter", {"0": ["1"], "3": ["4"]}),
    "no statistics": (lambda: plain(track_running_stats=False), "filter", {}),
    "instance": (lambda: plain(nn.InstanceNorm2d, affine=True), "structure", {}),
    "instance statistics": (
        lambda: plain(nn.InstanceNorm2d, **INSTANCE),
        "filter",
        {"0": ["1"], "3": ["4"]},
    ),
    "relu": (lambda: sequence(nn.ReLU()), "filter", {"0": ["2"]}),
    "sigmoid": (lambda: sequence(nn.Sigmoid()), "filter", {}),
    "clipped": (lambda: sequence(nn.ReLU6()), "filter", {}),
    "residual": (
        PreActivation,
        "structure",
        {"stem": ["norm", "last_norm"], "narrow": ["inner_norm"]},
    ),
    "concatenated": (Concatenated, "structure", {"a": ["norm"], "b": ["norm"]}),
    "depthwise": (lambda: Depthwise(nn.ReLU()), "structure", {"wide": ["norm"]}),
    "depthwise filters": (
        lambda: Depthwise(nn.ReLU6()),
        "filter",
        {"wide": ["norm"], "depth": ["depth_norm"]},
    ),
    "shared": (Shared, "filter", {}),
    "channel": (plain, "channel", {}),
}
every_case = pytest.mark.parametrize("kind", CASES)


def case(kind):
    make, grouping, expected = CASES[kind]
    torch.manual_seed(0)
    network = randomised(make())
    for module in network.modules():
        if hasattr(module, "running_var"):
            module.eps = 1e-14
    return network, group_parameters(network, grouping, example_input=IMAGE), expected


def found(groups):
    return {x.name: [n.name for n in x.statistics] for x in groups.layers if x.statistics}


def normalised(network, norms, given):
    """What the norms make of ``given`` inputs of layers, before scale and shift, by hand."""
    made, kept = {}, {}

    def read(name):
        def hook(module, args):
            if name in given:
                return (given[name],)
            kept[name] = args[0].clone()
            return None

        return hook

    def make(name):
        def hook(module, args):
            shape = (1, -1, *[1] * (args[0].dim() - 2))
            centred = args[0] - module.running_mean.view(shape)
            made[name] = centred / module.running_var.view(shape).sqrt()

        return hook

    hooks = []
    for name, module in network.named_modules():
        wide = isinstance(module, nn.Conv2d) and module.groups == 1
        if wide or (isinstance(module, nn.Conv2d) and norms.get(name) == ["depth_norm"]):
            hooks.append(module.register_forward_pre_hook(read(name)))
        if any(name in listed for listed in norms.values()):
            hooks.append(module.register_forward_pre_hook(make(name)))
    with torch.no_grad():
        network(IMAGE)
    for hook in hooks:
        hook.remove()
    return made, kept


def error(network, groups, norms):
    """How far the norms' outputs are from what they were when all groups are scaled."""
    before, kept = normalised(network, norms, {})
    factors = torch.rand(len(groups), generator=torch.Generator().manual_seed(1)).double() + 0.1
    groups.scale_(factors)
    after, _ = normalised(network, norms, kept)
    return max(float((after[name] - before[name]).abs().max()) for name in before)


@every_case
def test_the_norms_that_follow_are_found(kind):
    _, groups, expected = case(kind)
    assert found(groups) == expected


@pytest.mark.parametrize("kind", [kind for kind in CASES if CASES[kind][2]])
def test_what_a_norm_returns_stays_when_groups_shrink(kind):
    network, groups, expected = case(kind)
    assert error(network, groups, expected) < EXACT


def test_a_variance_that_shrinks_by_f_is_noticed(monkeypatch):
    def wrong(self, factors):
        self.module.running_mean.mul_(factors)
        self.module.running_var.mul_(factors)

    monkeypatch.setattr(NormStatistics, "scale_", wrong)
    network, groups, expected = case("filter")
    assert error(network, groups, expected) > 0.01


def test_without_an_example_the_norm_must_be_next():
    between = group_parameters(sequence(nn.ReLU()), "filter")
    direct = group_parameters(plain(), "filter")
    assert (found(between), found(direct)) == ({}, {"0": ["1"], "3": ["4"]})
    norm = nn.BatchNorm1d(4)
    twice = nn.Sequential(nn.Linear(4, 4), norm, nn.Linear(4, 4), nn.ReLU(), norm, nn.Linear(4, 1))
    assert found(group_parameters(twice, "filter", include="0")) == {}


def steps(network, number):
    """Train, and yield norms of the groups and the statistics around every proximal step."""
    regularizer = WGSEF(network, 2, grouping="filter", total_steps=number)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    generator = torch.Generator().manual_seed(3)
    seen = []
    for _ in range(number):
        images = torch.randn(4, 3, 6, 6, generator=generator)
        optimizer.zero_grad()
        network(images).square().mean().backward()
        optimizer.step()
        norms = regularizer.groups.norms()
        before = copy.deepcopy(network[1])
        if not regularizer.pruners:
            regularizer.attach(optimizer)
            regularizer.detach()
        regularizer.step(optimizer)
        seen.append((norms, before, regularizer.groups.norms(), copy.deepcopy(network[1])))
    return regularizer, seen


def check_followed(seen):
    """Compare with the norms of the groups, where none has died: how many have shrunk?"""
    moved = 0
    for norms, before, after_norms, after in seen:
        if int((after_norms > 0).sum()) == int((norms > 0).sum()):
            factors = (after_norms / norms.clamp_min(1e-30))[:8]
            moved += int((factors < 0.999).sum())
            torch.testing.assert_close(after.running_mean, before.running_mean * factors)
            torch.testing.assert_close(after.running_var, before.running_var * factors.square())
    return moved


def test_statistics_follow_every_step_and_the_freeze():
    torch.manual_seed(0)
    network = plain()
    regularizer, seen = steps(network, 12)
    assert check_followed(seen) > 8
    dead = ~regularizer.masks["0"]
    assert regularizer.frozen
    assert int(dead.sum()) == 6
    assert not bool(network[1].running_mean[dead].any() | network[1].running_var[dead].any())
    small = slim(network, torch.randn(2, 3, 6, 6))
    images = torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(images), network.eval()(images))


def test_statistics_of_a_norm_in_evaluation_mode_follow_too():
    torch.manual_seed(0)
    network = plain()
    network[1].eval()
    assert check_followed(steps(network, 8)[1]) > 5


def test_what_low_precision_keeps_for_later_is_kept_for_statistics_too():
    torch.manual_seed(0)
    network = plain().to(torch.bfloat16)
    for module in (network[1], network[4]):
        module.float()  # as autocast leaves norms: finer than the weights
    regularizer = WGSEF(network, 2, grouping="filter", total_steps=10)
    regularizer.attach(torch.optim.SGD(network.parameters(), 0.01))
    step, start = regularizer.pruners[0].step, network[0].weight.detach().float().norm()
    variances = [1.0]
    for number in range(1, 31):
        step.scale_(torch.full((14,), 0.99))
        kept = float(step.remainder[0])
        variances.append(float(network[1].running_var[0]))
        # What was applied and what is kept make up all factors so far.
        assert variances[-1] * kept**2 == pytest.approx(0.99 ** (2 * number), rel=1e-4)
    assert len(set(variances)) < 20  # not at every step
    weights = float(network[0].weight.detach().float().norm() / start)
    assert weights == pytest.approx(variances[-1] ** 0.5, rel=0.02)


def test_masks_on_a_copy_leave_the_statistics_of_the_model():
    network = plain()
    groups = group_parameters(network, "filter")
    average = torch.optim.swa_utils.AveragedModel(network)
    masks = {x.name: torch.arange(x.count) > 1 for x in groups.layers}
    before = copy.deepcopy(network.state_dict())
    apply_masks_to(average, groups, masks)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_statistics_are_those_of_the_module_after_its_buffers_were_replaced():
    network = plain()
    groups = group_parameters(network, "filter")
    network.to(torch.float64).to(torch.float32)
    groups.scale_(torch.full((len(groups),), 0.5))
    assert network[1].running_var.tolist() == [0.25] * 8
