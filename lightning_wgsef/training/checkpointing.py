"""Saved states are checked before anything in them is used: a checkpoint may come from anywhere."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_wgsef.groups.groups import Groups

_LARGEST = 2**63 - 1

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_SHARES = ("remainder", "shares")

_POSITIVE = ("weights", "costs", "budgets")
"""None where they are None in this run, and only there."""

_TENSORS = ("alive", "start_norms", *_SHARES, *_POSITIVE)

_ROUNDING = 1e-3


def parts_of(
    state: object, counts: Mapping[str, int], optimizers: Mapping[str, Optimizer]
) -> list[Mapping[str, Any]]:
    """The saved states of the attachments, with ``layers`` and ``total_steps`` that can be used.

    Args:
        state: what a checkpoint holds for the state of `WGSEF`.
        counts: number of groups of every layer of the model.
        optimizers: who trains it, for every layer that is trained.

    Raises:
        ValueError: something else than a state, or one of other layers, groups or optimizers.

    >>> parts_of({"attachments": 3}, {}, {})
    Traceback (most recent call last):
    ...
    ValueError: the saved state is damaged: attachments must be a list, got 3
    """
    if not isinstance(state, Mapping) or set(state) != {"attachments"}:
        _refuse("it", "what WGSEF.state_dict returned", state)
    parts = state["attachments"]
    if not isinstance(parts, list):
        _refuse("attachments", "a list", parts)
    seen: set[str] = set()
    for number, saved in enumerate(parts):
        where = f"attachments[{number}]"
        if not isinstance(saved, Mapping) or not {"layers", "total_steps"} <= saved.keys():
            _refuse(where, "a dict with layers and total_steps", saved)
        layers = saved["layers"]
        if not isinstance(layers, Mapping) or not layers:
            _refuse(f"{where}: layers", "a dict from names to numbers of groups", layers)
        if seen & layers.keys():
            _refuse(f"{where}: layers", "others than those of the attachments before", layers)
        seen |= layers.keys()
        unknown = {
            name: count
            for name, count in layers.items()
            if not _is_count(count) or counts.get(name) != count or name not in optimizers
        }
        if unknown:
            raise ValueError(
                f"the saved state is of other groups: it has {reprlib.repr(unknown)} (layer: "
                f"groups), this model has {counts}, of which optimizers train {list(optimizers)}; "
                "resume with the same model, grouping, include and exclude, or start without it"
            )
        if len({id(optimizers[name]) for name in layers}) > 1:
            raise ValueError(
                f"the saved state is of other optimizers: one of them trained {list(layers)} "
                "together, now several do; resume with the optimizers of before, or start without "
                "it"
            )
        total = saved["total_steps"]
        if total is not None and not (_is_count(total) and total >= 1):
            _refuse(f"{where}: total_steps", "a number of steps >= 1 or None", total)
    return parts


def check_state(saved: Mapping[str, Any], like: Mapping[str, Any], groups: Groups) -> None:
    """Raise `ValueError` unless a saved state of an attachment can be used for ``groups``.

    Args:
        saved: the state.
        like: the state that such an attachment has now.
        groups: its groups.
    """
    missing, foreign = like.keys() - saved.keys(), saved.keys() - like.keys()
    if missing or foreign:
        raise ValueError(
            f"the saved state is of another version of lightning_wgsef: missing {sorted(missing)}, "
            f"not known {sorted(map(reprlib.repr, foreign))}; resume with the version that wrote "
            "it, or start without it"
        )
    for name in ("taken", "unchanged"):
        if not _is_count(saved[name]):
            _refuse(name, "a number of steps", saved[name])
    if not isinstance(saved["collapse_reported"], bool):
        _refuse("collapse_reported", "True or False", saved["collapse_reported"])
    shapes = {"start_norms": (len(groups.layers),), "budgets": tuple(groups.budgets.shape)}
    for name in _TENSORS:
        if name in _POSITIVE and (saved[name] is None) != (like[name] is None):
            _refuse(name, "None as in this run" if like[name] is None else "a tensor", saved[name])
        if saved[name] is not None:
            _check_tensor(name, saved[name], shapes.get(name, (len(groups),)))
    masks = saved["masks"]
    if masks is None:
        return
    counts = {layer.name: layer.count for layer in groups.layers}
    if not isinstance(masks, Mapping) or masks.keys() != counts.keys():
        _refuse("masks", f"None or a dict of masks of {list(counts)}", masks)
    for name, mask in masks.items():
        _check_tensor(f"masks[{name!r}]", mask, (counts[name],))


def _check_tensor(name: str, value: object, shape: tuple[int, ...]) -> None:
    boolean = name == "alive" or name.startswith("masks")
    wanted = f"a {'boolean' if boolean else 'float'} tensor of shape {shape}"
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        _refuse(name, wanted, value)
    if value.dtype not in ((torch.bool,) if boolean else _FLOATS):
        _refuse(name, wanted, value)
    if value.layout != torch.strided or value.is_meta:
        _refuse(name, f"{wanted}, dense and with data", value)
    if boolean:
        return
    within = torch.isfinite(value) & (value > 0 if name in _POSITIVE else value >= 0)
    if name in _SHARES:
        within &= value <= 1 + _ROUNDING
    if not bool(within.all()):
        sign = "positive" if name in _POSITIVE else "at least 0"
        most = " and at most 1" if name in _SHARES else ""
        raise ValueError(f"the saved state is damaged: {name} must be finite, {sign}{most}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _refuse(name: str, wanted: str, value: object) -> NoReturn:
    if isinstance(value, Tensor):
        shown = f"{value.dtype} of shape {tuple(value.shape)}"
    else:
        shown = reprlib.repr(value)
    raise ValueError(f"the saved state is damaged: {name} must be {wanted}, got {shown}")
