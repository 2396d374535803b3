"""Variations of an example input: other numbers, lengths, masks and labels, as far as they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lightning_wgsef.network.example_input import mapped

Varied = Callable[[Tensor, torch.Generator], Tensor]


def variations(example_input: Any, runs: Callable[[Any], bool]) -> tuple[list[Any], list[str]]:
    """Vary an example, tensor by tensor, as far as the network takes it.

    Floats are drawn anew and negated; those that are all 0 or 1, which may be a mask, are drawn as
    such, too. Integers are drawn between the least and the largest of them, where all are equal (as
    lengths are without padding) from 1 on; booleans at random. Where a network refuses that,
    integers are tried in falling order (sorted lengths), in another order, and as they are.

    Args:
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        runs: does the network run on this input?

    Returns:
        The inputs that run, and the names or places of the tensors that could not be varied.

    >>> examples, fixed = variations((torch.ones(2, 3), torch.tensor([7, 7])), lambda x: True)
    >>> len(examples), sorted(examples[0][1].tolist())[-1], fixed
    (3, 7, [])
    """
    found: list[Any] = []
    seen: set[str] = set()
    plain = all(map(_is_plain, (value for _, value in _named(example_input))))
    for seed, draw in enumerate((_normal, _opposite) if plain else (_normal, _opposite, _binary)):
        example = next(filter(runs, _alternatives(example_input, draw, seed)), None)
        if example is not None:
            found.append(example)
            seen |= _differing(example_input, example)
    every = {name for name, value in _named(example_input) if _is_varied(value)}
    for name in sorted(every - seen):  # together with the others it was refused
        alone = _alternatives(example_input, _normal, 0, only=name)
        differing = (x for x in alone if _differing(example_input, x))
        example = next(filter(runs, differing), None)
        if example is not None:
            found.append(example)
            seen.add(name)
    return found, sorted(every - seen)


def _alternatives(
    example: Any, floats: Varied, seed: int, only: str | None = None
) -> Iterator[Any]:
    """Yield variations, from the boldest to the most timid, for networks that refuse some."""
    integers = _reflected if floats is _opposite else _drawn
    for whole in (integers, _falling, _shuffled, None):
        generator = torch.Generator().manual_seed(seed)
        varied = [
            _varied(value, floats, whole, generator) if only in (None, name) else value
            for name, value in _named(example)
        ]
        yield (
            dict(zip(example, varied, strict=True)) if isinstance(example, dict) else tuple(varied)
        )


def _varied(value: Any, floats: Varied, whole: Varied | None, generator: torch.Generator) -> Any:
    if not _is_varied(value):
        return value
    own = floats if value.is_floating_point() else whole
    made = value if own is None else own(value.detach().cpu(), generator).to(value)
    return made.detach().requires_grad_(value.requires_grad)


def _named(example: Any) -> list[tuple[str, Any]]:
    values = mapped(lambda value: value, example)
    if isinstance(values, dict):
        return list(values.items())
    return [(f"argument {place}", value) for place, value in enumerate(values)]


def _is_varied(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0 and not value.is_complex()


def _is_plain(value: Any) -> bool:
    """Is there nothing to draw from a range, and no mask among it?"""
    if not _is_varied(value):
        return True
    return value.is_floating_point() and not bool(((value == 0) | (value == 1)).all())


def _differing(example: Any, other: Any) -> set[str]:
    pairs = zip(_named(example), _named(other), strict=True)
    return {
        name
        for (name, one), (_, two) in pairs
        if isinstance(one, Tensor) and not torch.equal(one, two)
    }


def _normal(value: Tensor, generator: torch.Generator) -> Tensor:
    spread = float(value.float().std()) if value.numel() > 1 else 0.0
    noise = torch.randn(value.shape, generator=generator)
    return noise * (spread if spread > 0 else 1.0) + float(value.float().mean())


def _binary(value: Tensor, generator: torch.Generator) -> Tensor:
    if not bool(((value == 0) | (value == 1)).all()):
        return _normal(value, generator)
    return _with_first(value, (torch.rand(value.shape, generator=generator) < 0.6).to(value.dtype))


def _opposite(value: Tensor, _: torch.Generator) -> Tensor:
    return -value


def _drawn(value: Tensor, generator: torch.Generator) -> Tensor:
    """Draw integers within their range, of which one is the largest; some ones become zero."""
    if value.dtype == torch.bool or not bool((value > 1).any() | (value < 0).any()):
        ones = torch.rand(value.shape, generator=generator) < 0.6
        return _with_first(value, ones.to(value.dtype))
    low, high = int(value.min()), int(value.max())
    low = min(low, 1) if low == high else low
    drawn = torch.randint(low, high + 1, value.shape, generator=generator).to(value.dtype)
    drawn.view(-1)[int(torch.randint(value.numel(), (1,), generator=generator))] = high
    return drawn


def _with_first(value: Tensor, drawn: Tensor) -> Tensor:
    """Keep what comes first in every row: a mask must leave something."""
    if value.dim() and value.shape[-1] > 1:
        drawn[..., 0] = value[..., 0]
    return drawn


def _reflected(value: Tensor, _: torch.Generator) -> Tensor:
    if value.dtype == torch.bool:
        return ~value
    return value.max() + value.min() - value


def _falling(value: Tensor, generator: torch.Generator) -> Tensor:
    return _drawn(value, generator).flatten().sort(descending=True).values.view(value.shape)


def _shuffled(value: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(value.numel(), generator=generator)
    return value.flatten()[order].view(value.shape)
