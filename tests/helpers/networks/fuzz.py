"""Small networks of every kind for whole trainings, described by values that hypothesis shrinks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn, optim

from examples.data.batches import Batches

IMAGES, VECTORS, SEQUENCES = (2, 5, 5), (4,), (3, 4)
CLASSES, BATCH = 3, 4


@dataclass(frozen=True)
class Network:
    """A network of some family.

    Attributes:
        family: a key of `FAMILIES`.
        first, second: how many channels or features it has inside.
        norm: "batch", "group", "layer" (one group) or "" for none.
        bias: do the layers in the middle have one?
        fixed: is the first layer not trained?
        zeros: is the first row and the first column of every matrix zero?
        seed: of its weights.
    """

    family: str
    first: int = 4
    second: int = 4
    norm: str = ""
    bias: bool = True
    fixed: bool = False
    zeros: bool = False
    seed: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return {"mlp": VECTORS, "tied": VECTORS, "transformer": SEQUENCES}.get(self.family, IMAGES)

    def build(self) -> nn.Sequential:
        """The network; its first layer is "stem", its last one "head"."""
        torch.manual_seed(self.seed)
        model = nn.Sequential(FAMILIES[self.family](self))
        if self.fixed:
            model.stem.requires_grad_(False)
        for weight in model.parameters() if self.zeros else ():
            if weight.dim() > 1:
                weight.data[0] = 0
                weight.data[:, 0] = 0
        return model

    def data(self, batches: int) -> Batches:
        """Noise, the same every time; a resumed run gets the batches that it has not seen."""
        torch.manual_seed(self.seed)
        size = BATCH * batches
        inputs = torch.randn(size, *self.shape)
        return Batches(inputs, torch.randint(CLASSES, (size,)), BATCH, shuffle=True)

    def norm_of(self, channels: int) -> nn.Module:
        if self.norm == "batch":
            return nn.BatchNorm2d(channels) if self.shape == IMAGES else nn.BatchNorm1d(channels)
        if self.norm == "group":
            return nn.GroupNorm(channels if channels < 4 else 1, channels)
        return nn.GroupNorm(1, channels) if self.norm == "layer" else nn.Identity()


class Residual(nn.Module):
    """Adds to its input what its modules make of it."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*modules)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.branch(inputs)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, added to it."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)

    def forward(self, inputs: Tensor) -> Tensor:
        x = self.norm(inputs)
        return inputs + self.attention(x, x, x, need_weights=False)[0]


