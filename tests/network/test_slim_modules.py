"""Attention without some heads: the same outputs as with these heads at zero."""

import copy
import warnings

import pytest
import torch
from torch import nn

from lightning_wgsef.groupings.head import head_groups
from lightning_wgsef.groupings.unit_removal import unit_removal
from lightning_wgsef.network.slim_modules import Skip, SlimAttention
from lightning_wgsef.slimming.dead_units import dead_units
from tests.helpers.groups import without
from tests.helpers.networks.transformers import drawn, given


def head_removal(model):
    return unit_removal(model, [(x.layer, x.dead) for x in dead_units(head_groups(model))])


KINDS = {
    "packed": {},
    "no bias": {"bias": False},
    "separate": {"kdim": 5, "vdim": 7},
    "extra key and value": {"add_bias_kv": True},
    "extra zeros": {"add_zero_attn": True},
    "length first": {"batch_first": False},
}
DEAD = (1, 3)


def pair(kind="packed", **more):
    """A module of 4 heads of width 3 in which two are zero, and one without these."""
    options = {"batch_first": True, **KINDS[kind], **more}
    masked = drawn(nn.MultiheadAttention(12, 4, **options))
    without(head_groups(masked), list(DEAD))
    slim = copy.deepcopy(masked)
    head_removal(slim).apply(slim)
    return masked, slim


def inputs(module, batch=2):
    widths = (12, module.kdim, module.vdim)
    found = [given(batch, 5, width) for width in widths]
    return found if module.batch_first else [x.transpose(0, 1) for x in found]


def same(one, other):
    return torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_outputs(kind, need_weights, training):
    masked, slim = pair(kind)
    assert isinstance(slim, SlimAttention)
    assert slim.num_heads == 2
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in masked.parameters())
    masked.train(training), slim.train(training)
    expected, _ = masked(*inputs(masked), need_weights=need_weights)
    output, weights = slim(*inputs(masked), need_weights=need_weights)
    assert same(output, expected)
    assert (weights is not None) == need_weights


MASKS = {
    "causal": {"attn_mask": torch.ones(5, 5).triu(1).bool()},
    "numbers": {"attn_mask": torch.randn(5, 5, generator=torch.Generator().manual_seed(0))},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "a head each": {"attn_mask": torch.randn(8, 5, 5, generator=torch.Generator().manual_seed(1))},
    "both": {
        "attn_mask": torch.ones(5, 5).triu(1).bool(),
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 4 + [True]]),
    },
    "hint": {"attn_mask": torch.ones(5, 5).triu(1).bool(), "is_causal": True},
}


# With the hint, torch's own module hides the extra key.
MASKED = [
    (mask, kind)
    for mask in MASKS
    for kind in ("packed", "extra key and value", "extra zeros")
    if mask != "hint" or kind == "packed"
]


@pytest.mark.parametrize(("mask", "kind"), MASKED)
@pytest.mark.parametrize("need_weights", [True, False])
def test_masks(mask, need_weights, kind):
    masked, slim = pair(kind)
    options = {**MASKS[mask], "need_weights": need_weights}
    expected, _ = masked(*inputs(masked), **options)
    output, _ = slim(*inputs(masked), **options)
    assert same(output, expected)
    assert not same(output, slim(*inputs(masked))[0])  # the mask matters


def test_weights_that_are_returned_are_those_of_the_kept_heads():
    masked, slim = pair()
    options = {"average_attn_weights": False}
    expected, found = masked(*inputs(masked), **options)[1], slim(*inputs(masked), **options)[1]
    assert same(found, expected[:, [0, 2]])
    average = slim(*inputs(masked))[1]
    assert same(average, expected[:, [0, 2]].mean(1))


def test_without_a_batch():
    masked, slim = pair()
    alone = [x[0] for x in inputs(masked)]
    padding = torch.tensor([False] * 4 + [True])
    expected, expected_weights = masked(*alone, key_padding_mask=padding)
    output, weights = slim(*alone, key_padding_mask=padding)
    assert same(output, expected)
    assert weights.shape == expected_weights.shape


def test_dropout_acts_in_training_alone():
    _, slim = pair(dropout=0.5)
    for need_weights in (True, False):
        one, two = (slim.train()(*inputs(slim), need_weights=need_weights)[0] for _ in range(2))
        assert not same(one, two)
        one, two = (slim.eval()(*inputs(slim), need_weights=need_weights)[0] for _ in range(2))
        assert same(one, two)


def test_heads_go_in_several_rounds():
    masked, slim = pair()
    # Of the two that are left, the second, which was the third.
    without(head_groups(slim), 1)
    without(head_groups(masked), 2)
    head_removal(slim).apply(slim)
    assert (slim.num_heads, slim.kept_heads, slim.full_heads) == (1, (0,), 4)
    mask = MASKS["a head each"]
    assert same(slim(*inputs(slim), **mask)[0], masked(*inputs(slim), **mask)[0])


@pytest.mark.parametrize("training", [True, False])
def test_in_an_encoder(training):
    """In evaluation, torch has a fast path that takes all heads for granted."""
    layer = nn.TransformerEncoderLayer(12, 4, 16, dropout=0.0, batch_first=True)
    masked = drawn(nn.TransformerEncoder(layer, 2))
    groups = head_groups(masked)
    without(groups, [0, 2, 3, 5])
    slim = copy.deepcopy(masked)
    plan = head_removal(slim)
    plan.apply(slim)
    assert plan.heads == {"layers.0.self_attn": [1], "layers.1.self_attn": [0, 2, 3]}
    masked.train(training), slim.train(training)
    assert not slim.use_nested_tensor
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*nested tensors is in prototype stage")
        x = given(2, 5, 12)
        assert same(slim(x), masked(x))
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        expected, found = (net(x, src_key_padding_mask=padding) for net in (masked, slim))
        assert same(found[0], expected[0])
        assert same(found[1, :3], expected[1, :3])


def test_hooks_and_identity_survive():
    masked = drawn(nn.MultiheadAttention(12, 4, batch_first=True))
    calls, own = [], list(masked.parameters())
    masked.register_forward_hook(lambda *_: calls.append(1))
    without(head_groups(masked), [0])
    head_removal(masked).apply(masked)
    masked(*inputs(masked))[0].sum().backward()
    assert calls == [1]
    assert all(one is other for one, other in zip(masked.parameters(), own, strict=True))
    assert all(p.grad.shape == p.shape for p in own)


def test_a_whole_module_keeps_one_head():
    masked = drawn(nn.MultiheadAttention(12, 4))
    without(head_groups(masked), [0, 1, 2, 3])
    assert head_removal(masked).heads == {"": [0]}


def test_skip():
    x = torch.ones(2)
    assert Skip()(x, torch.zeros(1), mask=None) is x
    assert Skip()(mask=None, inputs=x) is x
