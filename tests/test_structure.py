"""What `structure` promises: a zero group can be cut out, and holds all that makes its channels.

What each group must hold is written by hand. A slow twin, which knows of no graph, cuts channels
out of a network; its outputs must be those of the network in which the group is zero.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import names, owners, without
from structure_cases import (
    CASES,
    OUTPUTS,
)
from structure_networks import (
    randomised,
    removed,
    run,
)
from transformer_networks import apart

from lightning_wgsef import Groups
from lightning_wgsef.groupings.structure import structure_groups

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
