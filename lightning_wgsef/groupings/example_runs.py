"""A forward pass on the example that the user gave."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def run_example(model: nn.Module, example_input: Any) -> Any:
    """What ``model`` makes of a tensor, or of a tuple of the arguments of ``forward``.

    Tensors are moved to the model's device.

    Raises:
        ValueError: the forward pass fails; names the shapes that were given.

    >>> run_example(nn.Linear(2, 1), (nn.Linear(3, 2).weight,)) # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: example_input must be what Linear takes, a tensor or a tuple of its arguments, ...
    """
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    device = next((parameter.device for parameter in model.parameters()), None)
    inputs = tuple(x.to(device) if isinstance(x, Tensor) else x for x in inputs)
    try:
        return model(*inputs)
    except Exception as error:
        given = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in inputs]
        raise ValueError(
            f"example_input must be what {type(model).__name__} takes, a tensor or a tuple of its "
            f"arguments, got {given}: {type(error).__name__}: {error}"
        ) from error
