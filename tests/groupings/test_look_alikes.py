"""Layers that only look like Linear: what computes x Wᵀ + b when tried is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef import group_parameters, load_slim, save_slim
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


class Counting(Dense):
    """It writes into a buffer and draws random numbers when it runs."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + 0 * torch.rand(())


def test_trying_a_layer_leaves_no_trace() -> None:
    network = Block(Counting)
    state, random = network.up.calls.clone(), torch.random.get_rng_state()
    groups = group_parameters(network, "filter")
    assert [layer.name for layer in groups.layers] == ["up"]
    assert torch.equal(network.up.calls, state)
    assert torch.equal(torch.random.get_rng_state(), random)


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


class Kernel(nn.Module):
    """A convolution of one's own, which says nothing of its sizes."""

    def __init__(self, inputs: int, outputs: int, size: int, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs // groups, size, size))
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.weight, padding=1, groups=self.groups)


class Scaled(Kernel):
    """As an equalised learning rate has it: the weight is a multiple of the parameter."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 4


class Standardised(nn.Conv2d):
    """As in BiT: what it reads decides how large its weights are."""

    def forward(self, x: Tensor) -> Tensor:
        shift = self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, self.weight - shift, self.bias)


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("grouping", ["structure", "filter", "channel"])
def test_dense_layers_and_convolutions_of_ones_own(grouping: str, tmp_path: Path) -> None:
    def dense() -> nn.Module:
        return nn.Sequential(Dense(16, 12), nn.ReLU(), Dense(12, 4))

    found = removal(dense(), TOKENS, grouping)
    assert not found.obstacles
    assert found.small[0].out_channels == found.small[2].in_channels == 6
    save_slim(found.small, tmp_path / "small.safetensors")
    again = load_slim(tmp_path / "small.safetensors", dense)
    assert torch.equal(again(TOKENS), found.small(TOKENS))
    kernels = nn.Sequential(Kernel(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Kernel(8, 4, 3))
    found = removal(kernels, IMAGES, grouping)
    assert grouping == "filter" or not found.obstacles
    if not found.obstacles:
        assert found.small[0].weight.shape == (4, 3, 3, 3)
        assert found.small[3].weight.shape == (4, 4, 3, 3)


def test_a_depthwise_convolution_of_ones_own() -> None:
    layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), Kernel(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1)]
    found = removal(nn.Sequential(*layers), IMAGES, "structure")
    assert not found.obstacles
    assert (found.small[2].groups, len(found.small[2].weight)) == (4, 4)


def test_what_computes_something_else_is_none_of_them() -> None:
    network = nn.Sequential(Scaled(3, 8, 3), nn.ReLU(), Kernel(8, 8, 3), nn.Conv2d(8, 4, 1))
    groups = group_parameters(network, "structure", example_input=IMAGES)
    assert [layer.name for layer in groups.layers] == ["2"]
    assert groups.left_out["0"].startswith("Scaled is none of")
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Standardised(8, 4, 1))
    with pytest.raises(ValueError, match=r"0: '2' \(Standardised\) has a forward of its own"):
        group_parameters(network, "structure", example_input=IMAGES)


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
