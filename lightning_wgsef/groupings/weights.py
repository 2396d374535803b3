"""Penalty weights of groups, by name, which make competing groups comparable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups

Weights = (
    Literal["fisher", "layer_norm", "size", "sqrt_size", "taylor", "uniform"]
    | Tensor
    | Mapping[str, Tensor]
    | None
)

NAMES = ("fisher", "layer_norm", "size", "sqrt_size", "taylor", "uniform")

# Those that are measured from gradients, while the network trains.
MEASURED = ("fisher", "taylor")


def check_weights(weights: Weights) -> None:
    """Raise `ValueError` unless ``weights`` is None, a name, a tensor or a mapping to tensors.

    >>> check_weights("sizes")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: weights must be 'fisher', 'layer_norm', 'size', 'sqrt_size', 'taylor', ...
    """
    if (
        weights is None
        or isinstance(weights, Tensor)
        or (isinstance(weights, str) and weights in NAMES)
    ):
        return
    if isinstance(weights, Mapping) and all(isinstance(x, Tensor) for x in weights.values()):
        return
    raise ValueError(
        f"weights must be {', '.join(map(repr, NAMES))}, a tensor with an entry for every group, "
        f"a mapping from layer names to such tensors or None, got {weights!r}"
    )


def with_weights(
    layers: Sequence[GroupedLayer], weights: Weights, scope: str
) -> list[GroupedLayer]:
    r"""Give the layers these penalty weights :math:`w_j`, times those that they bring along.

    Groups enter a budget in the order of :math:`a_j \sqrt{w_j / c_j}`, a_j their norms:

    - "uniform": 1, norms decide; a large group is strong because it is large.
    - "size": one over the number of weights: their root mean square decides, whatever the size.
    - "sqrt_size": one over its square root, halfway between the two.
    - "layer_norm": one over the mean square norm of the layer's groups: how much stronger a group
      is than others of its layer decides, so that layers are comparable. With ``scope="global"``
      it is measured anew at every step, for layers grow at different rates and the fastest would
      win; else once.

    - "taylor" and "fisher": what the loss would lose with a group, over its squared norm, measured
      from the gradients of training, see `Importance`; 1 until then.

    The mean over groups that compete is 1 for the first three: the meaning of lam stays. None is
    "uniform", or with ``scope="global"`` "layer_norm".

    Raises:
        ValueError: tensors that do not fit the groups.
    """
    if weights is None:
        weights = "layer_norm" if scope == "global" else "uniform"
    if isinstance(weights, str):
        if weights == "uniform":
            return list(layers)
        if weights in MEASURED:
            return [_to_be_measured(layer, weights) for layer in layers]
        if weights == "layer_norm" and scope == "global":
            return [replace(layer, layer_normalised=True) for layer in layers]
        found = {layer.name: _named(layer, weights) for layer in layers}
        if weights != "layer_norm":
            found = _with_mean_one(found, together=scope == "global")
    else:
        found = _given(layers, weights)
    return [
        replace(x, weights=found[x.name] if x.weights is None else found[x.name] * x.weights)
        for x in layers
    ]


def _to_be_measured(layer: GroupedLayer, weights: str) -> GroupedLayer:
    if not any(member.parameter.requires_grad for member in layer.members):
        raise ValueError(
            f"weights={weights!r} (in training the default of a size with scope='global') is "
            f"measured from gradients, of which the frozen layer '{layer.name}' ({layer.grouping}) "
            "has none; leave it out, or take 'layer_norm'"
        )
    return replace(layer, weights=torch.ones(layer.count))


def _named(layer: GroupedLayer, weights: str) -> Tensor:
    if weights == "layer_norm":
        mean = Groups([layer]).norms().double().square().mean()
        return torch.ones(layer.count).to(mean) / torch.where(mean > 0, mean, 1)
    sizes = layer.sizes().clamp(min=1)
    return 1 / (sizes if weights == "size" else sizes.sqrt())


def _with_mean_one(found: dict[str, Tensor], *, together: bool) -> dict[str, Tensor]:
    if not together:
        return {name: values / values.mean() for name, values in found.items()}
    mean = torch.cat(list(found.values())).mean()
    return {name: values / mean for name, values in found.items()}


def _given(
    layers: Sequence[GroupedLayer], weights: Tensor | Mapping[str, Tensor]
) -> dict[str, Tensor]:
    counts = {layer.name: layer.count for layer in layers}
    if isinstance(weights, Tensor):
        if weights.shape != (sum(counts.values()),):
            raise ValueError(
                f"weights must have one entry for each of the {sum(counts.values())} groups "
                f"({counts}), got shape {tuple(weights.shape)}"
            )
        parts = weights.split_with_sizes(list(counts.values()))
        return dict(zip(counts, parts, strict=True))
    shapes = {name: tuple(values.shape) for name, values in weights.items()}
    if shapes != {name: (count,) for name, count in counts.items()}:
        raise ValueError(f"weights must have the groups of every layer, {counts}, got {shapes}")
    return dict(weights)
