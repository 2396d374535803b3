"""What `structure` promises: a zero group can be cut out, and holds all that makes its channels.

What each group must hold is written by hand. A slow twin, which knows of no graph, cuts channels
out of a network; its outputs must be those of the network in which the group is zero.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import names, owners, raises_naming, without
from structure_networks import (
    Concatenated,
    ConvNeXt,
    Depthwise,
    Embedded,
    Residual,
    Shared,
    Tie,
    TwoInputs,
    UNet,
    VisionTransformer,
    made,
    own,
    parts,
    randomised,
    read,
    removed,
    run,
    runs,
    weights,
)
from torch import nn
from torch.nn import functional
from transformer_networks import apart, given, hugging_face

from lightning_wgsef import Groups, group_parameters
from lightning_wgsef.groupings.structure import structure_groups

IMAGE, SIGNAL, VECTOR = given(2, 3, 8, 8), given(2, 3, 8), given(2, 5)
TOKENS = torch.tensor([[3, 7, 1], [0, 8, 7]])
EXACT = 1e-10  # relative, in float64
OUTPUTS = "its channels are the network's outputs"


def outputs(count, layer):
    return {layer: Tie(made(own(count), layer), reserved=OUTPUTS)}


def chain(count, layer, reader, *scales):
    """One layer with what scales its channels, and the layer that reads them."""
    return {layer: Tie(made(own(count), layer, *scales), read(own(count), reader))}


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU()),
        *(nn.Conv2d(6, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1)),
    )


CASES = {  # network, example input, what must be found
    "chain": (
        convolutions,
        IMAGE,
        chain(6, "0", "3", "1") | chain(4, "3", "5") | outputs(2, "5"),
    ),
    "residual": (
        Residual,
        IMAGE,
        {
            "conv": Tie(
                made(own(4), "conv", "norm", "a_norm2") | weights(own(4), "a_conv2"),
                read(own(4), "a_conv1", "b_conv1", "b_shortcut"),
            ),
            "a_conv1": Tie(
                weights(own(6), "a_conv1") | made(own(6), "a_norm1"), read(own(6), "a_conv2")
            ),
            "b_conv1": Tie(
                weights(own(6), "b_conv1") | made(own(6), "b_norm1"), read(own(6), "b_conv2")
            ),
            "b_conv2": Tie(
                weights(own(5), "b_conv2") | made(own(5), "b_norm2", "b_shortcut"),
                read(own(5), "fc"),
            ),
        }
        | outputs(3, "fc"),
    ),
    "depthwise": (
        Depthwise,
        IMAGE,
        {
            "stem": Tie(made(own(4), "stem", "narrow"), read(own(4), "wide", "fc")),
            "wide": Tie(
                weights(own(6), "wide") | made(own(6), "norm1", "each", "norm2"),
                read(own(6), "narrow"),
            ),
        }
        | outputs(2, "fc"),
    ),
    "grouped": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 12, 3, groups=2)),
            *(nn.BatchNorm2d(12), nn.SiLU(), nn.Conv2d(12, 2, 1)),
        ),
        IMAGE,
        {
            "0": Tie(made(parts(4, 2), "0"), read(own(4), "2")),
            "2": Tie(made(parts(6, 2), "2", "3"), read(parts(6, 2), "5")),
        }
        | outputs(2, "5"),
    ),
    "concatenated": (
        Concatenated,
        IMAGE,
        {
            "a": Tie(made(own(4), "a", "norm"), read(own(4), "b", "c")),
            "b": Tie(made(own(3), "b") | made(own(3, 4), "norm"), read(own(3, 4), "c")),
        }
        | outputs(2, "c"),
    ),
    "flattened": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.MaxPool2d(3), nn.Flatten()),
            *(nn.Linear(16, 6), nn.SiLU(), nn.Linear(6, 2)),
        ),
        IMAGE,
        {"0": Tie(made(own(4), "0"), read(runs(4, 4), "4"))} | chain(6, "4", "6") | outputs(2, "6"),
    ),
    "unet": (
        UNet,
        IMAGE,
        {
            "encoder": Tie(
                made(own(4), "encoder"), read(own(4), "bottom") | read(own(4, 6), "decoder")
            ),
            "bottom": Tie(made(own(5), "bottom"), read(own(5), "up", axis=0)),
            "up": Tie(made(own(6), "up", axis=1), read(own(6), "decoder")),
        }
        | chain(4, "decoder", "last")
        | outputs(2, "last"),
    ),
    "shared": (
        Shared,
        IMAGE,
        {"stem": Tie(made(own(4), "stem", "twice"), read(own(4), "twice", "last"))}
        | outputs(2, "last"),
    ),
    "one axis": (
        lambda: nn.Sequential(
            *(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.SiLU(), nn.Conv1d(4, 5, 3)),
            *(nn.SiLU(), nn.Flatten(), nn.Linear(20, 2)),
        ),
        SIGNAL,
        chain(4, "0", "3", "1")
        | {"3": Tie(made(own(5), "3"), read(runs(5, 4), "6"))}
        | outputs(2, "6"),
    ),
    "slopes": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.PReLU(6)),
            nn.Conv2d(6, 2, 3),
        ),
        IMAGE,
        {
            "0": Tie(
                made(own(6), "0", "1") | weights(own(6), "2"),
                read(own(6), "3"),
            )
        }
        | outputs(2, "3"),
    ),
    "layer norm": (
        lambda: nn.Sequential(
            *(nn.Linear(5, 4), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 6)),
            *(nn.RMSNorm(6), nn.Linear(6, 2)),
        ),
        VECTOR,
        {
            "0": Tie(
                made(own(4), "0", "1"),
                read(own(4), "3"),
                normalised=True,
            ),
            "3": Tie(
                made(own(6), "3") | weights(own(6), "4"),
                read(own(6), "5"),
                normalised=True,
            ),
        }
        | outputs(2, "5"),
    ),
    "group norm": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.GroupNorm(1, 6), nn.SiLU(), nn.Conv2d(6, 4, 3)),
            *(nn.GroupNorm(4, 4), nn.Conv2d(4, 2, 1)),
        ),
        IMAGE,
        {
            "0": Tie(
                made(own(6), "0", "1"),
                read(own(6), "3"),
                normalised=True,
            )
        }
        | chain(4, "3", "5", "4")
        | outputs(2, "5"),
    ),
    "convnext": (
        ConvNeXt,
        IMAGE,
        {
            "patches": Tie(
                made(own(4), "patches", "each", "norm", "narrow") | {"scale": (0, own(4))},
                read(own(4), "wide", "fc"),
                reserved="residual stream of 'patches', 'narrow'",
                normalised=True,
            )
        }
        | chain(6, "wide", "narrow")
        | outputs(3, "fc"),
    ),
    "vision transformer": (
        VisionTransformer,
        IMAGE,
        chain(6, "block.linear1", "block.linear2") | outputs(3, "fc"),
    ),
    "embedded": (
        Embedded,
        TOKENS,
        {
            "narrow": Tie(
                made(own(4), "narrow") | weights(own(4), "tokens", axis=1),
                read(own(4), "wide", "last"),
            )
        }
        | chain(6, "wide", "narrow")
        | outputs(9, "last"),
    ),
    "tied embedding": (
        lambda: Embedded(tied=True),
        TOKENS,
        {
            "narrow": Tie(
                made(own(4), "narrow") | weights(own(4), "tokens", axis=1), read(own(4), "wide")
            )
        }
        | chain(6, "wide", "narrow"),
    ),
    "normalised embedding": (
        lambda: Embedded(norm=nn.RMSNorm(4)),
        TOKENS,
        {
            "narrow": Tie(
                made(own(4), "narrow")
                | weights(own(4), "tokens", axis=1)
                | weights(own(4), "norm"),
                read(own(4), "wide", "last"),
                reserved="residual stream of 'narrow', 'tokens'",
                normalised=True,
            )
        }
        | chain(6, "wide", "narrow")
        | outputs(9, "last"),
    ),
    "two inputs": (
        TwoInputs,
        (IMAGE, VECTOR),
        {"image": Tie(made(own(4), "image", "vector"), read(own(4), "last"))} | outputs(2, "last"),
    ),
}
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
        return replace(found, members=tuple(x for kept in members.values() for x in kept))

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
        (lambda x: functional.pad(x, (0, 0, 0, 0, 1, 1)), nn.Conv2d(8, 2, 1)),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1), nn.Linear(288, 2)),
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
def test_recurrent_layers_are_left_out(kind):
    reserved, left_out = reasons(Recurrent().to(kind), given(2, 3, 5).to(kind))
    assert reserved == {"last": OUTPUTS}
    assert set(left_out) == {"first", "recurrent"}
    assert "grouping='head'" in left_out["first"]


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
