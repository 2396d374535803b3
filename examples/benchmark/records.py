"""Records of finished runs: a file of JSON lines for every suite, which only ever grows."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Record = dict[str, Any]
# Not all of them are there: OTO has an environment of its own.
PACKAGES = ("torch", "pytorch-lightning", "torch-pruning", "torchao", "only-train-once")


class Records:
    """The records in a file, by the names of their runs.

    A record is appended by one write, so that several processes may do it at a time. A line that
    cannot be read is passed over with a message, and its run is repeated; a last line without an
    end is not there yet.

    Args:
        path: of the file; it need not be there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, Record] = {}
        self._lines = self._bytes = 0

    def get(self, name: str) -> Record | None:
        """The record of a run; None if it is not finished."""
        self._read()
        return self._known.get(name)

    def all(self) -> list[Record]:
        """All records, in the order of their names."""
        self._read()
        return [self._known[name] for name in sorted(self._known)]

    def append(self, record: Record) -> None:
        """Add the record of a run.

        Raises:
            OSError: the disk is full; what was there is intact.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = f"{json.dumps(record)}\n".encode()
        with self.path.open("a+b", buffering=0) as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # somebody was stopped in the middle of a line
                    line = b"\n" + line
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def _read(self) -> None:
        """Read what was added since the last time."""
        if not self.path.exists() or self.path.stat().st_size == self._bytes:
            return
        with self.path.open("rb") as file:
            file.seek(self._bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._bytes += len(line)
                self._lines += 1
                try:
                    record = json.loads(line)
                    self._known[record["name"]] = record
                except (ValueError, TypeError, KeyError) as error:
                    print(
                        f"line {self._lines} of {self.path} is damaged ({error}); its run is "
                        "repeated",
                        file=sys.stderr,
                    )


def origin(device: str = "cpu", packages: tuple[str, ...] = PACKAGES) -> Record:
    """What a record says of the place that it comes from: versions, hardware and date."""
    versions = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    instructions = torch.backends.cpu.get_cpu_capability()  # other ones round in another order
    hardware = f"{platform.machine()} {instructions}, {device}, {torch.get_num_threads()} threads"
    return {"versions": versions, "hardware": hardware, "date": time.strftime("%Y-%m-%d")}


def set_aside(path: Path, reason: str) -> None:
    """Rename what cannot be used, so that its run is repeated and nothing is lost."""
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    print(
        f"{path.name} is damaged ({reason}): now {aside.name}; its run is repeated", file=sys.stderr
    )
