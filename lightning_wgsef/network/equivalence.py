"""Do two networks do the same: layer by layer, in both modes, up to rounding?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.network.example_input import mapped, model_copy, run_example, tensors
from lightning_wgsef.network.layers import WeightedLayer, weighted_layers
from lightning_wgsef.network.surgery import RemovalPlan

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


TOLERANCE = 1e-5
"""Of the largest output, or of 1: what float32 may differ where sums are taken in another order."""


@torch.no_grad()
def check_outputs(
    before: nn.Module, after: nn.Module, examples: Sequence[Any], training_example: Any
) -> tuple[float, float | None]:
    """Largest differences of outputs, in evaluation and in training mode.

    Args:
        before: the network, in evaluation mode.
        after: one that must do the same, in evaluation mode.
        examples: inputs.
        training_example: an input for training mode, with dropout off.

    Returns:
        The differences, as shares of the largest output; None for training mode where the network
        does not run on the example, or is random.

    Raises:
        ValueError: they are larger than rounding explains: above 1e-5, and not gone in float64.

    >>> network = nn.Linear(3, 2)
    >>> check_outputs(network, network, [torch.ones(1, 3)], torch.ones(2, 3))
    (0.0, 0.0)
    """
    evaluated = max(_compare(before.eval(), after.eval(), x, "evaluation") for x in examples)
    try:
        expected = tensors(_run(_trained(before), training_example, seed=0))
    except ValueError:
        return evaluated, None  # such as a norm over a single value
    again = tensors(_run(_trained(before), training_example, seed=1))
    if not all(map(torch.equal, expected, again)):
        return evaluated, None  # random, so that nothing can be compared
    return evaluated, _compare(_trained(before), _trained(after), training_example, "training")


def _trained(network: nn.Module) -> nn.Module:
    """A copy in training mode, without dropout."""
    twin = model_copy(network).train()
    for module in twin.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return twin


def _run(network: nn.Module, example: Any, seed: int) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return run_example(network, example)


def _compare(before: nn.Module, after: nn.Module, example: Any, mode: str) -> float:
    expected = layer_outputs(before, example)
    try:
        found = layer_outputs(after, example)
    except ValueError as error:
        raise ValueError(
            f"without its zero groups, {type(before).__name__} does not run in {mode}: "
            f"{error.__cause__}. Nothing was changed"
        ) from error
    largest = largest_difference(found[OUTPUTS], expected[OUTPUTS])
    if largest > TOLERANCE and not _agree_in_float64(before, after, example):
        comparable = {
            name: outputs
            for name, outputs in found.items()
            if name in expected and _shapes(outputs) == _shapes(expected[name])
        }
        name = difference(comparable, expected, TOLERANCE)
        raise ValueError(
            f"without its zero groups, the outputs of {type(before).__name__} in {mode} differ by "
            f"{largest:.1e} of the largest (accepted: {TOLERANCE:.0e}); the first layer that "
            f"differs is '{name}'. Nothing was changed"
        )
    return largest


def _agree_in_float64(before: nn.Module, after: nn.Module, example: Any) -> bool:
    """Is what they differ by rounding, which norms of nearly constant features make large?"""
    inputs = mapped(_in_float64, example)
    try:
        expected, found = (
            tensors(run_example(model_copy(network).double(), inputs))
            for network in (before, after)
        )
    except (TypeError, ValueError):
        return False  # devices without float64, networks that name their types
    return largest_difference(found, expected) <= TOLERANCE


def _in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _shapes(outputs: list[Tensor]) -> list[torch.Size]:
    return [output.shape for output in outputs]


def relative_difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of outputs, as a share of the largest number of the tensor expected.

    Infinite where numbers, kinds or shapes of tensors or not finite values differ.

    >>> relative_difference([torch.tensor([3.0, 1.0])], [torch.tensor([4.0, 1.0])])
    0.25
    >>> relative_difference([torch.ones(2)], [torch.ones(3)])
    inf
    """
    if len(found) != len(expected):
        return math.inf
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if (one.shape, one.dtype) != (other.shape, other.dtype):
            return math.inf
        unequal = (one != other) & ~(one.isnan() & other.isnan())
        if not bool(unequal.any()):
            continue
        if not other.is_floating_point():
            return math.inf
        error = float((one - other)[unequal].abs().max())
        largest = float(other[other.isfinite()].abs().max()) if other.isfinite().any() else 0.0
        if not error < math.inf or not largest:  # NaN, too
            return math.inf
        worst = max(worst, error / largest)
    return worst
