"""What stays of a network when groups are taken out of it, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.layers import WeightedLayer, canonical_name
from lightning_wgsef.slim_modules import Skip, SlimAttention

Size = int | tuple[int, ...]


@dataclass(eq=False)
class RemovalPlan:
    """Slices that are taken out of tensors, and the sizes that modules say they have.

    Attributes:
        kept: indices that stay, by name of the parameter or buffer and by axis.
        sizes: new values of attributes, by name of the module.
        heads: heads that stay, by name of an `nn.MultiheadAttention`.
        biases: names of layers that get a bias which they did not have.
        skipped: names of residual blocks of which only the shortcut stays.

    >>> plan = RemovalPlan()
    >>> network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    >>> plan.remove("0", network[0], "weight", 0, [1])
    >>> plan.remove("0", network[0], "bias", 0, [1])
    >>> plan.remove("1", network[1], "weight", 1, [1])
    >>> plan.resize("0", network[0], "out_features", 1)
    >>> plan.apply(network)
    >>> network[0].weight.shape, network[1].weight.shape, network[0].out_features
    (torch.Size([2, 4]), torch.Size([1, 2]), 2)
    """

    kept: dict[str, dict[int, list[int]]] = field(default_factory=dict)
    sizes: dict[str, dict[str, Size]] = field(default_factory=dict)
    heads: dict[str, list[int]] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        """Is there anything to take out?"""
        return bool(self.kept or self.skipped)

    def remove(
        self, name: str, module: nn.Module, tensor: str, axis: int, positions: Iterable[int]
    ) -> None:
        """Take slices out of a parameter or buffer of the module, which has this canonical name.

        What the module does not have, such as a bias, is passed over.
        """
        value = getattr(module, tensor, None)
        if isinstance(value, Tensor):
            axes = self.kept.setdefault(f"{name}.{tensor}".lstrip("."), {})
            gone = set(positions)
            stay = axes.get(axis, range(value.shape[axis]))
            axes[axis] = [position for position in stay if position not in gone]

    def resize(self, name: str, module: nn.Module, attribute: str, less: int) -> None:
        """Lower an attribute that holds a number, or a tuple of which the last is it."""
        sizes = self.sizes.setdefault(name, {})
        value = sizes.get(attribute, getattr(module, attribute))
        sizes[attribute] = (
            value - less if isinstance(value, int) else (*value[:-1], value[-1] - less)
        )

    def apply(self, model: nn.Module) -> None:
        """Make ``model`` smaller, in place.

        The parameters stay the same objects, so that ties, hooks, flags and an optimizer's
        references survive; gradients are dropped.
        """
        for name in self.skipped:
            _put(model, name, Skip())
        modules, done = _modules(model), set[int]()
        for name, heads in self.heads.items():
            attention = modules[name]
            assert isinstance(attention, nn.MultiheadAttention)
            SlimAttention.of(attention, heads)
        for module in modules.values():
            if isinstance(module, nn.TransformerEncoder) and self.heads:
                module.use_nested_tensor = False  # nested tensors take all heads for granted
        for name in self.biases:
            layer: Any = modules[name]
            outputs = WeightedLayer(name, layer).outputs
            layer.bias = nn.Parameter(layer.weight.new_zeros(outputs))
        for name, axes in self.kept.items():
            path, _, tensor = name.rpartition(".")
            value = getattr(modules[path], tensor)
            if id(value) in done:
                continue  # tied: cut under its other name
            smaller = value.detach()
            for axis, kept in axes.items():
                index = torch.tensor(kept, dtype=torch.long, device=value.device)
                smaller = smaller.index_select(axis, index)
            if isinstance(value, nn.Parameter):
                value.grad = None
                value.data = smaller
                done.add(id(value))
            else:
                setattr(modules[path], tensor, smaller)
        for path, sizes in self.sizes.items():
            for attribute, size in sizes.items():
                setattr(modules[path], attribute, size)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace every module of this canonical name, wrapped or not."""
    own = _modules(model)[name]
    for parent in list(model.modules()):
        for child, value in list(parent.named_children()):
            if value is own:
                setattr(parent, child, module)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by canonical name; of a module and its wrapper, the module."""
    return {canonical_name(name): module for name, module in model.named_modules()}
