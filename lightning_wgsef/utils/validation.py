"""Validation of arguments: errors that name the argument, its value and what would be accepted."""

from __future__ import annotations

import math
import reprlib
from numbers import Integral, Real

import torch
from torch import Tensor, nn


def per_segment(
    name: str, value: float | Tensor, count: int, like: Tensor, *, positive: bool = False
) -> Tensor:
    """Return ``value`` as a tensor of shape (count,), with dtype and device of ``like``.

    Raises:
        ValueError: a wrong shape or value; the message calls it ``name``.
    """
    if not isinstance(value, Tensor):
        check_number(name, value, positive=positive)
        return torch.full((1,), float(value), dtype=like.dtype, device=like.device).expand(count)
    if value.dim() > 1 or (value.dim() == 1 and len(value) != count):
        raise ValueError(
            f"{name} must be a number or have shape ({count},), one entry for every set of groups "
            f"that share a budget, got {shape_of(value)}"
        )
    values = value.detach().to(like).expand(count)
    wanted = "finite and positive" if positive else "finite and not negative"
    check_values(name, values, wanted, positive=positive)
    return values


def per_group(name: str, values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` > 0 for every group, with shape, dtype and device of ``like``.

    Raises:
        ValueError: a wrong shape or value; the message calls it ``name``.
    """
    check_kind(name, values, Tensor, "a tensor, with one entry for every group")
    if values.shape != like.shape:
        raise ValueError(f"{name} must have shape {shape_of(like)}, got {shape_of(values)}")
    values = values.detach().to(like)
    check_values(name, values, "finite and positive", positive=True)
    return values


def check_values(name: str, values: Tensor, wanted: str, *, positive: bool = False) -> None:
    """Raise `ValueError` unless all values are finite and at least 0 (if ``positive``: above).

    Only on the CPU: looking at values on an accelerator would stall it.
    """
    if values.device.type != "cpu" or not values.numel():
        return
    lowest, highest = (float(end) for end in torch.aminmax(values))  # NaN if there is one
    if (lowest > 0 if positive else lowest >= 0) and highest < math.inf:
        return
    valid = values > 0 if positive else values >= 0
    place = int((~(valid & torch.isfinite(values))).nonzero()[0])
    raise ValueError(f"{name} must be {wanted}, got {values[place].item()!r} at index {place}")


def check_number(
    name: str, value: float, *, highest: float = math.inf, positive: bool = False
) -> None:
    """Raise `ValueError` unless ``value`` is finite, from 0 (if ``positive``: above) to highest."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if (
        not number
        or not math.isfinite(value)
        or not 0 <= value <= highest
        or (positive and value == 0)
    ):
        wanted = "positive" if positive else "at least 0"
        bound = f" and at most {highest:g}" if math.isfinite(highest) else ""
        raise ValueError(f"{name} must be a finite number, {wanted}{bound}, got {value!r}")


def check_count_or_share(name: str, value: object, unit: str, *others: str) -> None:
    """Raise `ValueError` unless ``value`` is a count (int >= 1) or a share (float in (0, 1]).

    The message names ``others`` that would be accepted, too.

    >>> check_count_or_share("k", 1.5, "groups")
    Traceback (most recent call last):
    ...
    ValueError: k must be a number of groups (int >= 1) or a share (float in (0, 1]), got 1.5
    """
    if isinstance(value, Integral):
        valid = int(value) >= 1
    else:
        valid = isinstance(value, Real) and 0 < float(value) <= 1
    if not valid or isinstance(value, bool):
        raise ValueError(
            f"{name} must be a number of {unit} (int >= 1) or a share (float in (0, 1])"
            f"{''.join(f', or {other}' for other in others)}, got {value!r}"
        )


def check_kind(name: str, value: object, kinds: type | tuple[type, ...], wanted: str) -> None:
    """Raise `ValueError` unless ``value`` is of one of ``kinds``, which are ``wanted``.

    >>> check_kind("masks", "a.ckpt", dict, "a dict of tensors")
    Traceback (most recent call last):
    ...
    ValueError: masks must be a dict of tensors, got 'a.ckpt'
    """
    if not isinstance(value, kinds):
        got = f"the class {value.__name__}" if isinstance(value, type) else reprlib.repr(value)
        raise ValueError(f"{name} must be {wanted}, got {got}")


def check_model(name: str, value: object) -> None:
    """Raise `ValueError` unless ``value`` is a network.

    >>> check_model("model", nn.Flatten)
    Traceback (most recent call last):
    ...
    ValueError: model must be a torch.nn.Module such as MyNetwork(), got the class Flatten
    """
    check_kind(name, value, nn.Module, "a torch.nn.Module such as MyNetwork()")


def shape_of(values: Tensor) -> str:
    """Format the shape for a message."""
    return str(tuple(values.shape))
