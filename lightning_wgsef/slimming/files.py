"""A slim network as one file, and back, without a class of its own; as a folder of Hugging Face."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Callable
from dataclasses import asdict
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_wgsef.network.layers import canonical_name, modules_by_name, unwrap
from lightning_wgsef.network.surgery import RemovalPlan
from lightning_wgsef.slimming.model_config import is_configured
from lightning_wgsef.slimming.model_folder import save_folder
from lightning_wgsef.slimming.slim import Slimming
from lightning_wgsef.utils.files import as_path, atomic_write, check_writable
from lightning_wgsef.utils.validation import check_model

_FORMAT = "lightning_wgsef slim network, version 1"


def save_slim(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network that `slim` made: its weights, and what was taken out where.

    One file in the safetensors format: the state_dict, and in its header as JSON the indices that
    stay, so that `load_slim` can rebuild the network from the class it had before.

    A network of Hugging Face can be written as a folder, too, which ``from_pretrained`` loads
    without this package. Where its configuration has no names for the new sizes (such as for heads
    of BERT that are gone: it takes their width from their number), the folder has a file of code
    beside the weights, and is loaded by ``from_pretrained(folder, trust_remote_code=True)``.

    Args:
        model: a network with ``slimming``, as `slim` returns it.
        path: the file, which appears when it is complete; or, for a network of Hugging Face, a
            folder: a path without a suffix.

    Raises:
        ValueError: no such network, one that no folder can hold, a path that cannot be written, or
            a disk that is full.
    """
    record = getattr(model, "slimming", None)
    if not isinstance(record, Slimming):
        raise ValueError(
            f"model must be what slim returned: {type(model).__name__} has no 'slimming'"
        )
    if not as_path("path", path).suffix and is_configured(model):
        save_folder(model, record.plans, path)
        return
    tensors: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for raw, value in model.state_dict(keep_vars=True).items():
        name = canonical_name(raw)
        if not isinstance(value, Tensor):
            raise ValueError(f"state_dict: {name!r} is a {type(value).__name__}, not a tensor")
        if id(value) in first:
            tied[name] = first[id(value)]
        else:
            first[id(value)] = name
            tensors[name] = value.detach().contiguous().cpu()
    header = {
        "format": _FORMAT,
        "model": type(model).__name__,
        "plans": json.dumps([asdict(plan) for plan in record.plans]),
        "tied": json.dumps(tied),
    }
    with atomic_write(path) as temporary:
        try:
            save_file(tensors, temporary, header)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"path: {path} could not be written: {error}") from error


def check_slim_path(
    path: str | os.PathLike[str], argument: str = "path", *, make_folder: bool = False
) -> None:
    """Raise `ValueError` unless a slim network can be written at ``path``, with a report beside it.

    Args:
        path: the file.
        argument: what messages call it.
        make_folder: make its folder, if there is none.

    >>> check_slim_path("small.pt")
    Traceback (most recent call last):
    ...
    ValueError: path must end in .safetensors, the format of slim networks, got 'small.pt'
    """
    if as_path(argument, path).suffix != ".safetensors":
        raise ValueError(
            f"{argument} must end in .safetensors, the format of slim networks, got "
            f"{os.fspath(path)!r}"
        )
    check_writable(path, argument, make_folder=make_folder)


def load_slim(path: str | os.PathLike[str], make_model: Callable[[], nn.Module]) -> nn.Module:
    """Rebuild a network that `save_slim` wrote.

    Nothing in the file is executed: it holds numbers and JSON.

    Args:
        path: the file.
        make_model: makes the network as it was before `slim`, such as its class; its weights do not
            matter.

    Returns:
        The slim network, on the CPU, in evaluation mode: ``train()`` it before training it on.

    Raises:
        ValueError: the file is missing, truncated, or of another kind, or ``make_model`` makes
            another network than the one that was made smaller.

    >>> import tempfile
    >>> import torch
    >>> from lightning_wgsef.slimming.slim import slim
    >>> def make():
    ...     return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> network = make()
    >>> _ = network[2].weight.data[:, 3:].zero_()
    >>> small = slim(network, torch.ones(1, 4))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_slim(small, f"{folder}/small.safetensors")
    ...     again = load_slim(f"{folder}/small.safetensors", make)
    >>> again[0].out_features, torch.equal(again(torch.ones(1, 4)), small(torch.ones(1, 4)))
    (3, True)
    >>> print(again.slimming)
    58 -> 23 parameters (39.7%)
    """
    _check_maker(make_model)
    header, tensors = _read(as_path("path", path))
    try:
        plans = [_plan(values) for values in json.loads(header["plans"])]
        tied = {str(name): str(other) for name, other in json.loads(header["tied"]).items()}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"path: the header of {path} is damaged: {error!r}") from error
    model = make_model()
    check_model("what make_model makes", model)
    model = unwrap(model)
    before = sum(parameter.numel() for parameter in model.parameters())
    made = f"make_model makes another network than the {header.get('model')} that became {path}"
    try:
        for plan in plans:
            _check_plan(plan, model)
            plan.apply(model)
    except Exception as error:  # a plan of another network can fail in any way
        raise ValueError(f"{made}: {type(error).__name__}: {error}") from error
    own = {canonical_name(name): name for name in model.state_dict()}
    state = {name: tensors[tied.get(name, name)] for name in own if tied.get(name, name) in tensors}
    missing, foreign = own.keys() - state.keys(), (tensors.keys() | tied.keys()) - own.keys()
    if missing or foreign:
        raise ValueError(f"{made}: missing {sorted(missing)}, not known {sorted(foreign)}")
    for name, raw in own.items():
        mine, found = model.state_dict()[raw], state[name]
        if mine.shape != found.shape or not torch.can_cast(found.dtype, mine.dtype):
            raise ValueError(
                f"{made}: {name!r} has shape {tuple(mine.shape)} and is {mine.dtype}, the file has "
                f"{tuple(found.shape)}, {found.dtype}"
            )
    model.load_state_dict({own[name]: value for name, value in state.items()})
    after = sum(parameter.numel() for parameter in model.parameters())
    model.slimming = Slimming(plans, parameters=(before, after))  # type: ignore[assignment]
    return model.eval()


