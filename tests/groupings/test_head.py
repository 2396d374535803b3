"""What `head` promises: a zero head adds nothing and owns what it should, in every kind of module.

Expected outputs come from networks in which the contribution of the head is cut: by a slow twin
for torch's module, by a hook before the output projection for others.
"""

import math
import re
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from lightning_wgsef.groupings.group_parameters import group_parameters
from lightning_wgsef.groupings.head import head_groups
from lightning_wgsef.network import attention as attention
from lightning_wgsef.network.attention import ProjectionNames, register_projections
from tests.helpers.groups import members, names, owners
from tests.helpers.networks.transformers import (
    HUGGING_FACE,
    GroupedQueryAttention,
    apart,
    drawn,
    given,
    hugging_face,
    output_of,
    shifted,
    zeroed,
)

# --- torch's module ----------------------------------------------------------------------------

KINDS = {
    "packed": {},
    "packed, no bias": {"bias": False},
    "separate": {"kdim": 5, "vdim": 7},
    "separate, no bias": {"kdim": 5, "vdim": 7, "bias": False},
    "extra key and value": {"add_bias_kv": True},
    "extra zeros": {"add_zero_attn": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def torch_attention(kind):
    """A module of 3 heads of width 4, and its arguments."""
    module = drawn(nn.MultiheadAttention(12, 3, batch_first=True, **KINDS[kind]))
    return module, [given(2, 5, width) for width in (12, module.kdim, module.vdim)]


def slow_attention(module, inputs, cut=None):
    """The module's output from its definition, head by head, without the head ``cut``."""
    width = module.embed_dim
    if module.in_proj_weight is not None:
        weights = module.in_proj_weight.split(width)
    else:
        weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    biases = [0.0] * 3 if module.in_proj_bias is None else module.in_proj_bias.split(width)
    extra = [None, module.bias_k, module.bias_v]
    parts = []
    for x, weight, bias, more in zip(inputs, weights, biases, extra, strict=True):
        part = x @ weight.T + bias
        if more is not None:
            part = torch.cat([part, more.expand(len(part), 1, width)], 1)
        parts.append(part)
    if module.add_zero_attn:
        parts[1:] = [torch.cat([x, torch.zeros(len(x), 1, width)], 1) for x in parts[1:]]
    output = torch.zeros(len(inputs[0]), inputs[0].shape[1], width)
    if module.out_proj.bias is not None:
        output = output + module.out_proj.bias
    for head in range(module.num_heads):
        own = slice(head * module.head_dim, (head + 1) * module.head_dim)
        queries, keys, values = (part[..., own] for part in parts)
        looks = (queries @ keys.transpose(1, 2) / math.sqrt(module.head_dim)).softmax(-1)
        if head != cut:
            output = output + looks @ values @ module.out_proj.weight[:, own].T
    return output


def torch_error(kind, grouping=head_groups):
    """How far the output with a zero head is from that without it, over all heads."""
    module, inputs = torch_attention(kind)
    with torch.no_grad():
        return max(
            apart(slow_attention(module, inputs, cut=head), pruned(*inputs)[0])
            for head in range(3)
            for pruned in [zeroed(module, grouping, "", head)]
        )


@every_kind
def test_a_zero_head_of_torch_adds_nothing(kind):
    module, inputs = torch_attention(kind)
    with torch.no_grad():
        whole = module(*inputs)[0]
        assert apart(whole, slow_attention(module, inputs)) < 1e-5
        for head in range(3):  # every head matters
            assert apart(whole, slow_attention(module, inputs, cut=head)) > 0.05
    assert torch_error(kind) < 1e-5


@every_kind
def test_every_weight_of_torch_belongs_to_its_head(kind):
    module, _ = torch_attention(kind)
    layer = head_groups(module).layers[0]
    assert (layer.count, layer.removable, layer.grouping) == (3, True, "head")
    claimed = {member.name for member in layer.members}
    assert claimed == {name for name, _ in module.named_parameters()} - {"out_proj.bias"}
    heads = np.repeat([0, 1, 2], 4)
    for member in layer.members:
        found = owners(member)
        if member.name in ("out_proj.weight", "bias_k", "bias_v"):
            assert (found == heads).all()
        else:
            packed = np.tile(heads, len(found) // 12)
            assert (found.reshape(len(packed), -1) == packed[:, None]).all()


@pytest.mark.parametrize(
    ("kind", "member"),
    [
        ("packed", "in_proj_weight"),
        ("packed", "in_proj_bias"),
        ("packed", "out_proj.weight"),
        ("separate", "q_proj_weight"),
        ("separate", "k_proj_weight"),
        ("separate", "v_proj_weight"),
        ("extra key and value", "bias_k"),
        ("extra key and value", "bias_v"),
    ],
)
def test_a_head_off_by_one_is_noticed(kind, member):
    assert torch_error(kind, shifted(head_groups, member, by=4)) > 0.01


def test_another_order_of_packing_is_noticed(monkeypatch):
    """As if the rows lay head by head, each with its query, key and value."""

    def interleaved(roles, widths, count, parameter):
        return torch.arange(count).repeat_interleave(sum(widths[role] for role in roles) // count)

    monkeypatch.setattr("lightning_wgsef.groupings.head._owners", interleaved)
    assert torch_error("packed") > 0.01
    assert fused_error(4) > 0.01


def attending(module, cut):
    """The slow twin as a forward of torch's module."""
    return lambda queries, *_, **__: (slow_attention(module, [queries] * 3, cut), None)


@pytest.mark.parametrize("training", [True, False])  # in eval mode, torch takes its fast path
@pytest.mark.parametrize("norm_first", [True, False])
def test_heads_of_a_transformer_encoder(training, norm_first):
    layer = nn.TransformerEncoderLayer(
        12, 3, 16, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    network = drawn(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).train(training)
    inputs = given(2, 5, 12)
    assert names(head_groups(network)) == ["layers.0.self_attn", "layers.1.self_attn"]
    for head in range(3):
        pruned = zeroed(network, head_groups, "layers.1.self_attn", head)
        last = drawn(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).layers[1]
        with torch.no_grad():
            last.train(True)
            last.self_attn.forward = attending(network.layers[1].self_attn, head)
            expected = last(network.layers[0](inputs))
            assert apart(expected, pruned(inputs)) < 1e-5
            assert apart(expected, network(inputs)) > 0.005


def test_self_and_cross_attention_of_a_decoder():
    groups = head_groups(nn.TransformerDecoderLayer(12, 3, 16))
    assert names(groups) == ["self_attn", "multihead_attn"]
    assert groups.left_out == {}
    groups.check_disjoint()


# --- modules known by the names of their layers ---------------------------------------------------


def cut_before(layer, columns):
    """Let ``layer`` read zeros in these columns."""

    def hook(_, inputs):
        kept = torch.ones(inputs[0].shape[-1])
        kept[columns] = 0
        return (inputs[0] * kept, *inputs[1:])

    return layer.register_forward_pre_hook(hook)


def hooked_error(model, inputs, name, output, width, grouping=head_groups):
    """How far outputs with a zero head are from those with its columns cut, over all heads."""
    count = {layer.name: layer.count for layer in grouping(model).layers}[name]
    error = 0.0
    whole = output_of(model, inputs)
    for head in range(count):
        hook = cut_before(output, slice(head * width, (head + 1) * width))
        expected = output_of(model, inputs)
        hook.remove()
        assert apart(expected, whole) > 1e-3  # the head matters
        pruned = zeroed(model, grouping, name, head)
        error = max(error, apart(expected, output_of(pruned, inputs)))
    return error


def fused_error(key_value_heads, fused=True, grouping=head_groups):
    module = drawn(GroupedQueryAttention(key_value_heads, fused))
    width = 12 // key_value_heads
    inputs = given(2, 5, 8)
    return hooked_error(module, inputs, "", module.last, width, grouping)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("key_value_heads", [2, 4])
def test_heads_that_share_keys_and_values_die_together(key_value_heads, fused):
    module = GroupedQueryAttention(key_value_heads, fused)
    layer = head_groups(module).layers[0]
    assert layer.count == key_value_heads
    total = sum(parameter.numel() for parameter in module.parameters()) - 8  # the output's bias
    assert layer.sizes().tolist() == [total / key_value_heads] * key_value_heads
    assert fused_error(key_value_heads, fused) < 1e-5


@pytest.mark.parametrize("fused", [True, False])
def test_heads_that_all_share_one_of_keys_and_values_are_left_out(fused):
    groups = head_groups(GroupedQueryAttention(1, fused))
    assert "4 heads share one head of keys and values" in groups.left_out[""]


def test_groups_of_a_fused_layer_are_queries_then_keys_then_values():
    weight, bias, output = head_groups(GroupedQueryAttention(2, fused=True)).layers[0].members
    expected = np.repeat([0, 1, 0, 1, 0, 1], [6, 6, 3, 3, 3, 3])
    assert (owners(weight) == expected[:, None]).all()
    assert (owners(bias) == expected).all()
    assert (owners(output) == np.repeat([0, 1], 6)).all()


@pytest.mark.parametrize(
    "member",  # a bias of the keys changes no output: all keys gain the same
    ["q_proj.weight", "q_proj.bias", "k_proj.weight", "v_proj.weight", "v_proj.bias"],
)
def test_one_head_off_by_one_is_noticed_with_shared_keys(member):
    assert fused_error(2, False, shifted(head_groups, member, by=3)) > 1e-3


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_a_zero_head_of_a_hugging_face_model_adds_nothing(kind):
    model, inputs, (name, output, width), _ = hugging_face(kind)
    groups = head_groups(model)
    assert names(groups) == [name.replace("1", "0"), name]
    assert groups.left_out == {}
    assert all(layer.removable for layer in groups.layers)
    groups.check_disjoint()
    module = model.get_submodule(name)
    parameters = {name for name, _ in model.named_parameters()}
    claimed = {
        x
        for x in parameters
        if x.startswith(f"{name}.") and "norm" not in x.lower() and not x.endswith(f"{output}.bias")
    }
    assert set(members(groups, name)) == claimed
    place = (name, module.get_submodule(output), width)
    assert hooked_error(model, inputs, *place) < 1e-5
    weight = members(groups, name)[0]
    assert hooked_error(model, inputs, *place, shifted(head_groups, weight, by=width)) > 1e-4


def test_cross_attention_of_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, add_cross_attention=True)
    layer = head_groups(transformers.GPT2Model(config).h[0].crossattention).layers[0]
    found = {member.name: owners(member) for member in layer.members}
    assert (found["q_attn.weight"] == np.repeat([0, 1], 4)).all()
    assert (found["c_attn.weight"] == np.tile(np.repeat([0, 1], 4), 2)).all()
    assert (found["c_proj.weight"] == np.repeat([0, 1], 4)[:, None]).all()


# --- what zero heads cannot be taken out of -------------------------------------------------------


def attention_with(**more):
    module = GroupedQueryAttention(4)
    for name, value in more.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("more", "obstacle"),
    [
        ({"q_norm": nn.RMSNorm(12)}, "RMSNorm 'q_norm' normalises over all heads"),
        ({"q_norm": nn.RMSNorm(3)}, ""),  # over the width of one head
        ({"norm": nn.LayerNorm(12)}, ""),  # behind the output
        ({"bias": nn.Embedding(7, 4)}, "'bias.weight' has an entry for every head"),
        ({"sinks": nn.Parameter(torch.zeros(4))}, "'sinks' has an entry for every head"),
        ({"sr": nn.Conv2d(12, 12, 4, 4)}, ""),  # PVT: as many heads as places of a kernel
    ],
)
def test_what_stands_against_taking_heads_out(more, obstacle):
    layer = head_groups(attention_with(**more)).layers[0]
    assert layer.obstacle == obstacle
    assert layer.removable is (obstacle == "")
    assert len(layer.members) == 7


# --- what is left out, and why --------------------------------------------------------------------


class StrangeAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.heads = 2


def whole_numbers():
    layer = nn.Linear(8, 12)
    layer.weight = nn.Parameter(torch.ones(12, 8, dtype=torch.int8), requires_grad=False)
    return layer


def reason(module):
    groups = head_groups(nn.ModuleDict({"block": module}))
    assert groups.layers == ()
    assert list(groups.left_out) == ["block"]
    return groups.left_out["block"]


def test_unknown_names_are_left_out_until_they_are_registered(monkeypatch):
    monkeypatch.setattr(attention, "PROJECTIONS", list(attention.PROJECTIONS))
    assert "block.a, block.b, block.c, block.d" in reason(StrangeAttention())
    assert "register_projections" in reason(StrangeAttention())
    register_projections(ProjectionNames("a", "b", "c", "d"))
    groups = head_groups(StrangeAttention())
    assert groups.counts == [2]
    assert groups.left_out == {}


@pytest.mark.parametrize("paths", [("q", "k", "", "o"), ("q", "k", "v", "v")])
def test_names_that_cannot_be(paths):
    before = list(attention.PROJECTIONS)
    with pytest.raises(ValueError, match=re.escape(str(ProjectionNames(*paths)))):
        register_projections(ProjectionNames(*paths))
    assert before == attention.PROJECTIONS


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"num_heads": 5}, ["5 heads", "queries 12, keys 12, values 12"]),
        ({"num_heads": None}, ["number of heads is unknown", "num_attention_heads"]),
        ({"num_key_value_heads": 2}, ["4 heads (2 of keys and values)", "keys 12"]),
        ({"head_dim": 4}, ["4 heads", "of width 4"]),
        ({"o_proj": nn.Linear(10, 8)}, ["inputs of the output projection 10"]),
        ({"k_proj": nn.Linear(8, 10)}, ["keys 10"]),
        (
            {"v_proj": nn.Identity()},
            ["v_proj is a torch.nn.modules.linear.Identity", "does not compute x Wᵀ + b"],
        ),
        ({"q_proj": nn.LazyLinear(12)}, ["q_proj", "lazy"]),
        ({"q_proj": whole_numbers()}, ["torch.int8"]),
    ],
)
def test_modules_that_do_not_fit_are_left_out(more, words):
    text = reason(attention_with(**more))
    assert [word for word in words if word not in text] == [], text


