"""What `structure` promises: a zero group can be cut out, and holds all that makes its channels.

What each group must hold is written by hand. A slow twin, which knows of no graph, cuts channels
out of a network; its outputs must be those of the network in which the group is zero.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_wgsef import Groups, group_parameters
from lightning_wgsef.groupings.structure import structure_groups
from tests.helpers.groups import names, owners, raises_naming, without
from tests.helpers.networks.structure import (
    Embedded,
    TwoInputs,
    VisionTransformer,
    randomised,
    removed,
    run,
)
from tests.helpers.networks.structure_cases import (
    CASES,
    IMAGE,
    OUTPUTS,
    TOKENS,
    VECTOR,
    convolutions,
)
from tests.helpers.networks.transformers import apart, given, hugging_face

EXACT = 1e-10  # relative, in float64
every_case = pytest.mark.parametrize("kind", CASES)


def case(kind):
    """The network in float64, its example input, and what must be found."""
    make, example, expected = CASES[kind]
    torch.manual_seed(0)
    return randomised(make()), wide(example), expected


def wide(example):
    if isinstance(example, tuple):
        return tuple(x.double() for x in example)
    return example.double() if example.is_floating_point() else example


def errors(kind, mistake=lambda layer: layer):
    """For every layer that counts: how far outputs with a zero group are from those without it."""
    network, example, expected = case(kind)
    zeroed, found = copy.deepcopy(network), {}
    layers = {layer.name: layer for layer in structure_groups(zeroed, example).layers}
    for name, tie in expected.items():
        if tie.reserved == OUTPUTS:
            continue
        with torch.no_grad():
            whole, worst = run(network, example), 0.0
            for group in range(layers[name].count):
                zeroed.load_state_dict(network.state_dict())
                without(Groups([mistake(layers[name])]), group)
                slow = run(removed(network, tie, group), example)
                assert apart(whole, slow) > 1000 * EXACT  # the group matters
                worst = max(worst, apart(slow, run(zeroed, example)))
        found[name] = worst
    return found


@every_case
def test_groups_hold_what_is_written_here(kind):
    network, example, expected = case(kind)
    groups = structure_groups(network, example)
    assert set(names(groups)) == set(expected)
    groups.check_disjoint()
    parameters = dict(network.named_parameters())
    for layer in groups.layers:
        tie = expected[layer.name]
        assert (layer.grouping, layer.reserved) == ("structure", tie.reserved)
        assert {member.name for member in layer.members} == set(tie.made)
        for member in layer.members:
            axis, places = tie.made[member.name]
            assert layer.count == len(places)
            assert member.parameter is parameters[member.name]
            wanted = np.full(member.parameter.shape, -1)
            for group, own_places in enumerate(places):
                np.moveaxis(wanted, axis, 0)[own_places] = group
            assert (owners(member) == wanted).all()


@every_case
def test_a_zero_group_can_be_cut_out_unless_a_norm_mixes_it(kind):
    _, _, expected = case(kind)
    for name, error in errors(kind).items():
        if expected[name].normalised:
            assert error > 1e-3
        else:
            assert error < EXACT


DECISIVE = [  # nothing behind these makes a channel zero
    ("chain", "0", "1.weight"),
    ("chain", "0", "1.bias"),
    ("chain", "3", "3.weight"),
    ("chain", "3", "3.bias"),
    ("residual", "conv", "norm.bias"),
    ("residual", "conv", "a_norm2.weight"),
    ("residual", "b_conv2", "b_shortcut.bias"),
    ("depthwise", "stem", "narrow.bias"),
    ("depthwise", "wide", "norm2.weight"),
    ("grouped", "0", "0.weight"),
    ("grouped", "2", "3.bias"),
    ("concatenated", "a", "a.weight"),
    ("concatenated", "b", "norm.bias"),
    ("flattened", "0", "0.bias"),
    ("unet", "encoder", "encoder.weight"),
    ("unet", "up", "up.weight"),
    ("shared", "stem", "twice.weight"),
    ("one axis", "0", "1.bias"),
    ("slopes", "0", "1.bias"),
    ("vision transformer", "block.linear1", "block.linear1.bias"),
    ("embedded", "narrow", "narrow.bias"),
    ("tied embedding", "narrow", "tokens.weight"),
    ("two inputs", "image", "vector.weight"),
]
every_decisive = pytest.mark.parametrize(("kind", "layer", "member"), DECISIVE)


def planted(kind, layer, member, change):
    """The error of the layer with ``change`` made to the list of its one member."""

    def mistake(found):
        if found.name != layer:
            return found
        members = {x.name: [x] for x in found.members}
        change(members[member])
        kept = tuple(x for of_one in members.values() for x in of_one)
        return replace(found, members=kept, statistics=())  # a mean of zero would hide it

    return errors(kind, mistake)[layer]


@every_decisive
def test_a_member_that_is_missing_is_noticed(kind, layer, member):
    assert planted(kind, layer, member, lambda members: members.pop()) > EXACT


@every_decisive
def test_an_index_off_by_one_is_noticed(kind, layer, member):
    def roll(members):
        index = torch.arange(members[0].slices) if members[0].index is None else members[0].index
        members[0] = replace(members[0], index=index.roll(1))

    assert planted(kind, layer, member, roll) > EXACT


# --- what is reserved or left out, and why --------------------------------------------------------


def reasons(network, example):
    groups = structure_groups(network, example)
    return {layer.name: layer.reserved for layer in groups.layers}, groups.left_out


def test_frozen_layers_are_reserved():
    network = convolutions()
    network[1].bias.requires_grad_(False)
    reserved, left_out = reasons(network, IMAGE)
    assert reserved == {"0": "frozen: 1.bias has no gradient", "3": "", "5": OUTPUTS}
    assert left_out == {}
    groups = group_parameters(network, "structure", example_input=IMAGE)
    assert names(groups) == ["3"]
    assert groups.left_out == {name: reserved[name] for name in ("0", "5")}


def test_tied_layers_and_attention_are_left_out():
    pair = nn.Sequential(nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 2))
    pair[2].weight = pair[0].weight
    reserved, left_out = reasons(pair, VECTOR)
    assert reserved == {"4": OUTPUTS}
    assert left_out == {
        "0": "'0' and '2' share '0.weight' (tied) for different channels",
        "2": "'2': its weight is that of '0' (tied)",
    }
    assert reasons(Embedded(tied=True), TOKENS)[1] == {
        "last": "'last': its weight is that of 'tokens' (tied)"
    }
    mixed = reasons(VisionTransformer(), IMAGE)[1]
    assert {name for name, why in mixed.items() if "grouping='head'" in why} == {
        "patches",
        "block.linear2",
    }


def test_channels_of_the_input_and_single_channels_are_left_out():
    class OnInput(nn.Sequential):
        def forward(self, x):
            return super().forward(x + self[0](x))

    network = OnInput(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 1))
    assert reasons(network, IMAGE) == (
        {"2": OUTPUTS},
        {"0": "tied to the network's input", "1": "it has one channel"},
    )


class Between(nn.Module):
    """Six channels, an operation on them, and a layer that reads what comes out."""

    def __init__(self, operation, reader):
        super().__init__()
        self.first, self.operation, self.reader = nn.Conv2d(3, 6, 3), operation, reader

    def forward(self, x):
        return self.reader(self.operation(self.first(x)))


ORDER = torch.tensor([2, 0, 5, 3, 1, 4])


@pytest.mark.parametrize(
    ("operation", "reader"),
    [
        (lambda x: x.flip(1), nn.Conv2d(6, 2, 1)),
        (lambda x: x.roll(1, -3), nn.Conv2d(6, 2, 1)),
        (lambda x: x.cumsum(1), nn.Conv2d(6, 2, 1)),
        (lambda x: x.softmax(1), nn.Conv2d(6, 2, 1)),
        (lambda x: x[:, ORDER], nn.Conv2d(6, 2, 1)),
        (lambda x: x.index_select(1, ORDER), nn.Conv2d(6, 2, 1)),
        (lambda x: functional.pad(x, (0, 0, 0, 0, 1, -1)), nn.Conv2d(6, 2, 1)),
        (nn.ChannelShuffle(2), nn.Conv2d(6, 2, 1)),
        (nn.LocalResponseNorm(3), nn.Conv2d(6, 2, 1)),
    ],
)
def test_what_moves_or_mixes_channels_is_left_out(operation, reader):
    reserved, left_out = reasons(Between(operation, reader), given(2, 3, 10, 8))
    assert reserved == {"reader": OUTPUTS}
    assert list(left_out) == ["first"]


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.flip(2),
        lambda x: x.roll((1, 1), (2, 3)),
        lambda x: x.flatten(2).softmax(-1).view_as(x),
        lambda x: functional.pad(x, (1, 1, 0, 2)),
        lambda x: functional.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: functional.interpolate(x, scale_factor=2, mode="nearest"),
        lambda x: x.permute(0, 2, 3, 1).roll((1, 1), (1, 2)).permute(0, 3, 1, 2),
    ],
)
def test_what_works_on_places_keeps_channels(operation):
    network = Between(operation, nn.Conv2d(6, 2, 1))
    assert reasons(network, given(2, 3, 10, 7)) == ({"first": "", "reader": OUTPUTS}, {})


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(6, 2)
        self.recurrent = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x):
        return self.last(self.recurrent(self.first(x))[0])


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_recurrent_layers_are_followed(kind):
    reserved, left_out = reasons(Recurrent().to(kind), given(2, 3, 5).to(kind))
    assert reserved == {"first": "", "last": OUTPUTS, "recurrent": ""}
    assert not left_out


def test_rotated_halves_come_to_an_end():
    model, inputs, _, _ = hugging_face("Llama")
    reserved, left_out = reasons(model, inputs)
    assert {name for name, why in reserved.items() if not why} == {
        f"layers.{number}.mlp.gate_proj" for number in (0, 1)
    }
    assert {name.rpartition(".")[2] for name in left_out} == {"q_proj", "k_proj", "v_proj"}


def test_weights_of_whole_numbers_do_not_matter():
    network = nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 2))
    network.register_parameter("counts", nn.Parameter(torch.ones(3).int(), requires_grad=False))
    assert reasons(network, VECTOR) == ({"0": "", "2": OUTPUTS}, {})


# --- the model and its example --------------------------------------------------------------------


@pytest.mark.parametrize(
    "example",
    [(IMAGE, VECTOR), {"image": IMAGE, "vector": VECTOR}, {"vector": VECTOR, "image": IMAGE}],
)
def test_examples_in_a_tuple_or_a_dict(example):
    groups = structure_groups(TwoInputs(), example)
    assert names(groups) == ["image", "last"]
    assert [member.name.split(".")[0] for member in groups.layers[0].members] == (
        ["image"] * 2 + ["vector"] * 2
    )


def test_the_model_is_not_touched():
    network = convolutions().train()
    network[3].weight.requires_grad_(False)
    network[1].eval()
    hook = network[0].register_forward_hook(lambda *_: None)
    before = {name: values.clone() for name, values in network.state_dict().items()}
    parameters, random = list(network.parameters()), torch.get_rng_state()
    structure_groups(network, IMAGE)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())
    assert all(x is y for x, y in zip(network.parameters(), parameters, strict=True))
    assert [x.requires_grad for x in parameters] == [True] * 4 + [False] + [True] * 3
    assert all(parameter.grad is None for parameter in parameters)
    assert [module.training for module in network] == [True, False, True, True, True, True]
    assert list(network[0]._forward_hooks) == [hook.id]
    assert not any(x._forward_hooks or x._forward_pre_hooks for x in network[1:])


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x).detach()


class Uncopyable(nn.Linear):
    def __deepcopy__(self, _):
        raise RuntimeError("not this one")


@pytest.mark.parametrize(
    ("network", "example", "words"),
    [
        (convolutions(), given(2, 5, 8, 8), ["example_input", "Sequential", "(2, 5, 8, 8)"]),
        (Detached(5, 2), VECTOR, ["Detached", "no output", "do not detach"]),
        (Uncopyable(5, 2), VECTOR, ["Uncopyable", "not this one", "make copy.deepcopy"]),
    ],
)
def test_what_breaks_says_what_to_do(network, example, words):
    with raises_naming(*words):
        structure_groups(network, example)
