"""Heads, hidden units and channels that are read: removable in the table, removable by slim."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.removal import removal

TOKENS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Four heads of width four; ``split`` and ``joined`` are how the forward views its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.embed_dim = 4, 4, 16
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.out_proj = nn.Linear(16, 16)

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim)

    def joined(self, x: Tensor) -> Tensor:
        return x.flatten(2)

    def looks(self, looks: Tensor) -> Tensor:
        return looks

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            self.split(layer(x)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        looks = self.looks(query @ key.transpose(2, 3)).softmax(-1)
        outputs: Tensor = self.out_proj(self.joined((looks @ value).transpose(1, 2)))
        return x + outputs


class ByNumber(Attention):
    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim)


class FixedWidth(ByNumber):
    """As XGLM and BART: the width of all heads is an attribute."""

    def joined(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.embed_dim)


class ByWidthOfInput(Attention):
    """As DINO, DeiT and older timm: C // num_heads, which heads that are gone would change."""

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, 16 // self.num_heads)


class Slopes(Attention):
    """As MPT: a bias of every head, made outside of the module."""

    def looks(self, looks: Tensor) -> Tensor:
        return looks + torch.arange(4, dtype=looks.dtype).view(4, 1, 1) * torch.ones(1, 5, 5)


class Biased(Attention):
    """As BEiT, Swin and UMT5: a table of the module's own with an entry for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 8
        self.relative = nn.Embedding(9, 2)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))
        self.scale = nn.Parameter(torch.ones(8))  # of the places in a head

    def looks(self, looks: Tensor) -> Tensor:
        places = torch.arange(5)
        table = self.relative(places[:, None] - places + 4).permute(2, 0, 1)
        return looks * self.temperature + table

    def split(self, x: Tensor) -> Tensor:
        return super().split(x) * self.scale


def test_entries_of_heads_go_with_them() -> None:
    found = removal(nn.Sequential(Biased(), Attention()), TOKENS, "head")
    first = found.small[0]
    assert not found.obstacles
    assert first.relative.weight.shape == (9, 1)
    assert first.temperature.shape == (1, 1, 1)
    assert first.scale.shape == (8,)
    assert first.q_proj.out_features == 8


@pytest.mark.parametrize("attention", [Attention, ByNumber, FixedWidth])
def test_heads_of_a_forward_that_reads_attributes(attention: Callable[[], nn.Module]) -> None:
    found = removal(nn.Sequential(attention(), attention()), TOKENS, "head")
    assert not found.obstacles
    assert len(found.groups) == 8
    assert found.small[1].q_proj.out_features == found.small[0].out_proj.in_features == 8


@pytest.mark.parametrize(
    ("attention", "words"),
    [(ByWidthOfInput, "does not run without them: shape"), (Slopes, "must match the size")],
)
def test_heads_that_stay_are_known_before_training(
    attention: Callable[[], nn.Module], words: str
) -> None:
    found = removal(nn.Sequential(Attention(), attention()), TOKENS, "head")
    assert list(found.obstacles) == ["1"]
    assert words in found.obstacles["1"]
    assert found.small[0].num_heads == 2 or found.small[0].q_proj.out_features == 8
    assert found.small[1].q_proj.out_features == 16


class Gated(nn.Module):
    """Its second layer reads the hidden units twice, once beside their sum."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.up, self.down, self.mixed = nn.Linear(16, 24), nn.Linear(24, 16), mixed

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(self.up(x))
        if self.mixed:
            hidden = hidden - hidden.mean(-1, keepdim=True)
        outputs: Tensor = self.down(hidden)
        return outputs


def test_hidden_units_that_a_function_mixes() -> None:
    found = removal(nn.Sequential(Gated(False), Gated(True)), TOKENS, "hidden")
    assert found.obstacles == {"1.up": "the outputs change when zero groups are taken out"}
    assert found.small[0].up.out_features == 12


def test_channels_behind_a_norm_over_them() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(1, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )
    found = removal(network, IMAGES, "channel")
    assert found.obstacles == {"3": "GroupNorm '1' normalises over these channels"}


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        channels = self.a(images)
        outputs: Tensor = self.b(channels) * self.c(channels).tanh()
        return outputs


def test_channels_that_two_layers_read() -> None:
    found = removal(TwoReaders(), IMAGES, "channel")
    assert found.obstacles == {
        "b": "'c' reads these channels, too; grouping='structure' takes them out of both",
        "c": "'b' reads these channels, too; grouping='structure' takes them out of both",
    }
    assert "b" not in removal(TwoReaders(), IMAGES, "channel", exclude="c").groups.left_out


@pytest.mark.parametrize("parts", [1, 2])
def test_channels_of_parts(parts: int) -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=parts)
    )
    found = removal(network, IMAGES, "channel")
    assert found.obstacles == ({} if parts == 1 else {"3": "groups 0 and 4 can only go together"})
    assert parts == 2 or found.small[0].out_channels == 4
