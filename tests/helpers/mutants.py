"""Copies of the package's solver with a fault in their source, for tests that must notice it."""

from __future__ import annotations

import ast
import dataclasses
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

import lightning_wgsef

PACKAGE = Path(lightning_wgsef.__file__).parent
NAME = PACKAGE.name


@dataclasses.dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in the only place, of all files of the solver, where it is.

    Moving code from file to file needs no change here. The fault is to be noticed by `check`; for a
    change that alters no result that is None.
    """

    what: str
    old: str
    new: str
    check: Callable[..., float] | None = None

    def file(self, sources: Mapping[str, str]) -> str:
        """The one that holds the old text."""
        places = [name for name, source in sources.items() for _ in range(source.count(self.old))]
        assert len(places) == 1, f"is to be in one place, is in {places}: {self.old}"
        return places[0]


def solver(*names: str) -> dict[str, str]:
    """Sources of these files of the package and of all that they import, those first."""
    found: dict[str, str] = {}

    def add(name: str) -> None:
        source = _path(name).read_text(encoding="utf-8")
        for below in _imported(source):
            if below not in found:
                add(below)
        found[name] = source

    for name in names:
        add(name)
    return found


def _path(name: str) -> Path:
    return PACKAGE.joinpath(*name.split(".")).with_suffix(".py")


def _imported(source: str) -> Iterator[str]:
    """Dotted names, below the package, of the files that the source imports from it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == NAME:
            module = node.module.removeprefix(NAME).removeprefix(".")
            if _path(module or "__init__").is_file() and module:
                yield module
            else:  # a folder: its files are imported by name
                yield from (f"{module}.{alias.name}".removeprefix(".") for alias in node.names)


def load(sources: dict[str, str], fault: Fault | None = None) -> dict[str, types.ModuleType]:
    """Modules made from the sources, by name, with a fault or none."""
    if fault:
        name = fault.file(sources)
        sources = sources | {name: sources[name].replace(fault.old, fault.new)}
    modules = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, source in sources.items():
            module = types.ModuleType(f"{NAME}.{name}")
            # Imports of the next file, and dataclasses, look here.
            patch.setitem(sys.modules, module.__name__, module)
            folder, _, file = module.__name__.rpartition(".")
            patch.setattr(sys.modules[folder], file, module, raising=False)
            exec(compile(source, str(_path(name)), "exec"), module.__dict__)
            modules[name] = module
    return modules