class Mean(nn.Module):
    """The mean over everything but batch and features."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(self.axes)


def _images(network: Network, channels: int, **middle: nn.Module) -> OrderedDict[str, nn.Module]:
    """A first convolution, the middle, and a classifier of the mean."""
    return OrderedDict(
        stem=nn.Conv2d(IMAGES[0], network.first, 3),
        norm=network.norm_of(network.first),
        act=nn.ReLU(),
        **middle,
        mean=Mean(2, 3),
        head=nn.Linear(channels, CLASSES),
    )


def _conv(network: Network) -> OrderedDict[str, nn.Module]:
    first, second = network.first, network.second
    conv = nn.Conv2d(first, second, 2, bias=network.bias)
    return _images(network, second, conv=conv, norm2=network.norm_of(second), act2=nn.ReLU())


def _grouped(network: Network) -> OrderedDict[str, nn.Module]:
    first, second = network.first, network.second
    deep = nn.Conv2d(first, first, 3, padding=1, groups=first, bias=network.bias)
    parts = 2 if first % 2 == second % 2 == 0 else 1
    conv = nn.Conv2d(first, second, 1, groups=parts)
    return _images(network, second, deep=deep, norm2=network.norm_of(first), conv=conv)


def _transposed(network: Network) -> OrderedDict[str, nn.Module]:
    second = network.second
    up = nn.ConvTranspose2d(network.first, second, 2, stride=2, bias=network.bias)
    return _images(network, second, up=up, norm2=network.norm_of(second), act2=nn.GELU())


def _residual(network: Network) -> OrderedDict[str, nn.Module]:
    first, second = network.first, network.second
    blocks = {
        f"block{number}": Residual(
            nn.Conv2d(first, second, 3, padding=1, bias=network.bias),
            network.norm_of(second),
            nn.ReLU(),
            nn.Conv2d(second, first, 1, bias=network.bias),
        )
        for number in range(2)
    }
    return _images(network, first, **blocks)


def _mlp(network: Network) -> OrderedDict[str, nn.Module]:
    first, second = network.first, network.second
    return OrderedDict(
        stem=nn.Linear(VECTORS[0], first),
        norm=network.norm_of(first),
        act=nn.Tanh(),
        middle=nn.Linear(first, second, bias=network.bias),
        norm2=network.norm_of(second),
        act2=nn.ReLU(),
        head=nn.Linear(second, CLASSES),
    )


def _tied(network: Network) -> OrderedDict[str, nn.Module]:
    first = network.first
    middle, twin = (nn.Linear(first, first, bias=network.bias) for _ in range(2))
    twin.weight = middle.weight
    return OrderedDict(
        stem=nn.Linear(VECTORS[0], first),
        middle=middle,
        act=nn.Tanh(),
        twin=twin,
        act2=nn.ReLU(),
        head=nn.Linear(first, CLASSES),
    )


def _transformer(network: Network) -> OrderedDict[str, nn.Module]:
    first, second = network.first, network.second
    heads = next(count for count in (3, 2, 1) if first % count == 0)
    return OrderedDict(
        stem=nn.Linear(SEQUENCES[1], first),
        attend=SelfAttention(first, heads, network.bias),
        feed=Residual(
            nn.LayerNorm(first),
            nn.Sequential(nn.Linear(first, second), nn.GELU(), nn.Linear(second, first)),
        ),
        mean=Mean(1),
        head=nn.Linear(first, CLASSES),
    )


FAMILIES: dict[str, Callable[[Network], OrderedDict[str, nn.Module]]] = {
    "mlp": _mlp,
    "conv": _conv,
    "grouped": _grouped,
    "transposed": _transposed,
    "residual": _residual,
    "tied": _tied,
    "transformer": _transformer,
}
GROUPINGS = {
    "mlp": ("hidden",),
    "tied": (),
    "transformer": ("head", "hidden"),
    "residual": ("layer",),
}
"""Names of groupings, beside those of any layer, for what a family has."""
OF_ANY_LAYER = ("channel", "filter", "filter_shape", "element", "1:2", "2:4", "block:2x2")
OF_ANY_LAYER += ("block:1x3", "structure")


def networks() -> st.SearchStrategy[Network]:
    widths = st.sampled_from((4, 1, 2, 3, 5, 6, 8))
    return st.builds(
        Network,
        family=st.sampled_from(tuple(FAMILIES)),
        first=widths,
        second=widths,
        norm=st.sampled_from(("", "batch", "group", "layer")),
        bias=st.booleans(),
        fixed=st.booleans(),
        zeros=st.sampled_from((False, False, True)),
        seed=st.integers(0, 9),
    )


@st.composite
def groupings(draw: Any, network: Network) -> Any:
    """Names that make sense for the network, or a mapping to two of them."""
    names = st.sampled_from(GROUPINGS.get(network.family, ()) * 2 + OF_ANY_LAYER)
    both = st.fixed_dictionaries({"*head": st.sampled_from(OF_ANY_LAYER), "*": names})
    return draw(names | names | names | both)


OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {}),
    "sgd momentum": (optim.SGD, {"momentum": 0.9}),
    "sgd nesterov": (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "sgd foreach": (optim.SGD, {"momentum": 0.9, "foreach": True}),
    "sgd fused": (optim.SGD, {"momentum": 0.9, "fused": True}),
    "adam": (optim.Adam, {}),
    "adam amsgrad": (optim.Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "adam foreach": (optim.Adam, {"foreach": True}),
    "adam fused": (optim.Adam, {"fused": True}),
    "adamw": (optim.AdamW, {"weight_decay": 0.1}),
    "adamw fused": (optim.AdamW, {"weight_decay": 0.1, "fused": True}),
    "rmsprop": (optim.RMSprop, {}),
    "rmsprop centered": (optim.RMSprop, {"centered": True, "momentum": 0.9}),
    "adagrad": (optim.Adagrad, {"lr_decay": 0.1}),
    "adagrad fused": (optim.Adagrad, {"fused": True}),
    "adamax": (optim.Adamax, {}),
    "nadam": (optim.NAdam, {}),
    "radam": (optim.RAdam, {}),
}


def fitting(network: Network, arguments: dict[str, Any]) -> Network:
    """The network with widths that can be cut into tiles, and groups that k can choose from."""
    names = set(named(arguments["grouping"]).values())
    least = 12 if any(":" in name for name in names) else 2
    first, second = max(network.first, least), max(network.second, least)
    if not names & {"channel", "filter", "head", "hidden", "structure"}:
        return replace(network, first=first, second=second)
    return replace(
        network,
        first=12 if "head" in names else first,
        second=second,
        norm="batch" if network.norm else "",  # others look at all channels at once
        fixed=network.fixed and network.family not in ("mlp", "grouped"),
    )


def named(grouping: Any) -> dict[str, str]:
    return grouping if isinstance(grouping, dict) else {"*": grouping}
