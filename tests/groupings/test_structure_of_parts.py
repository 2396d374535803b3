"""`structure` through chunks, splits and concatenations of channels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_wgsef import group_parameters, slim
from tests.helpers.removal import difference, drawn, removal

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
        lambda x: (x[:, ::2], x[:, 1::2]),
    ],
)
@pytest.mark.parametrize("width", [8, 12, 16])
def test_parts_by_number_promise_nothing(
    parts: Callable[[Tensor], Sequence[Tensor]], width: int
) -> None:
    network = ByNumber(parts, width)
    groups = group_parameters(network, "filter", 0.5, example_input=IMAGES)
    assert [x.removable for x in groups.layers if x.name == "a"] == [False]
    with pytest.raises(ValueError, match="structure"):
        group_parameters(network, "structure", 0.5, example_input=IMAGES)


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
