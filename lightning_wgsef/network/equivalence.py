"""Equivalence check of two networks: layer by layer, in both modes, up to rounding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.network.example_input import (
    mapped,
    model_copy,
    observed,
    reason_of,
    run_example,
    seeded,
    tensors,
)
from lightning_wgsef.network.experts import EveryExpert
from lightning_wgsef.network.layers import WeightedLayer, weighted_modules
from lightning_wgsef.network.surgery import RemovalPlan

OUTPUTS = "the outputs"

Outputs = dict[str, list[Tensor]]


def layer_outputs(
    network: nn.Module, example_input: Any, plan: RemovalPlan | None = None, seed: int = 0
) -> Outputs:
    """What every convolution and dense layer returns, call after call, and the network itself.

    The outputs of a network alone would not do for a comparison: behind many layers a difference
    may be too weak to be seen. Experts that the router passes over are run, too, see `EveryExpert`.

    Args:
        network: any module; it is run as it is.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        plan: channels that are left out of what is returned.
        seed: of the random numbers.

    >>> plan = RemovalPlan()
    >>> network = nn.Sequential(nn.Linear(2, 3))
    >>> plan.remove("0", network[0], "weight", 0, [1])
    >>> outputs = layer_outputs(network, torch.ones(1, 2), plan)
    >>> {name: [tuple(x.shape) for x in found] for name, found in outputs.items()}
    {'0': [(1, 2)], 'the outputs': [(1, 3)]}
    """
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, _: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        own = seen.setdefault(name, [])  # a router that is a Linear may return more than that
        own += [x.clone() for x in tensors(output)]  # what follows may write into it

    every = EveryExpert(network)
    with observed(weighted_modules(network), after=note), every.watching(), seeded(network, seed):
        seen[OUTPUTS] = tensors(run_example(network, example_input))
    with seeded(network, seed):
        seen.update(every.others(lambda: run_example(network, example_input)))
    return seen if plan is None else kept_outputs(seen, network, plan)


def kept_outputs(
    outputs: Mapping[str, list[Tensor]], network: nn.Module, plan: RemovalPlan
) -> dict[str, list[Tensor]]:
    """Leave the channels out of `layer_outputs` that a plan takes out of the network."""
    modules = weighted_modules(network)
    found = dict(outputs)
    for name in outputs.keys() & modules.keys():
        layer = WeightedLayer(name, modules[name])
        across = layer.transposed and layer.split == 1
        kept = plan.kept.get(layer.path("weight"), {}).get(int(across))
        if kept is not None:
            axis = 1 - layer.weight.dim()  # -1 for dense layers, -3 for images
            found[name] = [
                x.index_select(axis, torch.tensor(kept, device=x.device)) for x in outputs[name]
            ]
    return found


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
        if torch.equal(one, other):
            continue
        if not other.is_floating_point():
            return math.inf
        error = float((one - other).abs().max())
        largest = max(floor, float(other.abs().max()))
        if not error < math.inf or not largest < math.inf:  # rare, and slower
            unequal = (one != other) & ~(one.isnan() & other.isnan())
            if not bool(unequal.any()):
                continue
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
    before: nn.Module, after: nn.Module, example_input: Any, plan: RemovalPlan
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

    >>> one, other = (nn.Sequential(nn.Linear(2, 1)) for _ in range(2))
    >>> example, plan = torch.ones(1, 2), RemovalPlan()
    >>> differing_layer(one, one, example, plan), bool(differing_layer(one, other, example, plan))
    ('', True)
    """
    found = layer_outputs(after, example_input)
    name = difference(found, layer_outputs(before, example_input, plan), TOLERANCE)
    agree = not name or layers_agree_in_float64(before, after, example_input, plan)
    return "" if agree else name


# Of the largest output, or of 1: what float32 may differ where sums are taken in another order.
TOLERANCE = 1e-5


