"""GroupNorm in `structure`: whole groups of channels go, since the rest of one would change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_wgsef import group_parameters
from tests.helpers.groups import raises_naming
from tests.helpers.removal import removal

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def normalised(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize("groups", [2, 4, 8])
@pytest.mark.parametrize("affine", [True, False])
def test_a_group_is_one_of_the_norm(groups: int, affine: bool) -> None:
    found = removal(normalised(nn.GroupNorm(groups, 8, affine=affine)), IMAGES, "structure")
    assert not found.obstacles
    assert found.groups.counts == [groups]
    norm = found.small[1]
    assert (norm.num_groups, norm.num_channels) == (groups // 2, 4)


@pytest.mark.parametrize("grouping", ["filter", "channel"])
def test_single_filters_say_what_binds_them(grouping: str) -> None:
    found = removal(normalised(nn.GroupNorm(2, 8)), IMAGES, grouping)
    (obstacle,) = found.obstacles.values()
    assert obstacle.startswith("GroupNorm '1' normalises 4 of these channels as one")
    assert not removal(normalised(nn.GroupNorm(8, 8)), IMAGES, grouping).obstacles


@pytest.mark.parametrize("grouping", ["structure", "filter", "channel"])
def test_a_norm_over_all_channels_and_one_over_each(grouping: str) -> None:
    found = removal(
        normalised(nn.GroupNorm(1, 8)), IMAGES, grouping, include=["0", "3"][grouping == "channel"]
    )
    assert set(found.obstacles.values()) == {"GroupNorm '1' normalises over these channels"}
    assert found.groups.counts == [8]
    found = removal(normalised(nn.InstanceNorm2d(8)), IMAGES, grouping)
    assert not found.obstacles
    assert found.small[1].num_features == 4


class Residual(nn.Module):
    """A sum of two norms with other numbers of groups, and a third between."""

    def __init__(self, outside: int, inside: int) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 24, 3, padding=1), nn.GroupNorm(outside, 24)
        self.a, self.second = nn.Conv2d(24, 12, 3, padding=1), nn.GroupNorm(3, 12)
        self.b, self.third = nn.Conv2d(12, 24, 3, padding=1), nn.GroupNorm(inside, 24)
        self.head = nn.Linear(24 * 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.relu(self.first(self.stem(images)))
        y = self.third(self.b(functional.relu(self.second(self.a(x)))))
        outputs: Tensor = self.head(functional.adaptive_avg_pool2d(x + y, 2).flatten(1))
        return outputs


@pytest.mark.parametrize(("outside", "inside", "count"), [(6, 6, 6), (6, 4, 2), (12, 8, 4)])
def test_a_sum_of_norms_loses_what_is_whole_in_both(outside: int, inside: int, count: int) -> None:
    found = removal(Residual(outside, inside), IMAGES, "structure")
    assert not found.obstacles
    assert found.groups.counts == [count, 3]
    assert found.small.stem.out_channels == 12
    assert found.small.first.num_groups == outside // 2
    assert found.small.third.num_groups == inside // 2


def test_a_sum_with_a_norm_over_all_is_a_residual_stream() -> None:
    groups = group_parameters(Residual(6, 1), "structure", example_input=IMAGES)
    assert [layer.name for layer in groups.layers] == ["a"]
    assert groups.left_out["stem"] == "residual stream of 'stem', 'b'"


class Joined(nn.Module):
    """A norm over two layers side by side."""

    def __init__(self, first: int, second: int, groups: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, first, 1), nn.Conv2d(3, second, 1)
        self.norm, self.c = nn.GroupNorm(groups, first + second), nn.Conv2d(first + second, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.c(self.norm(torch.cat([self.a(images), self.b(images)], 1)).relu())
        return outputs


def test_channels_of_two_layers_side_by_side() -> None:
    found = removal(Joined(6, 6, 4), IMAGES, "structure")
    assert not found.obstacles
    assert found.groups.counts == [2, 2]
    assert (found.small.norm.num_groups, found.small.norm.num_channels) == (2, 6)
    with pytest.raises(ValueError, match="'norm', a GroupNorm that mixes them with channels of"):
        group_parameters(Joined(4, 8, 2), "structure", example_input=IMAGES)


def test_a_depthwise_convolution_between_norms() -> None:
    layers = [nn.Conv2d(3, 16, 1), nn.GroupNorm(4, 16), nn.SiLU()]
    layers += [nn.Conv2d(16, 16, 3, groups=16), nn.GroupNorm(8, 16), nn.Conv2d(16, 4, 1)]
    found = removal(nn.Sequential(*layers), IMAGES, "structure")
    assert not found.obstacles
    assert found.groups.counts == [4]
    assert [found.small[place].num_groups for place in (1, 4)] == [2, 4]


class Called(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.b(functional.group_norm(self.a(images), 2).relu())
        return outputs


def test_a_norm_that_a_forward_calls_is_named() -> None:
    groups = group_parameters(Called(), "structure", include="a", example_input=IMAGES)
    reason = "NativeGroupNorm, called by a forward, normalises over these channels"
    assert groups.layers[0].obstacle == reason


def test_a_group_of_the_norm_that_two_layers_share_stays() -> None:
    """Of 12 channels in 3 groups the first layer makes 6: it has no half of the second group."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
            self.norm, self.out = nn.GroupNorm(3, 12), nn.Conv2d(12, 2, 1)

        def forward(self, images: Tensor) -> Tensor:
            both = torch.cat([self.a(images), self.b(images)], 1)
            outputs: Tensor = self.out(functional.relu(self.norm(both)))
            return outputs

    with raises_naming("a: tied to 'norm', a GroupNorm that mixes", "b: tied to 'norm'"):
        group_parameters(Joined(), "structure", example_input=IMAGES)
