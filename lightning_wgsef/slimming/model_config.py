"""Configuration of a slim network of Hugging Face: sizes that its class can be built with again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lightning_wgsef.groupings.head import HEADS, KEY_VALUE_HEADS

Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of everything in a network's state_dict."""
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def update_config(network: nn.Module, before: Shapes, *, experts_gone: bool = False) -> str:
    """Write the sizes of a slim network into its ``config``, where they are the same in all layers.

    Proved by building the class from the new configuration: everything must have the shape it has.

    Args:
        network: a network; one without ``config`` and ``save_pretrained`` is passed over.
        before: the shapes that it had.
        experts_gone: are there experts that a router knows and that are gone?

    Returns:
        "" if ``from_pretrained`` will load what ``save_pretrained`` writes, else why not.
    """
    config, now = getattr(network, "config", None), shapes_of(network)
    if config is None or not hasattr(network, "save_pretrained") or now == before:
        return ""
    if experts_gone:
        return (
            "its routers know experts that are gone, which its class cannot say: from_pretrained "
            "would refuse what save_pretrained writes; save_slim and load_slim keep this network"
        )
    for values in _candidates(config, before, now):
        changed = copy.deepcopy(config)
        for name, value in values.items():
            setattr(changed, name, value)
        try:
            with torch.device("meta"):
                fresh = type(network)(changed)
        except Exception:  # a class may refuse sizes in any way
            continue
        if shapes_of(fresh) == now:
            for name, value in values.items():
                setattr(config, name, value)
            return ""
    return (
        "its layers differ in sizes that it has once: from_pretrained would refuse what "
        "save_pretrained writes; save_slim and load_slim keep this network"
    )


def _candidates(config: Any, before: Shapes, now: Shapes) -> Iterator[dict[str, int]]:
    """Yield new values of the configuration: widths, and numbers of heads with them."""
    sizes: dict[int, set[int]] = {}
    for name in before.keys() & now.keys():
        for old, new in zip(before[name], now[name], strict=False):
            if old != new:
                sizes.setdefault(old, set()).add(new)
    own = {n: v for n, v in vars(config).items() if isinstance(v, int) and not isinstance(v, bool)}
    heads = [name for name in own if name in HEADS + KEY_VALUE_HEADS]
    widths = {
        name: next(iter(sizes[value]))
        for name, value in own.items()
        if name not in heads and len(sizes.get(value, ())) == 1
    }
    shares = {(old, new) for old, found in sizes.items() for new in found}
    for old, new in [(1, 1), *sorted(shares, reverse=True)]:
        counts = {name: own[name] * new // old for name in heads}
        if all(counts.values()):
            yield {**widths, **counts}
            yield counts
            for name, value in widths.items():
                yield {name: value, **counts}
