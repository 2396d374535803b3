"""`structure` through chunks, splits and concatenations of channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_wgsef import group_parameters, load_slim, save_slim, slim
from tests.helpers.removal import NEGLIGIBLE, difference, drawn, removal

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


class ByNumber(nn.Module):
    """Parts as wide as the number of channels says, each with a reader of its own."""

    def __init__(self, parts: Callable[[Tensor], Sequence[Tensor]], width: int) -> None:
        super().__init__()
        self.parts = parts
        self.a, self.b, self.c = (
            nn.Conv2d(3, width, 1),
            *(nn.Conv2d(width // 2, 4, 1) for _ in range(2)),
        )

    def forward(self, images: Tensor) -> Tensor:
        first, second = self.parts(torch.relu(self.a(images)))
        outputs: Tensor = self.b(first) + self.c(second)
        return outputs


@pytest.mark.parametrize(
    "parts",
    [
        lambda x: x.tensor_split(2, 1),
        lambda x: torch.hsplit(x, 2),
        lambda x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]),
        lambda x: x.split(x.shape[1] // 2, 1),
        lambda x: (x[:, -x.shape[1] // 2 :], x[:, : -x.shape[1] // 2]),
    ],
)
@pytest.mark.parametrize("width", [8, 12, 16])
def test_parts_that_are_a_share_of_the_whole(
    parts: Callable[[Tensor], Sequence[Tensor]], width: int
) -> None:
    found = removal(ByNumber(parts, width), IMAGES, "structure")
    assert not found.obstacles
    assert {x.name: x.count for x in found.groups.layers} == {"a": width // 2}
    assert found.small.a.out_channels == width // 2


@pytest.mark.parametrize(
    "parts",
    [lambda x: (x[:, ::2], x[:, 1::2]), lambda x: x.split(4, 1), lambda x: (x[:, :4], x[:, 4:])],
)
def test_parts_by_number_promise_nothing(parts: Callable[[Tensor], Sequence[Tensor]]) -> None:
    network = ByNumber(parts, 8)
    groups = group_parameters(network, "filter", 0.5, example_input=IMAGES)
    assert [x.removable for x in groups.layers if x.name == "a"] == [False]
    with pytest.raises(ValueError, match="structure"):
        group_parameters(network, "structure", 0.5, example_input=IMAGES)


class Holds(nn.Module):
    """Two parts of which the module holds the sizes, and one of them, through a convolution."""

    def __init__(self, split: Callable[[Holds, Tensor], Sequence[Tensor]], size: Any) -> None:
        super().__init__()
        self.split, self.size, self.other = split, size, 8
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(8, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        first, second = self.split(self, self.a(images))
        outputs: Tensor = self.c(torch.cat([first, torch.relu(self.b(second))], 1))
        return outputs


Split = Callable[[Holds, Tensor], Sequence[Tensor]]
# With what is held before and after, where half of the channels go.
SPLITS: dict[str, tuple[Split, Any, Any]] = {
    "a number": (lambda own, x: x.split(own.size, 1), 4, 2),
    "by name": (lambda own, x: torch.split(tensor=x, split_size_or_sections=own.size, dim=1), 4, 2),
    "sizes by name": (lambda own, x: x.split(split_size=[own.size, own.size], dim=1), 4, 2),
    "a number twice": (lambda own, x: x.split((own.size, own.size), dim=1), 4, 2),
    "half of a number": (lambda own, x: x.split(own.size // 2, 1), 8, 4),
    "a list": (lambda own, x: torch.split(x, own.size, 1), [4, 4], None),
    "a tuple": (lambda own, x: x.split_with_sizes(own.size, 1), (4, 4), None),
}


@pytest.mark.parametrize("name", SPLITS)
def test_parts_whose_sizes_a_module_holds(name: str, tmp_path: Path) -> None:
    split, size, left = SPLITS[name]
    found = removal(Holds(split, size), IMAGES, "structure")
    small, several = found.small, left is None
    assert not found.obstacles
    assert {x.name: x.count for x in found.groups.layers} == {"a": 8 if several else 4, "b": 4}
    assert (sum(small.size) if several else small.size) == (4 if several else left)
    assert (small.other, type(small.size)) == (8, type(size))
    assert all(type(x) is int for x in (small.size if several else [small.size]))
    save_slim(small, tmp_path / "small.safetensors")
    loaded = load_slim(tmp_path / "small.safetensors", lambda: Holds(split, size))
    assert loaded.size == small.size
    assert torch.equal(loaded(IMAGES), small(IMAGES))


class Unequal(nn.Module):
    """Parts of other sizes lose what they lose, as in Res2Net's relatives and InceptionNeXt."""

    def __init__(self, slices: bool) -> None:
        super().__init__()
        self.sizes, self.first, self.slices = (3, 5, 4), 3, slices
        self.a, self.b = nn.Conv2d(3, 12, 1), nn.Conv2d(5, 5, 3, padding=1)
        self.c = nn.Conv2d(14 if slices else 12, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.a(images)
        if self.slices:
            outputs: Tensor = self.c(torch.cat([x[:, self.first :], self.b(x[:, 3:8])], 1))
            return outputs
        first, second, third = x.split(self.sizes, 1)
        joined: Tensor = self.c(torch.cat([third, first, self.b(second)], 1))
        return joined


def test_parts_of_other_sizes() -> None:
    found = removal(Unequal(slices=False), IMAGES, "structure")
    assert not found.obstacles
    assert {x.name: x.count for x in found.groups.layers} == {"a": 12, "b": 5}
    assert sum(found.small.sizes) == found.small.a.out_channels == 6
    assert found.small.sizes != (3, 5, 4)


def test_a_slice_that_ends_where_a_module_says() -> None:
    def slices(own: Holds, x: Tensor) -> Sequence[Tensor]:
        return x[:, : own.size], x[:, own.size :]

    found = removal(Holds(slices, 4), IMAGES, "structure")
    assert not found.obstacles
    assert {x.name: x.count for x in found.groups.layers} == {"a": 8, "b": 4}
    assert found.small.a.out_channels == 4


class Mixed(nn.Module):
    """Depthwise convolutions of several sizes, as in MixNet: one takes some of either layer."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [4, 4, 4]
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1)
        self.each = nn.ModuleList(
            nn.Conv2d(4, 4, size, padding=size // 2, groups=4) for size in (1, 3, 5)
        )
        self.c = nn.Conv2d(12, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        parts = torch.cat([self.a(images), self.b(images)], 1).split(self.splits, 1)
        outputs: Tensor = self.c(
            torch.cat([layer(part) for layer, part in zip(self.each, parts, strict=True)], 1)
        )
        return outputs


def test_a_layer_between_two_sets_keeps_a_channel() -> None:
    found = removal(Mixed(), IMAGES, "structure")
    assert not found.obstacles
    assert {x.name: x.count for x in found.groups.layers} == {"a": 6, "b": 6}
    network = drawn(Mixed())
    with torch.no_grad():
        for layer in (network.a, network.b, *network.each):
            for tensor in layer.parameters():
                tensor.zero_()
    small = slim(network, IMAGES)
    assert small.splits == [1, 1, 1]
    assert difference(small, network, (IMAGES,)) < NEGLIGIBLE


class Along(nn.Module):
    """Dense layers, or convolutions, around what is done to the steps between them."""

    def __init__(self, steps: Callable[[Along, Tensor], Tensor], kind: type[nn.Module]) -> None:
        super().__init__()
        options = (1,) if kind is nn.Conv1d else ()
        self.steps, self.size = steps, 2
        self.a, self.b = kind(6, 8, *options), kind(8, 4, *options)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.b(self.steps(self, torch.relu(self.a(x))))
        return outputs


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        (lambda own, x: torch.cat(x.split(own.size, 1)[::-1], 1), nn.Linear),
        (lambda own, x: x[:, : own.size], nn.Linear),
        (lambda own, x: torch.cat([x, *x[:, :0].split([], 1)], 1), nn.Linear),
        (lambda own, x: x[:, : own.size] + x[:, own.size : 4], nn.Linear),
        (lambda own, x: x[..., : own.size], nn.Conv1d),
        (lambda own, x: x[:, :, 1 : own.size] * 2, nn.Conv1d),
        (lambda own, x: sum(x.split([own.size, own.size, 1], 2)[:2]), nn.Conv1d),
    ],
)
def test_parts_along_the_steps(
    steps: Callable[[Along, Tensor], Tensor], kind: type[nn.Module]
) -> None:
    found = removal(Along(steps, kind), STEPS if kind is nn.Linear else STEPS.mT, "structure")
    assert not found.obstacles
    assert {x.name: x.count for x in found.groups.layers} == {"a": 8}
    assert (len(found.small.a.weight), found.small.size) == (4, 2)


class LastAxis(nn.Module):
    """Slices of the channels of dense layers, and of what a convolution makes of time series."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        options = (1,) if kind is nn.Conv1d else ()
        self.a, self.b = kind(6, 8, *options), kind(5, 5, *options)
        self.c, self.axis, self.size = kind(8, 4, *options), 1 + (kind is nn.Linear), 3

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.axis == 1:
            first, second = x[:, : self.size], x[:, self.size :]
        else:
            first, second = x[..., : self.size], x[..., self.size :]
        outputs: Tensor = self.c(torch.cat([self.b(second), first], self.axis))
        return outputs


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
def test_slices_of_the_channels_of_steps(kind: type[nn.Module]) -> None:
    found = removal(LastAxis(kind), STEPS if kind is nn.Linear else STEPS.mT, "structure")
    assert not found.obstacles
    assert {x.name: x.count for x in found.groups.layers} == {"a": 8, "b": 5}
    assert len(found.small.a.weight) == 4
    assert len(found.small.b.weight) + found.small.size == found.small.c.weight.shape[1]


def test_a_number_that_is_used_for_something_else_promises_nothing() -> None:
    def twice(own: Holds, x: Tensor) -> Sequence[Tensor]:
        return [part * own.size for part in x.split(own.size, 1)]

    found = group_parameters(Holds(twice, 4), "structure", example_input=IMAGES)
    assert [x.name for x in found.layers] == ["b"]
    assert "a" in found.left_out
    spread = group_parameters(Unequal(slices=True), "structure", example_input=IMAGES)
    assert "a" in spread.left_out


class Summed(nn.Module):
    """A sum with two layers side by side, of which one may lose all its channels."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        options = (1,) if kind is nn.Conv2d else ()
        self.x, self.a, self.b = kind(3, 8, *options), kind(3, 4, *options), kind(3, 4, *options)
        self.c = kind(8, 4, *options)

    def forward(self, given: Tensor) -> Tensor:
        parts = torch.cat([self.a(given), self.b(given)], 1 if given.dim() == 4 else -1)
        outputs: Tensor = self.c(torch.relu(self.x(given) + parts))
        return outputs


@pytest.mark.parametrize(("kind", "example"), [(nn.Conv2d, IMAGES), (nn.Linear, STEPS[..., :3])])
@pytest.mark.parametrize("dead", [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3, 6]])
def test_a_branch_that_dies_as_a_whole_keeps_a_channel(
    kind: type[nn.Module], example: Tensor, dead: list[int]
) -> None:
    network = drawn(Summed(kind))
    groups = group_parameters(network, "structure", 0.5, example_input=example)
    assert [(x.name, x.count, x.removable) for x in groups.layers] == [("x", 8, True)]
    groups.scale_(torch.ones(8).index_fill_(0, torch.tensor(dead), 0.0))
    small = slim(network, example)
    assert len(small.x.weight) == 9 - len(dead)
    assert sorted(len(layer.weight) for layer in (small.a, small.b))[0] == 1
    assert difference(network, small, example) < 1e-12
    (lonely,) = [name for name in "ab" if len(getattr(small, name).weight) == 1]
    assert small.slimming.kept == {
        "x": f"zero filters: '{lonely}' keeps its last channel",
        lonely: "all its weights are zero, but a layer keeps its last channel",
    }


class Reshaped(nn.Module):
    """Two layers with a view between."""

    def __init__(self, a: nn.Module, view: Callable[[Tensor], Tensor], b: nn.Module) -> None:
        super().__init__()
        self.a, self.view, self.b = a, view, b

    def forward(self, given: Tensor) -> Tensor:
        outputs: Tensor = self.b(self.view(torch.relu(self.a(given))))
        return outputs


@pytest.mark.parametrize(
    ("a", "view", "b", "example"),
    [
        # Samples and steps that are joined, or taken apart.
        (nn.Linear(6, 8), lambda x: x.reshape(10, -1), nn.Linear(8, 2), STEPS),
        (nn.Linear(6, 8), lambda x: x.view(2, 5, -1).mean(1), nn.Linear(8, 2), STEPS.flatten(0, 1)),
        (nn.Conv2d(3, 8, 3), lambda x: x.view(1, 2, *x.shape[1:])[0], nn.Conv2d(8, 2, 1), IMAGES),
        (
            nn.Conv2d(3, 8, 3),
            lambda x: x.unflatten(0, (2, 2)).transpose(1, 2),
            nn.Conv3d(8, 2, 1),
            IMAGES.repeat(2, 1, 1, 1),
        ),
        # Flattened, with the channels along the second axis or along the last.
        (nn.Conv2d(3, 8, 3), lambda x: x.flatten(1), nn.Linear(128, 2), IMAGES),
        (nn.Conv2d(3, 8, 3), lambda x: x.permute(0, 2, 3, 1).flatten(1), nn.Linear(128, 2), IMAGES),
        (nn.Conv1d(5, 8, 2), lambda x: x.flatten(1), nn.Linear(40, 2), STEPS),
        (nn.Conv1d(5, 8, 2), lambda x: x.mT.flatten(1), nn.Linear(40, 2), STEPS),
        (nn.Linear(6, 8), lambda x: x.flatten(1), nn.Linear(40, 2), STEPS),
        (nn.Linear(6, 8), lambda x: x.mT.flatten(1), nn.Linear(40, 2), STEPS),
    ],
)
def test_views_that_keep_or_spread_channels(
    a: nn.Module, view: Callable[[Tensor], Tensor], b: nn.Module, example: Tensor
) -> None:
    found = removal(Reshaped(a, view, b), example, "structure")
    assert not found.obstacles
    assert [(x.name, x.count) for x in found.groups.layers] == [("a", 8)]
    assert len(found.small.a.weight) == 4


class Attended(nn.Module):
    """A gate of one channel, defined before the layer whose channels it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.a, self.c = nn.Conv2d(8, 1, 1), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.a(images))
        outputs: Tensor = self.c(features * torch.sigmoid(self.gate(features)))
        return outputs


def test_a_gate_of_one_channel_takes_none_of_the_others() -> None:
    found = removal(Attended(), IMAGES, "structure")
    assert [(x.name, x.count) for x in found.groups.layers] == [("a", 8)]


def test_what_is_no_attention_is_not_sent_to_heads() -> None:
    shuffled = nn.Sequential(nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 1))
    boxes = Reshaped(nn.Conv2d(3, 6, 1), lambda x: x.view(2, 2, 3, 36).mean(2), nn.Linear(36, 2))
    network = nn.ModuleDict({"shuffled": shuffled, "boxes": boxes})
    for own in network.values():
        with pytest.raises(ValueError, match="mixe") as error:
            group_parameters(own, "structure", example_input=IMAGES)
        assert "head" not in str(error.value)


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
