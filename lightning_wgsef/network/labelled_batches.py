"""Labelled batches, pairs of inputs and targets, and the loss of a network on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_wgsef.network.example_input import device_of, evaluation, run_example, tensors

Loss = Callable[[Any, Any], Tensor]

# Beyond so many batches importances and statistics no longer change.
_MOST_BATCHES = 32


def checked_pairs(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None
) -> list[tuple[Any, Any]]:
    """Return the first 32 batches as pairs of inputs and targets, targets on the model's device.

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

    Args:
        model: run as it is.
        inputs: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        targets: what the loss takes beside the outputs.
        loss: of outputs and targets; None: cross entropy.

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
