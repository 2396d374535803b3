"""Norms that are not torch's own modules: inside of a convolution, and frozen ones of buffers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_wgsef import WGSEF, Homotopy, group_parameters, slim
from tests.helpers.groups import raises_naming
from tests.helpers.removal import difference, removal

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
SIGNALS = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))


def norm_inside(base: type, norm: type, end: nn.Module | None = None) -> type:
    """A layer that holds the norm of its outputs, as detectron2's convolutions do."""

    class Normalised(base):
        def __init__(self, *sizes, **options):
            super().__init__(*sizes, **options)
            self.norm, self.end = norm(sizes[1]), end

        def forward(self, inputs):
            outputs = self.norm(super().forward(inputs))
            return functional.relu(outputs) if self.end is None else self.end(outputs)

    return Normalised


class Frozen(nn.Module):
    """Scale, shift and statistics of a norm as buffers, each used as somebody does."""

    def __init__(self, channels: int, way: str = "reshaped") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels, generator=generator) + 0.5)
        self.num_features, self.way = channels, way

    def forward(self, inputs: Tensor) -> Tensor:
        if self.way == "function" or (self.way == "either" and not inputs.requires_grad):
            rest = (self.running_mean, self.running_var, self.weight, self.bias)
            return functional.batch_norm(inputs, *rest, training=False, eps=1e-5)
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        if self.way == "indexed":
            return inputs * scale[:, None, None] + shift[:, None, None]
        shape = (1, -1, *[1] * (inputs.dim() - 2))
        return inputs * scale.reshape(shape) + shift.view(shape)


class Fixed(nn.Module):
    """Scale and shift with axes of their own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.rand(1, channels, 1, 1) + 0.5)
        self.register_buffer("bias", torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.weight + self.bias


def chain(layer: type, norm, *, size: int = 3) -> nn.Module:
    """Two layers with norms behind them, or inside where there is none to put behind."""
    kernel = () if issubclass(layer, nn.Linear) else (3,)
    behind = [[] if norm is None else [norm(width), nn.ReLU()] for width in (8, 12)]
    pool = [nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()] if kernel else []
    return nn.Sequential(
        layer(size, 8, *kernel),
        *behind[0],
        layer(8, 12, *kernel),
        *behind[1],
        *pool,
        nn.Linear(12, 5),
    )


class Residual(nn.Module):
    def __init__(self, norm) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8)
        self.c1, self.n1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
        self.c2, self.n2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.n0(self.stem(images)).relu()
        x = (x + self.n2(self.c2(self.n1(self.c1(x)).relu()))).relu()
        outputs: Tensor = self.head(x.mean((2, 3)))
        return outputs


INSIDE = {
    "batch norm": (chain(norm_inside(nn.Conv2d, nn.BatchNorm2d), None), IMAGES),
    "and activation": (chain(norm_inside(nn.Conv2d, nn.BatchNorm2d, nn.SiLU()), None), IMAGES),
    "transposed": (chain(norm_inside(nn.ConvTranspose2d, nn.BatchNorm2d), None), IMAGES),
    "one axis": (chain(norm_inside(nn.Conv1d, nn.BatchNorm1d), None), SIGNALS),
    "dense": (chain(norm_inside(nn.Linear, nn.BatchNorm1d), None, size=6), ROWS),
}
FROZEN = {
    way: (chain(nn.Conv2d, lambda width, way=way: Frozen(width, way)), IMAGES)
    for way in ("reshaped", "indexed", "function", "either")
}
FROZEN |= {
    "frozen inside": (chain(norm_inside(nn.Conv2d, Frozen), None), IMAGES),
    "with axes": (chain(nn.Conv2d, Fixed), IMAGES),
    "rows": (chain(nn.Linear, Frozen, size=6), ROWS),
    "residual": (Residual(Frozen), IMAGES),
    "residual, function": (Residual(lambda width: Frozen(width, "function")), IMAGES),
}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("grouping", ["structure", "filter"])
def test_a_norm_inside_of_a_layer(name: str, grouping: str) -> None:
    found = removal(*INSIDE[name], grouping)
    assert not found.obstacles
    assert found.groups.counts[:2] == [8, 12]
    first = found.small[0]
    assert first.norm.num_features == len(first.norm.weight) == 4


@pytest.mark.parametrize("name", FROZEN)
def test_a_frozen_norm_of_buffers(name: str) -> None:
    network, example = FROZEN[name]
    found = removal(network, example, "structure")
    assert not found.obstacles
    assert len(found.groups.layers) == 2
    assert found.share < 0.6
    norms = [x for x in found.small.modules() if isinstance(x, Frozen)]
    assert all(x.num_features == len(x.running_mean) == len(x.weight) for x in norms)


def test_filters_alone_leave_a_frozen_shift() -> None:
    found = removal(*FROZEN["reshaped"], "filter")
    assert found.obstacles["0"] == "the bias of '1' is in no group"


def test_buffers_in_groups_train_and_freeze_with_them() -> None:
    torch.manual_seed(0)
    network = chain(nn.Conv2d, Frozen)
    before = network[1].weight.clone()
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    regularizer = WGSEF(
        network, 0.5, Homotopy(length=10), "structure", example_input=IMAGES
    ).attach(optimizer)
    for _ in range(14):
        optimizer.zero_grad()
        network(IMAGES).square().mean().backward()
        optimizer.step()
    assert regularizer.frozen
    alive = regularizer.masks["0"]
    assert alive.sum() == 4
    assert torch.equal(network[1].weight != 0, alive)
    assert torch.equal(network[1].weight[alive], before[alive])  # nobody trains what is frozen
    network[1].bias.fill_(1.0)
    assert regularizer.keep_masks() == ["0"]
    assert torch.equal(network[1].bias != 0, alive)
    small = slim(network.eval(), IMAGES)
    assert small[0].out_channels == 4
    assert difference(network, small, IMAGES) < 1e-9


class Position(nn.Module):
    """A buffer with a row for every place, added to a stream that nobody normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 2)
        self.register_buffer("places", torch.randn(1, 5, 8))

    def forward(self, rows: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.embed(rows) + self.places)
        return outputs


