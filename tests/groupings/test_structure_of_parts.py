"""`structure` through chunks, splits and concatenations of channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.removal import removal

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
STEPS = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))


class C2f(nn.Module):
    """YOLO: a half goes on twice, both halves are joined with what was made of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(24, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        parts = list(self.a(images).chunk(2, 1))
        parts.append(torch.relu(self.b(parts[-1])))
        outputs: Tensor = self.c(torch.cat(parts, 1))
        return outputs


class Gate(nn.Module):
    """A part that is used twice, and one that is used once."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        gate, value = self.a(images).chunk(2, 1)
        outputs: Tensor = self.c(torch.sigmoid(gate) * value + value)
        return outputs


class Mamba(nn.Module):
    """Halves of a dense layer's outputs, one of them through a convolution along the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(6, 24), nn.Linear(12, 6)
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=12)

    def forward(self, steps: Tensor) -> Tensor:
        hidden, gate = self.a(steps).chunk(2, -1)
        hidden = self.conv(hidden.transpose(1, 2)).transpose(1, 2)
        outputs: Tensor = self.c(functional.silu(hidden) * functional.silu(gate))
        return outputs


class Unused(nn.Module):
    """The part in the middle is not used, the last comes first, beside what is no channel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 12, 1), nn.Conv2d(10, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        first, _, last = self.a(images).chunk(3, 1)
        grid = torch.ones_like(first[:, :2]).detach()
        outputs: Tensor = self.c(torch.cat([last, grid, first], 1))
        return outputs


@pytest.mark.parametrize(
    ("network", "example", "counts"),
    [(C2f(), IMAGES, {"a": 8, "b": 8}), (Gate(), IMAGES, {"a": 8}), (Mamba(), STEPS, {"a": 12})],
    ids=["C2f", "Gate", "Mamba"],
)
def test_parts_lose_the_same_places(
    network: nn.Module, example: Tensor, counts: dict[str, int]
) -> None:
    found = removal(network, example, "structure")
    assert not found.obstacles
    assert {layer.name: layer.count for layer in found.groups.layers} == counts
    assert found.small.a.weight.shape[0] == found.zeroed.a.weight.shape[0] // 2


def test_a_part_that_is_not_used_and_one_without_a_gradient() -> None:
    found = removal(Unused(), IMAGES, "structure")
    assert not found.obstacles
    assert found.groups.layers[0].count == 4
    assert found.small.a.out_channels == 6
    assert found.small.c.in_channels == 6


class Rotary(nn.Module):
    """Half of every query is turned, and joined with two parts that have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.query = nn.Linear(6, 8)

    def forward(self, steps: Tensor) -> Tensor:
        query = self.query(steps)
        one, two = query[..., :4], query[..., 4:]
        zeros = torch.zeros_like(one).detach()
        looks = torch.cat([-two, zeros, one, zeros], -1)
        mixed = (looks @ looks.transpose(1, 2)).softmax(-1) @ steps
        outputs: Tensor = mixed + self.down(torch.relu(self.up(steps)))
        return outputs


def test_sizes_that_cannot_be_inferred_end_no_graph() -> None:
    found = removal(Rotary(), STEPS, "structure")
    assert [layer.name for layer in found.groups.layers] == ["up"]
    assert found.groups.left_out["query"]
    assert not any("grouping='head'" in why for why in found.groups.left_out.values())