@torch.no_grad()
def outputs_of(
    network: nn.Module, examples: Sequence[Any], training_example: Any | None
) -> list[Outputs]:
    """Return what layers and network return on every example, and last in training mode.

    Args:
        network: a network in evaluation mode; a copy of it is trained.
        examples: inputs.
        training_example: an input for training mode, with dropout off; None: it is left out.
    """
    found = [layer_outputs(network, example) for example in examples]
    if training_example is not None:
        found.append(layer_outputs(trained(network), training_example))
    return found


@torch.no_grad()
def check_outputs(
    before: nn.Module,
    after: nn.Module,
    examples: Sequence[Any],
    training_example: Any | None,
    expected: Sequence[Outputs] | None = None,
) -> tuple[float, float | None]:
    """Compare the outputs of two networks, in evaluation and in training mode.

    Args:
        before: the network, in evaluation mode.
        after: one that must do the same, in evaluation mode.
        examples: inputs.
        training_example: an input for training mode, with dropout off; None: there is none.
        expected: `outputs_of` the network before; None: it is run.

    Returns:
        The largest differences, as shares of the largest output; None for training mode where the
        network is random, and differs by that.

    Raises:
        ValueError: they are larger than rounding explains: above 1e-5, and not gone in float64.

    >>> network = nn.Linear(3, 2)
    >>> check_outputs(network, network, [torch.ones(1, 3)], torch.ones(2, 3))
    (0.0, 0.0)
    """
    before, after = before.eval(), after.eval()
    expected = expected or outputs_of(before, examples, training_example)
    pairs = list(zip(examples, expected, strict=False))
    evaluated = max(_compare(before, after, x, own, "evaluation") for x, own in pairs)
    if training_example is None:
        return evaluated, None
    networks = trained(before), trained(after)
    try:
        return evaluated, _compare(*networks, training_example, expected[-1], "training")
    except ValueError:
        if is_random(trained(before), training_example, expected[-1]):
            return evaluated, None  # other numbers are drawn than before
        raise


def is_random(network: nn.Module, example: Any, outputs: Outputs) -> bool:
    """Tell whether a network returns something else with other random numbers."""
    again = layer_outputs(network, example, seed=1)
    return relative_difference(outputs[OUTPUTS], again[OUTPUTS]) > 0


def trained(network: nn.Module) -> nn.Module:
    """Return a copy in training mode, without dropout."""
    twin = model_copy(network)
    train_without_dropout(twin)
    return twin


def train_without_dropout(network: nn.Module) -> None:
    """Put a network in training mode but for its dropout, which is noise, whatever it is given.

    >>> network = nn.Sequential(nn.BatchNorm1d(2), nn.AlphaDropout(0.5))
    >>> train_without_dropout(network)
    >>> [module.training for module in network]
    [True, False]
    """
    for module in network.train().modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()


def _compare(
    before: nn.Module, after: nn.Module, example: Any, expected: Outputs, mode: str
) -> float:
    try:
        found = layer_outputs(after, example)
    except ValueError as error:
        raise ValueError(
            f"without its zero groups, {type(before).__name__} does not run in {mode}: "
            f"{reason_of(error)}. Nothing was changed"
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


def layers_agree_in_float64(
    before: nn.Module, after: nn.Module, example: Any, plan: RemovalPlan
) -> bool:
    """Tell whether two networks, of which the second lacks what a plan takes out, agree there."""
    inputs = mapped(_in_float64, example)
    try:
        expected = layer_outputs(model_copy(before).double(), inputs, plan)
        found = layer_outputs(model_copy(after).double(), inputs)
    except (TypeError, ValueError):
        return False  # devices without float64, networks that name their types
    return not difference(found, expected, TOLERANCE)


def _agree_in_float64(before: nn.Module, after: nn.Module, example: Any) -> bool:
    """Is what they differ by rounding, which norms of nearly constant features make large?"""
    inputs = mapped(_in_float64, example)
    try:
        expected, found = (
            layer_outputs(model_copy(network).double(), inputs)[OUTPUTS]
            for network in (before, after)
        )
    except (TypeError, ValueError):
        return False  # devices without float64, networks that name their types
    return relative_difference(found, expected, 1.0) <= TOLERANCE


def _in_float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _shapes(outputs: list[Tensor]) -> list[torch.Size]:
    return [output.shape for output in outputs]
