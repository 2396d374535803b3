"""Files that are there whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path``, which takes its place once the block has succeeded.

    Raises:
        ValueError: no file can be written there.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with whole_file(f"{folder}/notes.txt") as temporary:
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


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Raise `ValueError` unless a file can be written at ``path``; returns a free name beside it.

    >>> check_writable("missing/model.onnx")
    Traceback (most recent call last):
    ...
    ValueError: path must be a file that can be written, got 'missing/model.onnx': No such file or \
directory
    """
    target = Path(path)
    temporary = target.parent / f".{target.name}.{uuid4().hex}"
    try:
        if target.is_dir():
            raise IsADirectoryError(None, "it is a directory")
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise ValueError(
            f"path must be a file that can be written, got {str(target)!r}: {error.strerror}"
        ) from error
    return temporary
