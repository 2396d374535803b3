"""Do two networks agree, layer by layer, where one of them lacks channels?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.example_runs import run_example
from lightning_wgsef.groupings.layers import WeightedLayer, weighted_layers
from lightning_wgsef.groupings.operations import tensors
from lightning_wgsef.groupings.removal_plan import RemovalPlan

OUTPUTS = "the outputs"


def layer_outputs(
    network: nn.Module, example_input: Any, plan: RemovalPlan | None = None
) -> dict[str, list[Tensor]]:
    """What every convolution and dense layer returns, call after call, and the network itself.

    The outputs of a network alone would not do for a comparison: behind many layers a difference
    may be too weak to be seen.

    Args:
        network: any module; it is run as it is.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        plan: channels that are left out of what is returned.

    >>> plan = RemovalPlan()
    >>> network = nn.Sequential(nn.Linear(2, 3))
    >>> plan.remove("0", network[0], "weight", 0, [1])
    >>> outputs = layer_outputs(network, torch.ones(1, 2), plan)
    >>> {name: [tuple(x.shape) for x in found] for name, found in outputs.items()}
    {'0': [(1, 2)], 'the outputs': [(1, 3)]}
    """
    seen: dict[str, list[Tensor]] = {}

    def note(layer: WeightedLayer, output: Tensor) -> None:
        across = layer.transposed and layer.split == 1
        kept = plan.kept.get(layer.path("weight"), {}).get(int(across)) if plan else None
        if kept is not None:
            axis = 1 - layer.weight.dim()  # -1 for dense layers, -3 for images
            output = output.index_select(axis, torch.tensor(kept, device=output.device))
        seen.setdefault(layer.name, []).append(output)

    hooks = [
        layer.module.register_forward_hook(lambda *given, own=layer: note(own, given[-1]))
        for layer in weighted_layers(network)
    ]
    try:
        seen[OUTPUTS] = tensors(run_example(network, example_input))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def difference(
    found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], tolerance: float
) -> str:
    """The first layer that returns something else than expected; "" where there is none.

    Layers that only one of the networks has are passed over. The tolerance is a share of the
    largest output of the layer, or of 1.

    >>> one = torch.ones(2)
    >>> difference({"a": [one], "b": [one]}, {"a": [one], "b": [one + 1]}, 1e-4)
    'b'
    """
    for name in expected:
        if name in found:
            pairs = list(zip(found[name], expected[name], strict=False))
            same = len(found[name]) == len(expected[name])
            if not same or not all(_close(one, other, tolerance) for one, other in pairs):
                return name
    return ""


def largest_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of outputs, as a share of the largest output, or of 1.

    >>> largest_difference([torch.ones(2)], [torch.tensor([1.0, 4.0])])
    0.75
    """
    if [x.shape for x in found] != [x.shape for x in expected]:
        return float("inf")
    shares = [_share(one, other) for one, other in zip(found, expected, strict=True)]
    return max(shares, default=0.0)


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return one.shape == other.shape and _share(one, other) <= tolerance


def _share(one: Tensor, other: Tensor) -> float:
    if not one.numel() or torch.equal(one, other):
        return 0.0
    largest = max(1.0, float(other.abs().max()))
    share = float((one - other).abs().max()) / largest
    return share if share == share else float("inf")  # NaN
