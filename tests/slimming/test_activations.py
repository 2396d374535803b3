"""Activations between layers: in place, with a slope to train, and what passes them by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef import group_parameters, slim
from tests.helpers.groups import raises_naming
from tests.helpers.removal import removal

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
IN_PLACE = [
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.1, inplace=True),
    nn.SiLU(inplace=True),
    nn.Hardswish(inplace=True),
    nn.ELU(inplace=True),
    nn.Dropout(0.1, inplace=True),
]


def convolutions(activation: nn.Module) -> nn.Module:
    """As in VGG16 and AlexNet: no norm between convolution and activation."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 4, 3), activation, nn.Conv2d(4, 2, 1)
    )


@pytest.mark.parametrize("grouping", ["structure", "filter", "channel"])
@pytest.mark.parametrize("activation", IN_PLACE, ids=lambda x: type(x).__name__)
def test_activations_in_place(activation: nn.Module, grouping: str) -> None:
    found = removal(convolutions(activation), IMAGES, grouping)
    assert not found.obstacles
    assert found.small[0].out_channels == 4
    assert found.small[2].out_channels == 2
    assert activation.inplace, "the network itself is as it was"


DROPOUTS = [nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Dropout2d]


@pytest.mark.parametrize("kind", DROPOUTS)
@pytest.mark.parametrize("activation", [nn.SELU(), nn.Sigmoid()], ids=["zero", "constant"])
def test_dropout_is_noise(kind: type[nn.Module], activation: nn.Module) -> None:
    """What it makes of a constant while it trains is no reason to keep that."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), activation, kind(0.5), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        for parameter in network[0].parameters():
            parameter[:4] = 0
    small = slim(network, IMAGES)
    assert small[0].out_channels == small[3].in_channels == 4
    assert small.training
    assert torch.allclose(small.eval()(IMAGES), network.eval()(IMAGES), atol=1e-6)


class Sums(nn.Module):
    """Sums and functions that write into the output of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        one = self.a(images)
        two = self.b(torch.relu(one))
        two += one
        nn.functional.relu_(two)
        outputs: Tensor = self.c(two)
        return outputs


def test_sums_in_place() -> None:
    found = removal(Sums(), IMAGES, "structure")
    assert not found.obstacles
    assert found.small.a.out_channels == found.small.c.in_channels == 4


@pytest.mark.parametrize("slopes", [1, 8])
@pytest.mark.parametrize("grouping", ["structure", "channel"])
def test_slopes_of_prelu(slopes: int, grouping: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(slopes), nn.Conv2d(8, 4, 1))
    found = removal(network, IMAGES, grouping)
    assert not found.obstacles
    assert found.small[0].out_channels == 4
    assert found.small[1].num_parameters == found.small[1].weight.numel() == min(slopes, 4)
    if grouping == "structure":
        names = [member.name for member in found.groups.layers[0].members]
        assert ("1.weight" in names) == (slopes == 8)


@pytest.mark.parametrize("behind", [nn.Dropout(), nn.Identity(), nn.Dropout(inplace=True)])
def test_what_hands_on_hides_no_norm(behind: nn.Module) -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), behind, nn.Linear(8, 2))
    groups = group_parameters(network, "structure", include=["0"], example_input=ROWS)
    assert groups.layers[0].obstacle == "LayerNorm '1' normalises over these channels"


class PostNorm(nn.Module):
    def __init__(self, behind: nn.Module) -> None:
        super().__init__()
        self.embed, self.first_norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.hidden, self.norm, self.out = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.behind = behind

    def forward(self, rows: Tensor) -> Tensor:
        stream = self.behind(self.first_norm(self.embed(rows)))
        outputs: Tensor = self.out(self.behind(self.norm(stream + self.hidden(stream))))
        return outputs


@pytest.mark.parametrize("behind", [nn.Dropout(), nn.Identity()])
def test_a_stream_is_reserved_with_dropout_behind_its_norms(behind: nn.Module) -> None:
    with raises_naming("residual stream of 'embed', 'hidden'"):
        group_parameters(PostNorm(behind), "structure", example_input=ROWS)
