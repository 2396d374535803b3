"""Configuration of a slim network of Hugging Face: sizes that its class can be built with again."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, product
from typing import Any

import torch
from torch import nn

from lightning_wgsef.groupings.head import HEADS, KEY_VALUE_HEADS
from lightning_wgsef.network.equivalence import TOLERANCE, relative_difference
from lightning_wgsef.network.example_input import run_example, seeded, tensors
from lightning_wgsef.network.surgery import RemovalPlan

Shapes = Mapping[str, tuple[int, ...]]

# Where an entry is: the names of configurations inside of each other, and its own.
_Path = tuple[str, ...]

_MOST = 64

# What no other values of attributes and shapes of tensors say.
_UNTOLD = ("heads", "skipped", "experts", "silenced", "norms")


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of everything in a network's state_dict."""
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def untold(plans: Sequence[RemovalPlan]) -> list[str]:
    """Kinds of removals that cannot be told by sizes of modules and shapes of tensors."""
    return [what for what in _UNTOLD if any(getattr(plan, what) for plan in plans)]


def is_configured(network: nn.Module) -> bool:
    """Is it a network of transformers, which is made of a configuration, and saved with it?

    >>> is_configured(nn.Linear(2, 2))
    False
    """
    config = getattr(network, "config", None)  # what other libraries call so is a dict, or theirs
    return hasattr(config, "to_dict") and hasattr(network, "save_pretrained")


@torch.no_grad()
def update_config(
    network: nn.Module, before: Shapes, example_input: Any, plans: Sequence[RemovalPlan]
) -> str:
    """Write the sizes of a slim network into its ``config``, where they are the same in all layers.

    Proved by building the class from the new configuration: with the weights of the network it must
    return the same.

    Args:
        network: a network; one without ``save_pretrained`` is passed over.
        before: the shapes that it had.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        plans: what was taken out of it.

    Returns:
        "" if ``from_pretrained`` will load what ``save_pretrained`` writes, else why not.
    """
    now = shapes_of(network)
    if not hasattr(network, "save_pretrained") or now == before:
        return ""
    kept = "save_slim and load_slim keep this network"
    if not is_configured(network):
        return f"from_pretrained makes it as it was, and cannot load what is slim; {kept}"
    config = network.config
    if not untold(plans):
        kept += ", or save_slim a folder with the code that from_pretrained needs"
    if any(plan.experts or plan.silenced for plan in plans):
        return (
            "its routers know experts that are gone, which its class cannot say: from_pretrained "
            f"would refuse what save_pretrained writes; {kept}"
        )
    reason = "its configuration cannot say its sizes: from_pretrained would refuse what"
    for values in islice(_candidates(network, before, now, plans), _MOST):
        try:
            changed = copy.deepcopy(config)
            _write(changed, values)
            with torch.device("meta"):
                if shapes_of(type(network)(changed)) != now:
                    continue
            with seeded(network):
                fresh = type(network)(changed)
            fresh.to(next(network.parameters())).load_state_dict(network.state_dict())
            found = tensors(run_example(fresh.eval(), example_input))
        except Exception:  # a configuration and its class may refuse sizes in any way
            continue
        expected = tensors(run_example(network, example_input))
        if relative_difference(found, expected, 1.0) <= TOLERANCE:
            _write(config, values)
            return ""
        reason = "its class computes other numbers from the new sizes: from_pretrained would not do"
        reason += " the same with what"
    return f"{reason} save_pretrained writes; {kept}"


def _write(config: Any, values: Mapping[_Path, float]) -> None:
    for (*inside, name), value in values.items():
        place = config
        for part in inside:
            place = getattr(place, part)
        setattr(place, name, value)


def _candidates(
    network: nn.Module, before: Shapes, now: Shapes, plans: Sequence[RemovalPlan]
) -> Iterator[dict[_Path, float]]:
    """Yield new values of the configuration: widths, and numbers of heads with them."""
    sizes: dict[int, set[int]] = {}
    for name in before.keys() & now.keys():
        for old, new in zip(before[name], now[name], strict=False):
            if old != new:
                sizes.setdefault(old, set()).add(new)
    own = dict(_numbers(network.config))
    heads = {path: n for path, n in own.items() if path[-1] in HEADS + KEY_VALUE_HEADS}
    widths = {
        path: [*sorted(sizes[n]), n]
        for path, n in own.items()
        if path not in heads and isinstance(n, int) and n in sizes
    }
    fixed = dict(_epsilons(network, own, plans))
    shares = {(old, new) for old, found in sizes.items() for new in found}
    for old, new in [(1, 1), *sorted(shares, reverse=True)]:
        if any(n * new % old for n in heads.values()):
            continue
        counts = {path: int(n) * new // old for path, n in heads.items()}
        for width in (None, *_head_widths(network)):
            told: dict[_Path, float] = {} if width is None else {("head_dim",): width}
            for chosen in product(*widths.values()):
                yield {**dict(zip(widths, chosen, strict=True)), **counts, **told, **fixed}


def _numbers(config: Any, inside: _Path = ()) -> Iterator[tuple[_Path, float]]:
    """Yield the numbers of a configuration, and of those inside of it."""
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _numbers(value, (*inside, name))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield (*inside, name), value


def _head_widths(network: nn.Module) -> list[int]:
    """The width of a head, where all modules say the same; it no longer is a share of the width."""
    found = {getattr(module, "head_dim", None) for module in network.modules()} - {None}
    return [width for width in found if type(width) is int] if len(found) == 1 else []


def _epsilons(
    network: nn.Module, own: Mapping[_Path, float], plans: Sequence[RemovalPlan]
) -> Iterator[tuple[_Path, float]]:
    """Yield what norms add to the mean square, over fewer channels."""
    shares = {before / after for plan in plans for before, after in plan.norms.values()}
    if len(shares) == 1:
        (share,) = shares
        for path, value in own.items():
            if "eps" in path[-1] and isinstance(value, float) and math.isfinite(value):
                yield path, value * share
