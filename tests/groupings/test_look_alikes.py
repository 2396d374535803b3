"""Layers that only look like Linear: what computes x Wᵀ + b when tried is one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.head import head_groups
from lightning_wgsef.groupings.hidden import hidden_groups
from tests.helpers.networks.fused import ByKind
from tests.helpers.removal import removal

TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Dense(nn.Module):
    """As torch-geometric's own Linear."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels))
        self.bias = nn.Parameter(torch.randn(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Squared(Dense):
    """It looks the same, and is something else."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.square(), self.bias)


class Block(nn.Module):
    def __init__(self, kind: type[Dense]) -> None:
        super().__init__()
        self.up, self.down = kind(16, 24), kind(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.down(torch.tanh(self.up(x)))
        return outputs


def test_what_acts_like_linear_is_one() -> None:
    found = removal(nn.Sequential(Block(Dense)), TOKENS, "hidden")
    assert not found.obstacles
    assert found.small[0].up.out_channels == found.small[0].down.in_channels == 12
    assert hidden_groups(nn.Sequential(Block(Squared))).layers == ()


@pytest.mark.parametrize("kind", [Dense, Squared])
def test_projections_that_look_like_linear(kind: type[Dense]) -> None:
    attention = ByKind()
    attention.query_key_value = kind(16, 48)  # type: ignore[assignment]
    groups = head_groups(attention, TOKENS)
    if kind is Dense:
        assert groups.counts == [4]
        assert not removal(attention, TOKENS, "head").obstacles
    else:
        assert "test_look_alikes.Squared, which does not compute x Wᵀ + b" in groups.left_out[""]


class Adapter(nn.Module):
    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.base_layer(x)
        return outputs


def test_an_adapter_is_merged_first() -> None:
    attention = ByKind()
    attention.query_key_value = Adapter(attention.query_key_value)  # type: ignore[assignment]
    assert "merge the adapter into it first" in head_groups(attention, TOKENS).left_out[""]
