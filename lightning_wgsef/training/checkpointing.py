"""State of pruners: what a checkpoint holds, checked before anything of it is used."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_wgsef.groupings.weights import MEASURED
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.training.saved_grouping import said_of

_LARGEST = 2**63 - 1

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_SIGNS = {
    "positive": lambda x: x > 0,
    "at least 0": lambda x: x >= 0,
    "at least 0 and at most 1": lambda x: (x >= 0) & (x <= 1 + 1e-3),  # up to rounding
}


class Entry(NamedTuple):
    """One value of the state of a pruner.

    Attributes:
        place: the attribute of the pruner that holds it.
        kind: "steps", "flag", a "name" of weights that are measured, or the numbers of a tensor,
            "bool" or "float".
        per: what a tensor has an entry for: every "group", "layer" or "segment", or every "time"
            that was measured; with "mask" it is a dict of tensors, one for every layer, that have
            one for every group.
        sign: of a tensor's numbers.
        given: a tensor that depends on the arguments is None where it is None in this run; others
            are None until there is something to note.
        optional: it is left out where it is None.
    """

    place: str
    kind: str
    per: str = ""
    sign: str = ""
    given: bool = False
    optional: bool = False


ENTRIES = {
    "taken": Entry("taken", "steps"),
    "masks": Entry("masks", "bool", "mask"),
    "start_norms": Entry("start_norms", "float", "layer", "at least 0"),
    "unchanged": Entry("freeze_rule.unchanged", "steps"),
    "alive": Entry("freeze_rule.alive", "bool", "group"),
    "collapse_reported": Entry("collapse_reported", "flag"),
    "remainder": Entry("step.remainder", "float", "group", "at least 0 and at most 1"),
    "shares": Entry("step.shares", "float", "group", "at least 0 and at most 1"),
    "importance": Entry("importance", "name", given=True, optional=True),
    "weights": Entry("groups.weights", "float", "group", "positive", given=True),
    "costs": Entry("groups.costs", "float", "group", "positive", given=True),
    "budgets": Entry("groups.budgets", "float", "segment", "positive", given=True),
    "latency": Entry("groups.latency", "float", "time", "at least 0", given=True, optional=True),
}

_OPTIONAL = [name for name, entry in ENTRIES.items() if entry.optional]


def pruner_state(pruner: object, groups: Groups, total_steps: int | None) -> dict[str, Any]:
    """Return everything that a resumed run needs, in plain types and tensors."""
    layers = {layer.name: layer.count for layer in groups.layers}
    entries = {name: attrgetter(entry.place)(pruner) for name, entry in ENTRIES.items()}
    if entries["masks"] is not None:  # views of one tensor
        entries["masks"] = {name: mask.clone() for name, mask in entries["masks"].items()}
    for name in _OPTIONAL:
        if entries[name] is None:
            del entries[name]
    return {"layers": layers, "total_steps": total_steps, **entries}


def restore(pruner: object, state: Mapping[str, Any], device: torch.device) -> None:
    """Put the entries of a checked state where the pruner holds them, on ``device``."""

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: moved(part) for name, part in value.items()}
        return value.to(device) if isinstance(value, Tensor) else value

    for name, entry in ENTRIES.items():
        *owners, attribute = entry.place.split(".")
        owner = attrgetter(owners[0])(pruner) if owners else pruner
        setattr(owner, attribute, moved(state.get(name)))


def saved_latency(state: object) -> Tensor | None:
    """Return the latency that a saved run measured, of a state that may be damaged; None: none.

    >>> saved_latency({"attachments": [{"latency": torch.ones(3).double()}]})
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    parts = state.get("attachments") if isinstance(state, Mapping) else None
    for saved in parts if isinstance(parts, list) else ():
        value = saved.get("latency") if isinstance(saved, Mapping) else None
        if isinstance(value, Tensor) and value.dim() == 1 and value.dtype == torch.float64:
            return value
    return None


