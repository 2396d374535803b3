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
        ValueError: no batches, no pairs, no samples, or a loss that cannot be computed of them.
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
        shapes = [tuple(x.shape) for x in tensors(inputs)]
        if shapes and shapes[0][:1] == (0,):
            raise ValueError(
                f"batches[{number}] must hold at least one sample, got inputs of shape {shapes[0]}"
            )
        pairs.append((inputs, targets.to(device) if isinstance(targets, Tensor) else targets))
    if not pairs:
        raise ValueError("batches must hold at least one pair of inputs and targets, got none")
    with evaluation(model), torch.no_grad():
        check_finite(loss_of(model, pairs[0], 0, loss), 0)
    return pairs


def loss_of(model: nn.Module, pair: tuple[Any, Any], number: int, loss: Loss | None) -> Tensor:
    """Return the loss of one batch, a tensor of one number.

    Args:
        model: run as it is.
        pair: inputs, which are a tensor, a tuple of the arguments of ``forward``, or a dict of
            them, and what the loss takes beside the outputs.
        number: of the batch.
        loss: of outputs and targets; None: cross entropy.

    Raises:
        ValueError: inputs, targets or a loss that do not go together.
    """
    inputs, targets = pair
    try:
        outputs = run_example(model, inputs)
    except ValueError as error:
        message = str(error).replace("example_input", f"the inputs of batches[{number}]", 1)
        raise ValueError(message) from error
    try:
        value = (functional.cross_entropy if loss is None else loss)(outputs, targets)
    except Exception as error:
        shapes = [tuple(x.shape) for x in tensors(outputs)]
        given = f"shape {tuple(targets.shape)}" if isinstance(targets, Tensor) else repr(targets)
        name = "cross entropy (loss=None)" if loss is None else "loss"
        raise ValueError(
            f"{name} must take the outputs, of shapes {shapes}, and the targets of "
            f"batches[{number}], of {given}: {type(error).__name__}: {error}; give batches of "
            "inputs and labels that fit, or a loss(outputs, targets)"
        ) from error
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"loss must return a tensor of one number, got {given}")
    return value


def check_finite(value: Tensor, number: int) -> None:
    """Raise `ValueError` for a loss of the whole network that is NaN or infinite."""
    if not bool(value.isfinite().all()):
        raise ValueError(
            f"loss must be finite of the whole network, got {value.item()} on batches[{number}]"
        )
