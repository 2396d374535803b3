"""Atomic writes and safe reads of files."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from lightning_wgsef.utils.validation import check_kind


def as_path(name: str, value: str | os.PathLike[str]) -> Path:
    """Return ``value`` as a path.

    Raises:
        ValueError: it is none; the message calls it ``name``.

    >>> as_path("path", 3)
    Traceback (most recent call last):
    ...
    ValueError: path must be a file name, a str or pathlib.Path, got 3
    """
    check_kind(name, value, (str, os.PathLike), "a file name, a str or pathlib.Path")
    return Path(value)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside ``path`` that takes its place once the block has succeeded.

    Whatever happens in between, what is at ``path`` is the old file or the whole new one.

    Raises:
        ValueError: no file can be written there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(f"{folder}/notes.txt") as temporary:
    ...         _ = temporary.write_text("all of it")
    ...     os.listdir(folder)
    ['notes.txt']
    """
    temporary = check_writable(path)
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # as for any new file; some writers let the owner alone read
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(data: Any, path: str | os.PathLike[str]) -> None:
    """Write plain data as JSON; the file gets its name only when it is whole.

    Raises:
        ValueError: no file can be written there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_json({"k": 2}, f"{folder}/k.json")
    ...     print(Path(folder, "k.json").read_text(), end="")
    {
      "k": 2
    }
    """
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def check_writable(
    path: str | os.PathLike[str], argument: str = "path", *, make_folder: bool = False
) -> Path:
    """Return a free name beside ``path``, where a file can be written.

    Args:
        path: the file.
        argument: what messages call it.
        make_folder: make its folder, if there is none.

    Raises:
        ValueError: no file can be written there.

    >>> check_writable("missing/model.onnx")
    Traceback (most recent call last):
    ...
    ValueError: path must be a file that can be written, got 'missing/model.onnx': No such file or \
directory
    """
    target = as_path(argument, path)
    temporary = target.parent / f".{target.name}.{uuid4().hex}"
    try:
        if target.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        if make_folder:
            target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise ValueError(
            f"{argument} must be a file that can be written, got {str(target)!r}: {error.strerror}"
        ) from error
    return temporary


def read_checkpoint(path: str | os.PathLike[str], *, in_place: bool = False) -> Any:
    """Return the numbers and text in a file of `torch.save`, on the CPU; nothing is executed.

    With ``in_place``, tensors stay in the file until they are looked at.

    Raises:
        ValueError: no such file, one of something else, or one that holds more than that.

    >>> read_checkpoint("missing.ckpt")
    Traceback (most recent call last):
    ...
    ValueError: there is no file missing.ckpt
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)
    except Exception as error:  # a file of something else fails in any way inside the unpickler
        # torch's own words recommend to execute the file.
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} holds more than numbers and text: to read its {code[1]}, code from the "
                "file would have to be executed. Write torch.save(model.state_dict(), "
                "'weights.pt') where it was made, and read that"
            ) from error
        raise ValueError(f"{path} is truncated or no checkpoint") from error