def pruner_states(
    state: object, counts: Mapping[str, int], optimizers: Mapping[str, Optimizer]
) -> list[Mapping[str, Any]]:
    """Return the states of the pruners, with ``layers`` and ``total_steps`` that can be used.

    Args:
        state: what a checkpoint holds for the state of `WGSEF`.
        counts: number of groups of every layer of the model.
        optimizers: who trains it, for every layer that is trained.

    Raises:
        ValueError: something else than a state, or one of other layers, groups or optimizers.

    >>> pruner_states({"attachments": 3}, {}, {})
    Traceback (most recent call last):
    ...
    ValueError: the saved state is damaged: attachments must be a list, got 3
    """
    if not isinstance(state, Mapping) or set(state) - {"grouping"} != {"attachments"}:
        shown = list(state) if isinstance(state, Mapping) else state
        _refuse("it", "what WGSEF.state_dict returned", shown)
    parts, grouping = state["attachments"], state.get("grouping", {})
    if not isinstance(grouping, Mapping):
        _refuse("grouping", "a dict", grouping)
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
            of = f" of {said_of(grouping)}" if grouping else ""
            raise ValueError(
                f"the saved state is of other groups: it has {reprlib.repr(unknown)} (layer: "
                f"groups){of}, this model has {counts}, of which optimizers train "
                f"{list(optimizers)}; resume with the same model, grouping, include and exclude, "
                "or start without it"
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
    """Raise `ValueError` unless a saved state of a pruner can be used for ``groups``.

    Args:
        saved: the state.
        like: the state that such a pruner has now.
        groups: its groups.
    """
    saved, like = ({**dict.fromkeys(_OPTIONAL), **state} for state in (saved, like))
    missing, foreign = like.keys() - saved.keys(), saved.keys() - like.keys()
    if missing or foreign:
        raise ValueError(
            f"the saved state is of another version of lightning_wgsef: missing {sorted(missing)}, "
            f"not known {sorted(map(reprlib.repr, foreign))}; resume with the version that wrote "
            "it, or start without it"
        )
    sizes = {"group": len(groups), "layer": len(groups.layers), "segment": len(groups.budgets)}
    sizes["time"] = len(groups.latency) if groups.latency is not None else 0
    for name, entry in ENTRIES.items():
        value = saved[name]
        if entry.kind == "steps":
            if not _is_count(value):
                _refuse(name, "a number of steps", value)
        elif entry.kind == "flag":
            if not isinstance(value, bool):
                _refuse(name, "True or False", value)
        elif entry.kind == "name":
            _check_measured(value, like[name], searching=saved["masks"] is None)
        elif entry.given and _of_other_arguments(value, like[name]):
            raise ValueError(
                f"the arguments changed: the saved run has {_shown(value)} for {name}, this one "
                f"{_shown(like[name])}; resume with the scope=, weights=, costs= and k= of before, "
                "or start a new fit from the checkpoint's weights, without ckpt_path"
            )
        elif value is None or (entry.given and like[name] is None):
            if entry.given and value is not like[name]:
                _refuse(name, "None as in this run" if like[name] is None else "a tensor", value)
        elif entry.per == "mask":
            counts = {layer.name: layer.count for layer in groups.layers}
            if not isinstance(value, Mapping) or value.keys() != counts.keys():
                _refuse(name, f"None or a dict of masks of {list(counts)}", value)
            for layer, mask in value.items():
                _check_tensor(f"{name}[{layer!r}]", mask, counts[layer], entry)
        else:
            _check_tensor(name, value, sizes[entry.per], entry)


def _check_measured(value: object, now: object, *, searching: bool) -> None:
    """Raise `ValueError` for weights of other gradients: a mean of both would mean nothing."""
    if value is not None and not (isinstance(value, str) and value in MEASURED):
        _refuse("importance", f"None or one of {', '.join(map(repr, MEASURED))}", value)
    if searching and value != now:
        before, own = (f"weights={x!r}" if x else "weights not measured" for x in (value, now))
        named = before if value else "weights= of before ('layer_norm' where none were named)"
        raise ValueError(
            f"the arguments changed: the saved run has {before}, this one {own}; resume with "
            f"{named}, or start a new fit from the checkpoint's weights, without ckpt_path"
        )


def _check_tensor(name: str, value: object, size: int, entry: Entry) -> None:
    boolean = entry.kind == "bool"
    wanted = f"a {'boolean' if boolean else 'float'} tensor of shape ({size},)"
    if not isinstance(value, Tensor) or tuple(value.shape) != (size,):
        _refuse(name, wanted, value)
    if value.dtype not in ((torch.bool,) if boolean else _FLOATS):
        _refuse(name, wanted, value)
    if value.layout != torch.strided or value.is_meta:
        _refuse(name, f"{wanted}, dense and with data", value)
    if entry.sign and not bool((torch.isfinite(value) & _SIGNS[entry.sign](value)).all()):
        raise ValueError(f"the saved state is damaged: {name} must be finite, {entry.sign}")


def _of_other_arguments(value: object, now: object) -> bool:
    """Return whether both are sound, and one is None or of another length."""
    sound = [
        x is None or (isinstance(x, Tensor) and x.dim() == 1 and x.dtype in _FLOATS)
        for x in (value, now)
    ]
    lengths = [x.shape if isinstance(x, Tensor) else None for x in (value, now)]
    return all(sound) and lengths[0] != lengths[1]


def _shown(value: object) -> str:
    return f"{len(value)} numbers" if isinstance(value, Tensor) else "none"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _refuse(name: str, wanted: str, value: object) -> NoReturn:
    if isinstance(value, Tensor):
        shown = f"{value.dtype} of shape {tuple(value.shape)}"
    else:
        shown = reprlib.repr(value)
    raise ValueError(f"the saved state is damaged: {name} must be {wanted}, got {shown}")
