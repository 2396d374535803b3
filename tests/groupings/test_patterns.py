"""Layers by name: include and exclude, and names under wrappers."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_wgsef import group_parameters
from lightning_wgsef.network.layers import canonical_name
from tests.helpers.groups import OF_ANY_LAYER, mlp, names, raises_naming, stages, without

# --- include and exclude -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("include", "kept"),
    [
        (None, ["a.2", "b.0", "b.2", "head"]),
        ("b.0", ["b.0"]),
        (["b.0", "head"], ["b.0", "head"]),
        (("head", "b.0"), ["b.0", "head"]),  # in the order of the network
        ("b", ["b.0", "b.2"]),  # a prefix stands for what is inside
        ("*.2", ["a.2", "b.2"]),
        ("?.2", ["a.2", "b.2"]),
        ("[ab].2", ["a.2", "b.2"]),
        ("*", ["a.2", "b.0", "b.2", "head"]),  # a wildcard does not override the rules
        ("a", ["a.2"]),
        ("a.0", ["a.0"]),  # a name does
        (["*", "a.0"], ["a.0", "a.2", "b.0", "b.2", "head"]),
    ],
)
def test_include(include, kept):
    groups = group_parameters(stages(), "channel", include=include)
    assert names(groups) == kept
    assert set(groups.left_out) == {"a.0", "a.2", "b.0", "b.2", "head"} - set(kept)


@pytest.mark.parametrize(
    ("exclude", "kept"),
    [
        ("b.0", ["a.2", "b.2", "head"]),
        ("b", ["a.2", "head"]),
        (["a", "head"], ["b.0", "b.2"]),
        ("*.2", ["b.0", "head"]),
        ([], ["a.2", "b.0", "b.2", "head"]),
    ],
)
def test_exclude(exclude, kept):
    groups = group_parameters(stages(), "channel", exclude=exclude)
    assert names(groups) == kept
    wanted = set(kept) | {"a.0"}
    reasons = {r for name, r in groups.left_out.items() if name not in wanted}
    assert reasons <= {"named in exclude"}


def test_exclude_wins_over_include():
    groups = group_parameters(stages(), "channel", include=["b", "head"], exclude="b.2")
    assert names(groups) == ["b.0", "head"]
    assert groups.left_out["b.2"] == "named in exclude"
    assert groups.left_out["a.2"] == "not named in include"


def test_a_prefix_ends_at_a_dot():
    network = nn.Sequential(OrderedDict(first=mlp(2, 3), fc=mlp(3, 3), fc1=mlp(3, 3)))
    assert names(group_parameters(network, "channel", include="fc")) == ["fc.0"]


def test_a_frozen_layer_can_be_named():
    network = mlp(3, 4, 5, 2)
    network[2].weight.requires_grad_(False)
    assert names(group_parameters(network, "channel", include="2")) == ["2"]


def test_a_tied_layer_cannot_be_named():
    network = mlp(4, 4, 4, 4)
    network[4].weight = network[2].weight
    with raises_naming("include", "'4'", "cannot be grouped", "'2' (tied)"):
        group_parameters(network, "channel", include="4")


@pytest.mark.parametrize("argument", ["include", "exclude", "k"])
@pytest.mark.parametrize("pattern", ["conv", "A.2", "", "a.", "b.0.weight"])
def test_a_pattern_without_a_layer(argument, pattern):
    value = {pattern: 0.5} if argument == "k" else ["head", pattern]
    with raises_naming(f"{argument}:", f"{pattern!r} matches no layer", "a.0, a.2, b.0, b.2, head"):
        group_parameters(stages(), "channel", **{argument: value})


@pytest.mark.parametrize("arguments", [{"k": {2: 0.5}}, {"include": 2}, {"exclude": [2]}])
def test_a_pattern_that_is_no_string(arguments):
    """The layers of a Sequential have numbers for names: easily written without quotes."""
    with raises_naming(next(iter(arguments)), "2"):
        group_parameters(mlp(3, 4, 5), "channel", **arguments)


# --- names under wrappers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("", ""),
        ("conv1.weight", "conv1.weight"),
        ("_orig_mod", ""),
        ("_orig_mod.conv1", "conv1"),
        ("a._orig_mod.conv1", "a.conv1"),
        ("a._orig_mod", "a"),
        ("_orig_mod._orig_mod.a", "a"),
        ("_fsdp_wrapped_module.a._fsdp_wrapped_module.b", "a.b"),
        ("my_orig_mod.a", "my_orig_mod.a"),  # only whole names
        ("a._orig_mod_of_mine.b", "a._orig_mod_of_mine.b"),
        ("a._checkpoint_wrapped_module.b", "a.b"),
    ],
)
def test_canonical_names(name, canonical):
    assert canonical_name(name) == canonical


@pytest.mark.parametrize("make", OF_ANY_LAYER.values())
def test_a_model_that_is_a_layer(make):
    """Its parameters are called "weight" and "bias", as in its state_dict."""
    layer = nn.Linear(3, 2)
    assert {m.name for m in make(layer).layers[0].members} <= set(layer.state_dict())


def conv_net():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    return nn.Sequential(OrderedDict(stem=nn.Conv2d(1, 4, 3), block=block, head=nn.Conv2d(4, 2, 1)))


def compiled(module):
    return torch.compile(module, backend="eager")


def described(groups):
    return [(x.name, x.count, [m.name for m in x.members]) for x in groups.layers], groups.left_out


@pytest.mark.parametrize("grouping", OF_ANY_LAYER)
@pytest.mark.parametrize("part", ["", "block", "stem", "head", "block.0"])
def test_compiled_modules(grouping, part):
    """The same groups under the same names, whichever part is compiled."""
    plain = group_parameters(conv_net(), grouping)
    network = conv_net()
    if part == "":
        network = compiled(network)
    else:
        network.set_submodule(part, compiled(network.get_submodule(part)))
    assert described(group_parameters(network, grouping)) == described(plain)


def test_a_compiled_module_keeps_its_parameters():
    network = conv_net()
    network.block = compiled(network.block)
    groups = group_parameters(network, "channel", include="block.0")
    without(groups, 1)
    assert network.block._orig_mod[0].weight[:, 1].count_nonzero() == 0
