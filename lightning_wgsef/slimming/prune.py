"""A finished network made smaller in one go: importances of a few batches, and what they leave."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.budget import DEFAULT_K
from lightning_wgsef.groupings.group_parameters import group_parameters
from lightning_wgsef.groupings.slim_size import counted_size
from lightning_wgsef.groupings.weights import MEASURED
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.importance import measure_importance
from lightning_wgsef.groups.norm_statistics import estimate_statistics
from lightning_wgsef.groups.scope import survivors
from lightning_wgsef.network.example_input import model_copy
from lightning_wgsef.network.labelled_batches import Loss, checked_pairs
from lightning_wgsef.slimming.slim import check_precision, own_multiples, slim
from lightning_wgsef.utils.validation import check_model

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
        The network, in training or evaluation mode as ``model`` is: Lightning trains it in the mode
        that it finds, so call its ``train()`` first. Its ``slimming`` says what was done. Where
        zero groups had to stay, a warning says by how much it is too large.

    Raises:
        ValueError: batches that are no pairs or do not fit, a loss that is none, or what
            `group_parameters` and `slim` refuse.

    >>> network = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    >>> small = prune(network, [(torch.randn(8, 4), torch.arange(8) % 3)], 0.5)
    >>> small[0].out_features, network[0].out_features
    (8, 16)
    """
    check_model("model", model)
    check_precision(model)
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
    multiples = own_multiples(network, options.get("multiple_of", 1))
    small = slim(network, pairs[0][0], multiple_of=multiples)
    _warn_of_size(small, groups, named["example_input"])
    return small


def _warn_of_size(small: Any, groups: Groups, example_input: Any) -> None:
    """Say so where zero groups had to stay, and the network is larger than was asked for."""
    size, limit = groups.size, groups.limit
    if size is None or limit is None or size.unit not in ("FLOPs", "parameters", "bytes"):
        return
    found = counted_size(small, size.unit, example_input)
    if found > limit * (1 + 1e-9):
        warnings.warn(
            f"the slim network has {size.shown(found)} {size.unit}, more than the "
            f"{size.shown(limit)} asked for: zero groups had to stay, see its slimming "
            f"({small.slimming.kept}); leave these layers out with exclude=",
            stacklevel=3,
        )


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
