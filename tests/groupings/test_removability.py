"""Whether zero groups can be taken out, and the reason where they cannot."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_wgsef import GroupedLayer, Groups, Member, group_parameters
from lightning_wgsef.groupings.per_layer import filter_groups
from lightning_wgsef.groupings.removability import with_invariance, zero_invariance
from lightning_wgsef.groupings.structure import structure_groups
from tests.helpers.groups import conv_network, mlp

IMAGE = torch.ones(2, 3, 8, 8)
TOGETHER = "groups 0 and 4 can only go together"
OUTPUTS = "its channels are the network's outputs"


class Through(nn.Sequential):
    """A chain of layers with any function behind the first."""

    def __init__(self, function, *layers):
        super().__init__(*layers)
        self.function = function

    def forward(self, inputs):
        first, *others = self
        inputs = self.function(first(inputs))
        for layer in others:
            inputs = layer(inputs)
        return inputs


class Residual(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 1)
        self.outer, self.norm, self.last = nn.Conv2d(8, 6, 1), norm(6), nn.Conv2d(6, 2, 1)

    def forward(self, images):
        stem = self.stem(images).relu()
        return self.last(self.norm(self.outer(self.inner(stem).relu()) + stem))


class LateNorm(nn.Module):
    """A norm that is not defined behind the layer that it follows."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.conv, self.last = norm, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, images):
        return self.last(self.norm(self.conv(images)).relu())


def two_convolutions(*between, bias=True):
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), *between, nn.Conv2d(8, 4, 1))


def depthwise(bias):
    return two_convolutions(nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=bias), nn.ReLU())


FILTERS = {
    "nothing between": (two_convolutions(), {"0": "", "1": OUTPUTS}),
    "norm": (two_convolutions(nn.BatchNorm2d(8), nn.ReLU()), {"0": "", "3": OUTPUTS}),
    "activations that keep zero": (
        two_convolutions(nn.GELU(), nn.SiLU(), nn.Tanh(), nn.ReLU6(), nn.Hardswish()),
        {"0": "", "6": OUTPUTS},
    ),
    "pooling and dropout": (
        two_convolutions(nn.MaxPool2d(2), nn.Dropout(), nn.AvgPool2d(2)),
        {"0": "", "4": OUTPUTS},
    ),
    "sigmoid": (
        two_convolutions(nn.Sigmoid()),
        {"0": "'1' (Sigmoid) turns 0 into 0.5", "2": OUTPUTS},
    ),
    "softplus": (
        two_convolutions(nn.Softplus()),
        {"0": "'1' (Softplus) turns 0 into 0.693", "2": OUTPUTS},
    ),
    "a function": (
        Through(torch.sigmoid, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)),
        {"0": "zero does not stay zero in one of Sigmoid", "1": OUTPUTS},
    ),
    "a constant": (
        Through(lambda x: x.relu() + 1, nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)),
        {"0": "zero does not stay zero in one of Add, Relu", "1": OUTPUTS},
    ),
    "softmax over channels": (
        Through(lambda x: x.softmax(1), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)),
        {"0": "its channels may be moved or mixed by SoftmaxBackward0", "1": OUTPUTS},
    ),
    "norm over channels": (
        two_convolutions(nn.GroupNorm(1, 8)),
        {"0": "GroupNorm '1' normalises over these channels", "2": OUTPUTS},
    ),
    "norm without scale": (
        two_convolutions(nn.BatchNorm2d(8, affine=False)),
        {"0": "BatchNorm2d '1' has no scale and shift: it turns 0 into a constant", "2": OUTPUTS},
    ),
    "norm in no group": (
        LateNorm(nn.BatchNorm2d(8)),
        {"conv": "the bias of 'norm' is in no group", "last": OUTPUTS},
    ),
    "residual sum": (
        Residual(),
        {
            "stem": "tied to 'outer'; grouping='structure' takes both out",
            "inner": "",
            "outer": "tied to 'stem'; grouping='structure' takes both out",
            "last": OUTPUTS,
        },
    ),
    "depthwise": (
        depthwise(bias=False),
        {"0": "", "2": "tied to '0'; grouping='structure' takes both out", "4": OUTPUTS},
    ),
    "depthwise with bias": (
        depthwise(bias=True),
        {
            "0": "the bias of '2' is in no group",
            "2": "tied to '0'; grouping='structure' takes both out",
            "4": OUTPUTS,
        },
    ),
    "grouped": (
        two_convolutions(nn.Conv2d(8, 8, 1, groups=2)),
        {"0": TOGETHER, "1": TOGETHER, "2": OUTPUTS},
    ),
    "a width in forward": (
        Through(lambda x: x.view(-1, 8, 36).relu(), nn.Conv2d(3, 8, 3), nn.Conv1d(8, 2, 1)),
        {"0": "the network does not run without them: ", "1": OUTPUTS},
    ),
    "one filter": (
        nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 4, 1)),
        {"0": "it has one group", "1": OUTPUTS},
    ),
}


