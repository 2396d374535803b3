"""Damaged and malicious values for the tests that read files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

FOREIGN = "no such key"


class Malicious:
    """Unpickling it makes a file; it could do anything."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


WRONG_VALUES: dict[str, Any] = {
    "None": None,
    "text": "many",
    "-1": -1,
    "huge": 10**400,
    "above int64": 2**63,
    "nan": float("nan"),
    "True": True,
    "list": [1, [2]],
    "empty dict": {},
    "empty list": [],
    "bytes": b"\x00",
    "tensor of text's length": torch.ones(4, dtype=torch.uint8),
    "tensor without axes": torch.tensor(1.0),
    "tensor of NaN": torch.full((2,), float("nan")),
    "empty tensor": torch.empty(0),
    "complex tensor": torch.ones(2, dtype=torch.complex64),
    "sparse tensor": torch.ones(2).to_sparse(),
    "tensor of a billion": torch.ones(1).expand(10**9),
    "tensor without data": torch.ones(2, device="meta"),
}


def like_but_wrong(value: object) -> dict[str, Any]:
    """Tensors that are nearly right: another dtype, one entry more, none of the layout."""
    if not isinstance(value, torch.Tensor):
        return {}
    return {
        "one more": torch.cat([value, value[:1]]),
        "as a column": value[:, None],
        "of integers": value.to(torch.int64),
        "of eight bits": value.to(torch.float8_e4m3fn),
        "complex": value.to(torch.complex64),
        "sparse": value.to_sparse(),
        "without data": value.to("meta"),
        "of NaN": torch.full_like(value, float("nan"), dtype=torch.float64),
        "negative": -value.double() - 1,
    }


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything inside nested dicts and lists, and to the whole itself."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from places(inner, (*path, number))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with something else at a place."""
    if not path:
        return new
    if isinstance(value, dict):
        return {
            key: changed(inner, path[1:], new) if key == path[0] else inner
            for key, inner in value.items()
        }
    return [
        changed(inner, path[1:], new) if number == path[0] else inner
        for number, inner in enumerate(value)
    ]


def variants(value: Any) -> Iterator[tuple[str, Any]]:
    """Every change of every place: other values, a key less, a key more; with what was done."""
    for path in places(value):
        found = at(value, path)
        for what, new in {**WRONG_VALUES, **like_but_wrong(found)}.items():
            yield f"{path}: {what}", changed(value, path, new)
        if isinstance(found, dict):
            for key in found:
                less = {name: inner for name, inner in found.items() if name != key}
                yield f"{path}: without {key}", changed(value, path, less)
            for foreign in (FOREIGN, 7, ("a", 1)):
                more = {**found, foreign: 0}
                yield f"{path}: with {foreign!r}", changed(value, path, more)
        if isinstance(found, list) and found:
            yield f"{path}: twice", changed(value, path, [*found, found[0]])