def test_a_fused_layer_that_does_not_fit_is_left_out():
    module = GroupedQueryAttention(4, fused=True)
    module.qkv = nn.Linear(8, 37)
    assert "37 outputs of 'block.qkv'" in reason(module)


def test_parametrised_weights_are_left_out():
    module = nn.MultiheadAttention(4, 2)
    nn.utils.parametrizations.orthogonal(module, "in_proj_weight")
    assert "in_proj_weight is computed from other tensors" in reason(module)
    module = GroupedQueryAttention(4)
    nn.utils.parametrizations.weight_norm(module.v_proj)
    assert "v_proj: its weight is computed from other tensors" in reason(module)


def test_tied_projections_are_left_out():
    pair = nn.ModuleDict({"a": GroupedQueryAttention(4), "b": GroupedQueryAttention(4)})
    pair["b"].k_proj.weight = pair["a"].k_proj.weight
    groups = head_groups(pair)
    assert groups.layers == ()
    for name, other in product("ab", "ab"):
        assert f"{other}.k_proj.weight" in groups.left_out[name]


def test_models_without_attention():
    groups = head_groups(nn.Sequential(nn.Linear(3, 4), nn.Conv2d(3, 4, 1)))
    assert groups.layers == ()
    assert groups.left_out == {}


def test_wrappers_do_not_show_in_names():
    network = nn.Sequential(nn.MultiheadAttention(4, 2), GroupedQueryAttention(2))
    expected = [member.name for layer in head_groups(network).layers for member in layer.members]
    network[0].out_proj = torch.compile(network[0].out_proj, backend="eager")
    network[1].q_proj = torch.compile(network[1].q_proj, backend="eager")
    groups = head_groups(torch.compile(network, backend="eager"))
    assert names(groups) == ["0", "1"]
    assert [member.name for member in groups.layout.members] == expected


