"""The last word on a slim network: are its outputs those of the network it was made of?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.comparison import (
    OUTPUTS,
    difference,
    largest_difference,
    layer_outputs,
)
from lightning_wgsef.groupings.example_runs import mapped, model_copy, run_example
from lightning_wgsef.groupings.operations import tensors

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