@pytest.mark.parametrize("kind", FILTERS)
def test_filters(kind):
    model, expected = FILTERS[kind]
    causes = zero_invariance(model, filter_groups(model), IMAGE)
    assert causes.keys() == expected.keys()
    for name, cause in expected.items():
        assert causes[name] == cause or (cause.endswith(": ") and causes[name].startswith(cause))


@pytest.mark.parametrize("kind", FILTERS)
def test_structure_owns_what_filters_miss(kind):
    """What is tied, biases and late norms are no obstacle; functions and norms over channels are"""
    model, filters = FILTERS[kind]
    causes = zero_invariance(model, structure_groups(model, IMAGE), IMAGE)
    for name, cause in causes.items():
        missed = ("tied to", "the bias of", "groups 0 and")
        if filters[name].startswith(missed):
            assert cause == ""
        else:
            assert cause == filters[name] or cause.startswith(filters[name] or "?")
    assert causes  # at least the outputs


def test_only_the_guilty_layers_of_many():
    layers = []
    for number in range(12):
        layers += [nn.Linear(8, 8), nn.Sigmoid() if number in (3, 8) else nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    causes = zero_invariance(model, filter_groups(model), torch.ones(2, 8))
    guilty = {name for name, cause in causes.items() if cause}
    assert guilty == {"6", "16", "24"}


def planted(groups, layer, **changes):
    """The groups with a mistake in one layer."""
    layers = [replace(x, **changes) if x.name == layer else x for x in groups.layers]
    return Groups(layers)


@pytest.mark.parametrize("number", range(5))
def test_a_forgotten_member_is_noticed(number):
    """Of a convolution, its bias, and the scale and shift of its norm, and of all that is tied."""
    model = Residual()
    groups = structure_groups(model, IMAGE)
    (layer,) = [x for x in groups.layers if x.name == "stem"]
    members = [x for x in layer.members if x.name != "norm.weight"]  # zero times zero is zero
    assert len(members) == 5
    gone = members.pop(number)
    causes = zero_invariance(model, planted(groups, "stem", members=tuple(members)), IMAGE)
    path, _, tensor = gone.name.rpartition(".")
    assert causes["stem"] in (
        f"tied to '{path}'; grouping='structure' takes both out",
        f"the {tensor} of '{path}' is in no group",
    )
    assert causes["inner"] == ""


def test_a_bias_behind_which_the_norm_is_zero_does_not_matter():
    model = two_convolutions(nn.BatchNorm2d(8))
    groups = filter_groups(model)
    members = tuple(x for x in groups.layers[0].members if x.name != "0.bias")
    assert zero_invariance(model, planted(groups, "0", members=members), IMAGE)["0"] == ""


def test_a_shifted_index_is_noticed():
    model = two_convolutions(nn.BatchNorm2d(8), nn.ReLU())
    groups = filter_groups(model)
    first, *others = groups.layers[0].members
    shifted = [replace(x, index=torch.arange(8).roll(1)) for x in others]
    causes = zero_invariance(model, planted(groups, "0", members=(first, *shifted)), IMAGE)
    assert causes["0"] == "the bias of '0' is in no group"  # not in the one of its filter


def test_groups_of_ones_own():
    model = mlp(4, 6, 2)
    rows = Member("0.weight", model[0].weight, (0,), torch.tensor([0, 0, 1, 1, 2, 2]))
    bias = Member("0.bias", model[0].bias, (0,), torch.tensor([0, 0, 1, 1, 2, 2]))
    pairs = GroupedLayer("0", "pairs", 3, (rows, bias), removable=True)
    assert zero_invariance(model, Groups([pairs]), torch.ones(1, 4)) == {"0": ""}
    columns = Member("0.weight", model[0].weight, (1,))
    inputs = GroupedLayer("0", "columns", 4, (columns,), removable=True)
    assert zero_invariance(model, Groups([inputs]), torch.ones(1, 4)) == {
        "0": "its groups are not the channels that a layer makes"
    }


def test_the_model_is_not_touched():
    model = Residual().train()
    model.stem.eval()
    model.outer.weight.requires_grad_(False)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with_invariance(model, filter_groups(model), IMAGE)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == [True, False, *[True] * 4]
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_no_run_where_none_is_needed():
    """Residual blocks were found by a trial; the example fits no layer."""
    member = Member("0.weight", conv_network()[0].weight, (0,))
    groups = Groups([GroupedLayer("blocks", "layer", member.slices, (member,), removable=True)])
    assert zero_invariance(conv_network(), groups, "no tensor") == {"blocks": ""}


def test_the_table_tells():
    model = two_convolutions(nn.Sigmoid())
    groups = group_parameters(model, "filter", k=3, example_input=IMAGE)
    assert str(groups).splitlines()[1].split()[-5:] == [
        "'1'",
        "(Sigmoid)",
        "turns",
        "0",
        "into",
    ] or ("'1' (Sigmoid) turns 0 into 0.5" in str(groups))
    assert [layer.removable for layer in groups.layers] == [False]
    assert groups.layers[0].budget == 3
    assert [x.removable for x in group_parameters(model, "filter").layers] == [True]


def test_one_budget_for_all_survives():
    groups = group_parameters(Residual(), "filter", k=0.5, scope="global", example_input=IMAGE)
    assert groups.is_global
    again = with_invariance(Residual(), groups, IMAGE)
    assert again.budgets.tolist() == groups.budgets.tolist()
    assert [x.obstacle for x in again.layers] == [x.obstacle for x in groups.layers]


class Detached(nn.Sequential):
    def forward(self, inputs):
        return super().forward(inputs).detach()


def test_a_network_that_cannot_be_followed():
    model = Detached(nn.Linear(3, 4), nn.Linear(4, 2))
    layer = with_invariance(model, filter_groups(model), torch.ones(1, 3)).layers[0]
    assert not layer.removable
    assert layer.obstacle.startswith("not known: ")
    assert "gradient" in layer.obstacle


class Unused(nn.Module):
    """Whose second block waits for another input, as cross-attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.second = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x, other=None):
        return self.first(x) if other is None else self.second(other) + self.first(x)


def test_what_the_example_does_not_run_is_not_promised():
    found = group_parameters(Unused(), "hidden", example_input=torch.ones(2, 4))
    causes = {layer.name: layer.obstacle for layer in found.layers}
    assert causes == {"first.0": "", "second.0": "example_input does not run it"}
    both = group_parameters(Unused(), "hidden", example_input=(torch.ones(2, 4), torch.ones(2, 4)))
    assert all(layer.removable for layer in both.layers)
