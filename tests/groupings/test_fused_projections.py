"""Layouts of fused projections: found by a proof, taken out, and wrong ones caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_wgsef import Member, group_parameters
from lightning_wgsef.groupings.head import head_groups
from lightning_wgsef.groupings.hidden import hidden_groups
from lightning_wgsef.groupings.layout_proof import proved_layouts
from tests.helpers.groups import raises_naming
from tests.helpers.networks import fused
from tests.helpers.removal import drawn, removal

TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
LAYOUTS = [fused.ByKind, fused.ByHead, fused.ByHeadAlternating, fused.ByGroup]


def rows_of(layer: object, group: int) -> list[int]:
    """The rows of the fused layer in a group."""
    index = layer.members[0].index  # type: ignore[attr-defined]
    return (index == group).nonzero().flatten().tolist()


@pytest.mark.parametrize("attention", [*LAYOUTS, fused.InTwoParts, fused.Latent])
def test_layouts_are_found(attention: Callable[[], nn.Module]) -> None:
    network = nn.Sequential(attention(), attention())
    groups = group_parameters(network, "head", example_input=TOKENS)
    assert not groups.left_out
    expected = {
        fused.ByKind: [0, 1, 2, 3, 16, 17, 18, 19, 32, 33, 34, 35],
        fused.ByHead: list(range(12)),
        fused.ByHeadAlternating: list(range(12)),
        fused.ByGroup: list(range(16)),
        fused.InTwoParts: [0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19],
        fused.Latent: list(range(6)),
    }[attention]  # type: ignore[index]
    assert [rows_of(layer, 0) for layer in groups.layers] == [expected] * 2


@pytest.mark.parametrize(
    "attention", [*LAYOUTS, fused.Latent, lambda: fused.Crossed(True), lambda: fused.Crossed(False)]
)
def test_heads_of_fused_layers_are_taken_out(attention: Callable[[], nn.Module]) -> None:
    found = removal(nn.Sequential(attention(), attention()), TOKENS, "head")
    assert not found.obstacles
    left = found.groups.layers[0].count // 2
    again = head_groups(found.small, TOKENS)
    assert [x.count for x in again.layers] == ([left, left] if left > 1 else [])


def test_a_forward_that_needs_all_heads_is_known_before_training() -> None:
    """Parts of two heads cannot hold one head of each."""
    found = removal(nn.Sequential(fused.InTwoParts()), TOKENS, "head")
    assert found.obstacles == {"0": "the outputs change when zero groups are taken out"}


def test_a_layout_that_nobody_has_is_left_out() -> None:
    network = nn.Sequential(fused.Interleaved(), fused.ByHead())
    groups = group_parameters(network, "head", example_input=TOKENS)
    assert [layer.name for layer in groups.layers] == ["1"]
    assert "by head and by kind" in groups.left_out["0"]
    with raises_naming("share one head of keys and values"):
        group_parameters(fused.ManyQueries(), "head", example_input=TOKENS)


def test_without_an_example_a_layout_is_not_guessed() -> None:
    with raises_naming("is not known without an example_input"):
        group_parameters(fused.ByHead(), "head")


@pytest.mark.parametrize("attention", LAYOUTS)
def test_planted_wrong_layouts_are_caught(attention: Callable[[], nn.Module]) -> None:
    network = attention()
    (right,) = head_groups(network, TOKENS).layers
    for number, member in enumerate(right.members):
        index = member.index
        assert index is not None
        for wrong_index in (index.roll(1), index.flip(0), (index + 1) % right.count):
            members = list(right.members)
            members[number] = Member(member.name, member.parameter, member.axes, wrong_index)
            if member.name.endswith("query_key_value.bias") and torch.equal(wrong_index, index):
                continue
            wrong = replace(right, members=tuple(members))
            found, failed = proved_layouts(network, TOKENS, {"": [wrong]})
            assert list(failed) == [""], (member.name, wrong_index)
            assert not found


@pytest.mark.parametrize("zeros", [[0, 2], [1, 3]])
def test_weights_that_are_zero_let_no_wrong_layout_pass(zeros: list[int]) -> None:
    network = drawn(nn.Sequential(fused.ByHead()))
    (right,) = head_groups(network, TOKENS).layers
    for head in zeros:
        network[0].dense.weight.data[:, 4 * head : 4 * head + 4] = 0
        network[0].query_key_value.weight.data[12 * head : 12 * head + 12] = 0
    (again,) = head_groups(network, TOKENS).layers
    assert [rows_of(again, head) for head in range(4)] == [rows_of(right, h) for h in range(4)]


@pytest.mark.parametrize("in_turn", [False, True])
def test_fused_gates_are_hidden_units(in_turn: bool) -> None:
    network = nn.Sequential(fused.FusedGate(in_turn), fused.FusedGate(in_turn))
    assert hidden_groups(network).layers == ()
    found = removal(network, TOKENS, "hidden")
    assert not found.obstacles
    assert rows_of(found.groups.layers[0], 1) == ([2, 3] if in_turn else [1, 13])
    assert (
        found.small[1].gate_up_proj.out_features == 2 * found.small[1].down_proj.in_features == 12
    )


class Square(nn.Module):
    """Outside of nn.Sequential nothing but a trial tells that one layer reads the other."""

    def __init__(self, chained: bool) -> None:
        super().__init__()
        self.a, self.b, self.chained = nn.Linear(16, 16), nn.Linear(16, 16), chained

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.a(x))
        outputs: torch.Tensor = self.b(hidden) if self.chained else self.b(x) * hidden
        return outputs


def test_what_order_leaves_open_is_tried() -> None:
    network = nn.Sequential(Square(True), Square(False))
    groups = group_parameters(network, "hidden", example_input=TOKENS)
    assert [layer.name for layer in groups.layers] == ["0.a"]
    assert "acts like no layer of hidden units" in groups.left_out["1.a"]
    assert not removal(network, TOKENS, "hidden").obstacles


class NormOverHeads(fused.ByKind):
    """OLMo 2: queries are normalised over all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.q_norm, self.o_proj = nn.LayerNorm(16), nn.Linear(16, 16)
        del self.query_key_value, self.dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.unflatten(2, (-1, 4)).transpose(1, 2)
            for part in (self.q_norm(self.q_proj(x)), self.k_proj(x), self.v_proj(x))
        )
        mixed = (query @ key.transpose(2, 3)).softmax(-1) @ value
        outputs: torch.Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return outputs


def test_a_norm_over_all_heads_is_the_reason() -> None:
    found = removal(nn.Sequential(NormOverHeads()), TOKENS, "head")
    assert found.obstacles == {"0": "LayerNorm 'q_norm' normalises over all heads"}
