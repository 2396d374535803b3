"""Records of finished runs: one JSON file each, which is whole or not there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lightning_wgsef.utils.files import atomic_write

Record = dict[str, Any]


def write_record(path: Path, record: Record) -> None:
    """Write a record; the file gets its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_record(path: Path) -> Record | None:
    """The record of a finished run; None if there is none.

    One that cannot be read is set aside, with a message.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or "name" not in record:
            raise ValueError("it is no record")
    except (ValueError, UnicodeDecodeError) as error:
        set_aside(path, str(error))
        return None
    return record


def set_aside(path: Path, reason: str) -> None:
    """Rename what cannot be used, so that its run is repeated and nothing is lost."""
    aside = path.with_name(f"{path.name}.damaged")
    path.replace(aside)
    print(
        f"{path.name} is damaged ({reason}): now {aside.name}; its run is repeated", file=sys.stderr
    )