def _check_maker(make_model: object) -> None:
    """Raise `ValueError` unless ``make_model`` is a function that needs no arguments."""
    wanted = (
        "make_model must be a function without arguments that makes the network as it was before "
        "slim, such as its class or lambda: MyNetwork(8)"
    )
    if isinstance(make_model, nn.Module) or not callable(make_model):
        raise ValueError(f"{wanted}, got {reprlib.repr(make_model)}")
    try:
        taken = signature(make_model)
    except ValueError:  # a builtin that does not say what it takes
        return
    try:
        taken.bind()
    except TypeError as error:
        name = getattr(make_model, "__name__", reprlib.repr(make_model))
        raise ValueError(f"{wanted}, got {name}: {error}") from error


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"path: there is no file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys()  # an open file is no mapping: it cannot be iterated over
            tensors = {name: file.get_tensor(name) for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"path: {path} is truncated or no safetensors file: {error}") from error
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"path: {path} must be a file of save_slim ({_FORMAT}), got {header.get('format')!r}"
        )
    return header, tensors


def _plan(values: dict[str, Any]) -> RemovalPlan:
    """A plan from JSON, in which keys are text and tuples are lists."""
    kept = {
        name: {int(axis): indices for axis, indices in axes.items()}
        for name, axes in values.pop("kept").items()
    }
    sizes = {
        module: {
            name: tuple(size) if isinstance(size, list) else size for name, size in own.items()
        }
        for module, own in values.pop("sizes").items()
    }
    parts = {
        name: {int(axis): rows for axis, rows in axes.items()}
        for name, axes in values.pop("parts", {}).items()
    }
    norms = {name: (before, after) for name, (before, after) in values.pop("norms", {}).items()}
    return RemovalPlan(kept=kept, sizes=sizes, parts=parts, norms=norms, **values)


def _check_plan(plan: RemovalPlan, model: nn.Module) -> None:
    """Raise `ValueError` unless the plan takes something out of ``model``, and does nothing else.

    Indices that repeat would make it larger, up to all of the memory.
    """
    modules = modules_by_name(model)
    for name, heads in plan.heads.items():
        attention = modules[name]
        if not isinstance(attention, nn.MultiheadAttention):
            raise ValueError(f"'{name}' is a {type(attention).__name__}, which has no heads")
        _check_increasing(f"heads[{name!r}]", heads, attention.num_heads)
    for name, axes in plan.kept.items():
        path, _, tensor = name.rpartition(".")
        shape = getattr(modules[path], tensor).shape
        for axis, kept in axes.items():
            _check_increasing(f"kept[{name!r}][{axis}]", kept, shape[axis])
    for name, every in plan.parts.items():
        path, _, tensor = name.rpartition(".")
        shape = getattr(modules[path], tensor).shape
        for axis, rows in every.items():
            where = f"parts[{name!r}][{axis}]"
            if not isinstance(rows, list) or len(rows) != shape[0]:
                raise ValueError(f"{where} must be {shape[0]} lists, got {reprlib.repr(rows)}")
            for row in rows:
                _check_increasing(where, row, shape[axis])
            if len({len(row) for row in rows}) > 1:
                raise ValueError(f"{where} must be of one length, got {reprlib.repr(rows)}")
    for name, numbers in plan.experts.items():
        count = len(next(p for p in modules[name].parameters() if p.dim() == 3))
        _check_increasing(f"experts[{name!r}]", numbers, count)
    for name, (before, after) in plan.norms.items():
        whole = type(before) is int and type(after) is int
        if not whole or not 0 < after <= before:
            raise ValueError(f"norms[{name!r}] must be two falling numbers, got {before, after}")
    for path, sizes in plan.sizes.items():
        for attribute, size in sizes.items():
            before = getattr(modules[path], attribute)
            if not _is_smaller(size, before):
                raise ValueError(
                    f"sizes[{path!r}]: {attribute} of {before!r} cannot be {reprlib.repr(size)}"
                )


def _check_increasing(name: str, indices: Any, size: int) -> None:
    whole = isinstance(indices, list) and all(type(index) is int for index in indices)
    if not whole or any(a >= b for a, b in pairwise([-1, *indices, size])):
        raise ValueError(
            f"{name} must be increasing indices below {size}, got {reprlib.repr(indices)}"
        )


def _is_smaller(size: object, before: object) -> bool:
    if isinstance(size, tuple) and isinstance(before, tuple | list) and len(size) == len(before):
        return all(map(_is_smaller, size, before))
    return type(size) is int and type(before) is int and 0 <= size <= before