class OwnAttention(nn.Module):
    """Projections with known names, and heads that nothing counts."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.v_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(8, 8)


@pytest.mark.parametrize("argument", ["include", "k"])
@pytest.mark.parametrize("pattern", ["*attn*", "attn", "attn?"])
@pytest.mark.parametrize("others", [0, 1])
def test_whoever_names_an_attention_is_told_why_it_cannot_be_grouped(argument, pattern, others):
    attention = {"attn": OwnAttention()} if pattern != "attn?" else {"attn1": OwnAttention()}
    more = {"other": nn.MultiheadAttention(8, 2)} if others else {}
    model = nn.ModuleDict({**attention, **more})
    arguments = {"include": pattern} if argument == "include" else {"k": {pattern: 1}}
    with pytest.raises(ValueError, match="number of heads is unknown") as caught:
        group_parameters(model, "head", **arguments)
    assert str(caught.value).startswith(f"{argument}: layer '{next(iter(attention))}' cannot be")


def test_a_pattern_of_nothing_where_nothing_can_be_grouped():
    with pytest.raises(ValueError, match="number of heads is unknown") as caught:
        group_parameters(nn.ModuleDict({"attn": OwnAttention()}), "head", include="*other*")
    assert "has no layer that grouping='head' can group" in str(caught.value)
