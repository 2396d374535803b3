"""Equivalence check of two networks: layer by layer, in both modes, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.network.example_input import (
    mapped,
    model_copy,
    observed,
    run_example,
    seeded,
    tensors,
)
from lightning_wgsef.network.layers import weighted_layers
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
    layers = {layer.name: layer for layer in weighted_layers(network)}

    def note(name: str, _: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
        layer = layers[name]
        across = layer.transposed and layer.split == 1
        kept = plan.kept.get(layer.path("weight"), {}).get(int(across)) if plan else None
        if kept is not None:
            axis = 1 - layer.weight.dim()  # -1 for dense layers, -3 for images
            output = output.index_select(axis, torch.tensor(kept, device=output.device))
        seen.setdefault(name, []).append(output.clone())  # what follows may write into it

    watched = {name: layer.module for name, layer in layers.items()}
    with seeded(network), observed(watched, after=note):
        seen[OUTPUTS] = tensors(run_example(network, example_input))
    return seen


def relative_difference(
    found: Sequence[Tensor], expected: Sequence[Tensor], floor: float = 0.0
) -> float:
    r"""Return the largest difference, as a share of the largest number of the tensor expected.

    .. math:: \max_t \max_i |x_{ti} - y_{ti}| / \max(f, \max_i |y_{ti}|)

    Where both have NaN, or the same infinity, they agree. Infinite where numbers, kinds or shapes
    of tensors or values that are not finite differ.

    Args:
        found: tensors x.
        expected: tensors y.
        floor: f, below which a largest number does not count.

    >>> relative_difference([torch.tensor([3.0, 1.0])], [torch.tensor([4.0, 1.0])])
    0.25
    >>> relative_difference([torch.tensor([0.5])], [torch.tensor([0.0])], floor=1.0)
    0.5
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
        finite = other[other.isfinite()]
        largest = max(floor, float(finite.abs().max()) if len(finite) else 0.0)
        if not error < math.inf or not largest:  # NaN, too
            return math.inf
        worst = max(worst, error / largest)
    return worst


def difference(
    found: dict[str, list[Tensor]], expected: dict[str, list[Tensor]], tolerance: float
) -> str:
    """Name the first layer that returns something else than expected; "" where there is none.

    Layers that only one of the networks has are passed over. The tolerance is a share of the
    largest output of the layer, or of 1.

    >>> one = torch.ones(2)
    >>> difference({"a": [one], "b": [one]}, {"a": [one], "b": [one + 1]}, 1e-4)
    'b'
    """
    for name in expected:
        if name in found and not relative_difference(found[name], expected[name], 1.0) <= tolerance:
            return name
    return ""


@torch.no_grad()
def differing_layer(
    before: nn.Module, after: nn.Module, example_input: Any, plan: RemovalPlan | None = None
) -> str:
    """Name the first layer that returns something else in another network; "" where none does.

    Where float32 says so, float64 has the last word: norms of nearly constant features make its
    rounding large.

    Args:
        before: the network.
        after: one that must do the same.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        plan: channels of ``before`` that ``after`` does not have.

    Raises:
        ValueError: one of them does not run.

    >>> one, other = nn.Linear(2, 1), nn.Linear(2, 1)
    >>> example = torch.ones(1, 2)
    >>> differing_layer(one, one, example), bool(differing_layer(one, other, example))
    ('', True)
    """
    found = layer_outputs(after, example_input)
    name = difference(found, layer_outputs(before, example_input, plan), TOLERANCE)
    if not name:
        return ""
    inputs = mapped(_in_float64, example_input)
    try:
        exact = [model_copy(network).double() for network in (before, after)]
        expected = layer_outputs(exact[0], inputs, plan)
        return difference(layer_outputs(exact[1], inputs), expected, TOLERANCE)
    except (TypeError, ValueError):
        return name  # devices without float64, networks that name their types


# Of the largest output, or of 1: what float32 may differ where sums are taken in another order.
TOLERANCE = 1e-5


@torch.no_grad()
def check_outputs(
    before: nn.Module, after: nn.Module, examples: Sequence[Any], training_example: Any | None
) -> tuple[float, float | None]:
    """Largest differences of outputs, in evaluation and in training mode.

    Args:
        before: the network, in evaluation mode.
        after: one that must do the same, in evaluation mode.
        examples: inputs.
        training_example: an input for training mode, with dropout off; None: there is none.

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
    if training_example is None:
        return evaluated, None
    try:
        drawn = [_run(_trained(before), training_example, seed) for seed in (0, 1)]
    except ValueError:
        return evaluated, None  # such as a norm over a single value
    try:
        return evaluated, _compare(_trained(before), _trained(after), training_example, "training")
    except ValueError:
        if relative_difference(drawn[0], drawn[1]):
            return evaluated, None  # random, and with other draws than before
        raise


def _trained(network: nn.Module) -> nn.Module:
    """A copy in training mode, without dropout."""
    twin = model_copy(network).train()
    for module in twin.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    return twin


def _run(network: nn.Module, example: Any, seed: int) -> list[Tensor]:
    with seeded(network, seed):
        return tensors(run_example(network, example))


def _compare(before: nn.Module, after: nn.Module, example: Any, mode: str) -> float:
    expected = layer_outputs(before, example)
    try:
        found = layer_outputs(after, example)
    except ValueError as error:
        raise ValueError(
            f"without its zero groups, {type(before).__name__} does not run in {mode}: "
            f"{error.__cause__}. Nothing was changed"
        ) from error
    largest = relative_difference(found[OUTPUTS], expected[OUTPUTS], 1.0)
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
            _run(model_copy(network).double(), inputs, seed=0) for network in (before, after)
        )
    except (TypeError, ValueError):
        return False  # devices without float64, networks that name their types
    return relative_difference(found, expected, 1.0) <= TOLERANCE


def _in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _shapes(outputs: list[Tensor]) -> list[torch.Size]:
    return [output.shape for output in outputs]
