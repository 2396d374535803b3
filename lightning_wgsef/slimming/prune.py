"""A finished network made smaller in one go: importances of a few batches, and what they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_wgsef.groupings.budget import DEFAULT_K
from lightning_wgsef.groupings.group_parameters import group_parameters
from lightning_wgsef.groupings.weights import MEASURED
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.importance import Importance
from lightning_wgsef.groups.norm_statistics import has_statistics, means_over_calls
from lightning_wgsef.groups.scope import survivors
from lightning_wgsef.network.example_input import (
    device_of,
    evaluation,
    model_copy,
    run_example,
    tensors,
)
from lightning_wgsef.slimming.slim import slim

Loss = Callable[[Any, Any], Tensor]

# Beyond so many batches importances and statistics no longer change.
_MOST_BATCHES = 32

# Rounds in which what fits a size and what groups cost there agree.
_ROUNDS = 8


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    k: int | float | str | Mapping[str, int | float] = DEFAULT_K,
    *,
    loss: Loss | None = None,
    **options: Any,
) -> nn.Module:
    """Make a finished network smaller in minutes, without training: a slim network of a size.

    The importance of every group is measured on a few batches, in evaluation mode; what does not
    fit the size is set to zero, BatchNorm's statistics are estimated anew, and `slim` takes it out,
    proved. Any training goes on with what is returned.

    Args:
        model: a trained network; it is copied, not touched.
        batches: pairs of inputs and targets, such as a DataLoader; the first 32 are used. Inputs
            are a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        k: the size: with a share, of the FLOPs of the whole network; see `group_parameters`.
        loss: of outputs and targets, a tensor of one number; None: cross entropy.
        options: other arguments of `group_parameters`. ``grouping`` is "structure", ``scope``
            "global", ``weights`` "taylor" and, where k is a share, ``costs`` "flops" unless they
            are named; ``example_input`` is the first of the inputs.

    Returns:
        The network; its ``slimming`` says what was done.

    Raises:
        ValueError: batches that are no pairs or do not fit, a loss that is none, or what
            `group_parameters` and `slim` refuse.

    >>> network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> small = prune(network, [(torch.randn(8, 4), torch.arange(8) % 3)], 0.5)
    >>> small[0].out_features, network[0].out_features
    (8, 16)
    """
    pairs = checked_pairs(model, batches, loss)
    network = model_copy(model)
    is_share = isinstance(k, float)
    named = {
        "grouping": "structure",
        "scope": "layer" if isinstance(k, Mapping) else "global",
        "weights": "taylor",
        "costs": "flops" if is_share else None,
        "example_input": pairs[0][0],
        **options,
    }
    groups = group_parameters(network, k=k, **named)
    if named["weights"] in MEASURED:
        measure_importance(network, groups, named["weights"], pairs, loss)
    groups.scale_(projected(groups).to(groups.dtype))
    estimate_statistics(network, [inputs for inputs, _ in pairs])
    return slim(network, pairs[0][0])


def checked_pairs(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None
) -> list[tuple[Any, Any]]:
    """Return batches as pairs of inputs and targets, on the model's device.

    Raises:
        ValueError: no batches, no pairs, or a loss that cannot be computed of them.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, Tensor | str | Mapping):
        raise ValueError(
            f"batches must be pairs of inputs and targets, such as a DataLoader or a list of them, "
            f"got {type(batches).__name__}"
        )
    device, pairs = device_of(model), []
    for number, batch in enumerate(islice(batches, _MOST_BATCHES)):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            given = type(batch).__name__
            given += f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise ValueError(
                f"batches[{number}] must be a pair of inputs and targets (labels), got {given}"
            )
        inputs, targets = batch
        inputs = tuple(inputs) if isinstance(inputs, list) else inputs
        pairs.append((inputs, targets.to(device) if isinstance(targets, Tensor) else targets))
    if not pairs:
        raise ValueError("batches must hold at least one pair of inputs and targets, got none")
    with evaluation(model), torch.no_grad():
        loss_of(model, *pairs[0], loss)
    return pairs


def loss_of(model: nn.Module, inputs: Any, targets: Any, loss: Loss | None) -> Tensor:
    """Return the loss of one batch, a tensor of one number.

    Raises:
        ValueError: inputs, targets or a loss that do not go together.
    """
    outputs = run_example(model, inputs)
    try:
        value = (functional.cross_entropy if loss is None else loss)(outputs, targets)
    except Exception as error:
        shapes = [tuple(x.shape) for x in tensors(outputs)]
        given = f"shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else repr(targets)
        name = "cross entropy (loss=None)" if loss is None else "loss"
        raise ValueError(
            f"{name} must take the outputs, of shapes {shapes}, and the targets, of {given}: "
            f"{type(error).__name__}: {error}; give batches of inputs and labels that fit, or a "
            "loss(outputs, targets)"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"loss must return a tensor of one number, got {given}")
    return value


def measure_importance(
    network: nn.Module,
    groups: Groups,
    kind: str,
    pairs: Iterable[tuple[Any, Any]],
    loss: Loss | None,
) -> None:
    """Measure the weights of groups on batches, in evaluation mode; gradients are left at None."""
    importance = Importance(groups, kind)
    with evaluation(network), torch.enable_grad():
        for number, (inputs, targets) in enumerate(pairs):
            network.zero_grad()
            loss_of(network, inputs, targets, loss).backward()  # type: ignore[no-untyped-call]
            importance.measure(number, None)
    network.zero_grad()


def projected(groups: Groups) -> Tensor:
    """Return which groups fit the budget, booleans, shape (m,).

    What groups cost depends on what stays: both are found in turn, from the dense network on.
    """
    norms = groups.norms()
    groups.layout.weigh(norms)
    alive = survivors(groups, norms, groups.budgets)
    for _ in range(_ROUNDS if groups.size is not None and groups.is_global else 0):
        before, groups.costs = alive, groups.size.costs(alive) if groups.size else None
        alive = survivors(groups, norms, groups.budgets)
        if torch.equal(alive, before):
            break
    return alive


@torch.no_grad()
def estimate_statistics(network: nn.Module, inputs: Iterable[Any]) -> None:
    """Estimate the running statistics of BatchNorm anew, as means over batches.

    >>> network, x = nn.Sequential(nn.BatchNorm1d(2)), torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    >>> estimate_statistics(network, [x, x])
    >>> network[0].running_mean
    tensor([2., 4.])
    """
    norms = [x for x in network.modules() if isinstance(x, _BatchNorm) and has_statistics(x)]
    if norms:
        with evaluation(network), means_over_calls(norms):
            for batch in inputs:
                run_example(network, batch)
