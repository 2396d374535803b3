"""A slim network of Hugging Face as a folder that ``from_pretrained`` loads."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from lightning_wgsef.network.surgery import RemovalPlan
from lightning_wgsef.slimming.model_config import shapes_of, untold


def save_folder(network: Any, plans: Sequence[RemovalPlan], folder: str | os.PathLike[str]) -> None:
    """Write what ``from_pretrained`` loads: with code, if the configuration has not all the sizes.

    Args:
        network: has ``config`` and ``save_pretrained``.
        plans: what was taken out of it.
        folder: is made, if there is none; files of the same names in it are replaced.

    Raises:
        ValueError: no class of transformers with other sizes does the same, or a folder that
            cannot be written.
    """
    with torch.device("meta"):
        named = shapes_of(type(network)(copy.deepcopy(network.config))) == shapes_of(network)
    saved = network if named else _with_code(network, plans)
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=target) as temporary:
            saved.save_pretrained(temporary)
            for file in Path(temporary).iterdir():
                file.replace(target / file.name)
    except OSError as error:
        raise ValueError(
            f"path must be a folder that can be written, got {str(target)!r}: {error.strerror}"
        ) from error


def _with_code(network: Any, plans: Sequence[RemovalPlan]) -> Any:
    """A network with these weights, of a class that is saved with its code."""
    SlimModel = import_module("lightning_wgsef.slimming.slim_model").SlimModel  # noqa: N806
    before = getattr(network.config, "slim", {})
    kind = before.get("class", type(network).__name__)
    base = getattr(import_module("transformers"), kind, None)
    if base is None or not isinstance(network, base):
        raise _refusal(f"transformers has no class {kind}, from which it could be made again")
    if kinds := untold(plans):
        raise _refusal(f"its class cannot be told what was taken out: {', '.join(kinds)}")
    config, now = copy.deepcopy(network.config), shapes_of(network)
    with torch.device("meta"):
        plain = shapes_of(base(copy.deepcopy(config)))
    sizes = {path: dict(own) for path, own in before.get("sizes", {}).items()}
    for plan in plans:
        for path, own in plan.sizes.items():
            sizes.setdefault(path, {}).update(own)
    shapes = {name: list(shape) for name, shape in now.items() if plain.get(name) != shape}
    config.slim = {"class": kind, "sizes": sizes, "shapes": shapes}
    config.auto_map = dict.fromkeys(_auto_classes(config, base), "slim_model.SlimModel")
    with torch.device("meta"):
        made = SlimModel.of(config)(config)
    made.load_state_dict(network.state_dict(), assign=True)
    return made


def _auto_classes(config: Any, base: type[nn.Module]) -> list[str]:
    """Names of the classes of transformers that load ``base`` for such a configuration."""
    every = vars(import_module("transformers.models.auto.modeling_auto"))
    found = ["AutoModel"]
    for name, auto in every.items():
        mapping = getattr(auto, "_model_mapping", {})
        if name.startswith("AutoModelFor") and type(config) in mapping:
            classes = mapping[type(config)]
            if base in (classes if isinstance(classes, tuple) else (classes,)):
                found.append(name)
    return found


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"model: no folder of from_pretrained can hold this network: {reason}; name a file that "
        "ends in .safetensors, which load_slim reads"
    )