def test_places_of_a_buffer_are_cut_where_a_channel_is_not_read() -> None:
    network, rows = Position(), torch.randn(2, 5, 6)
    network.out.weight.data[:, ::2] = 0
    small = slim(network, rows)
    assert small.places.shape == (1, 5, 4)
    assert difference(network, small, rows) < 1e-9


class Resized(nn.Module):
    """A buffer that autograd cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 2)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, rows: Tensor) -> Tensor:
        self.seen.resize_(rows.numel()).copy_(rows.detach().flatten())
        outputs: Tensor = self.b(self.a(rows).relu())
        return outputs


def test_a_buffer_that_cannot_be_followed_is_left_alone() -> None:
    assert removal(Resized(), ROWS, "structure").groups.counts == [8]


class Checkpointed(nn.Module):
    """A block of which a reentrant checkpoint shows autograd nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.c = nn.Linear(8, 2)

    def forward(self, rows: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return self.b(self.a(x).relu())

        x = checkpoint(block, self.stem(rows).relu(), use_reentrant=True)
        outputs: Tensor = self.c(x.relu())
        return outputs


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch's own
def test_a_reentrant_checkpoint_is_looked_into() -> None:
    found = removal(Checkpointed(), ROWS, "structure")
    assert [layer.name for layer in found.groups.layers] == ["stem", "a", "b"]
    assert not found.obstacles


def test_what_cannot_be_taken_out_is_left_out_of_structure() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 7), nn.Linear(7, 2))
    groups = group_parameters(network, "structure", example_input=ROWS)
    assert [layer.name for layer in groups.layers] == ["2"]
    said = "LayerNorm '1' normalises over these channels: zeros may not make the network smaller"
    assert groups.left_out["0"].startswith(said)
    assert said in str(groups)
    named = group_parameters(network, "structure", include=["0", "2"], example_input=ROWS)
    assert [(layer.name, layer.removable) for layer in named.layers] == [("0", False), ("2", True)]
    with raises_naming("no layer that grouping='structure' can group", said):
        group_parameters(network[:3], "structure", example_input=ROWS)
