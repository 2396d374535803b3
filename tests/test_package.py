"""The package as a whole: what it exports, and that its contracts can be broken."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.version import Version

import lightning_wgsef
from lightning_wgsef.cli.commands import main

PACKAGE = Path(lightning_wgsef.__file__).parent
ROOT = PACKAGE.parent


def test_exported_names_are_there() -> None:
    assert len(lightning_wgsef.__all__) == len(set(lightning_wgsef.__all__)) >= 32
    assert [n for n in lightning_wgsef.__all__ if not hasattr(lightning_wgsef, n)] == []
    assert "WGSEFCallback" in lightning_wgsef.__all__


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_command_is_there() -> None:
    (command,) = entry_points(group="console_scripts", name="lightning-wgsef")
    assert command.load() is main


def test_the_citation_is_of_this_version() -> None:
    assert f"version: {lightning_wgsef.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_lowest_versions_are_the_floors() -> None:
    """What the workflow tests is what is promised."""
    tomllib = pytest.importorskip("tomllib", reason="part of Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    promised = [*project["dependencies"]]
    for extra in ("examples", "onnx", "plots", "test"):
        promised += [line for line in extras[extra] if not line.startswith(project["name"])]
    floors = {re.split(r"[\[>]", line)[0]: Version(line.split(">=")[1]) for line in promised}
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    lowest = {name: Version(version) for name, version in pairs}
    assert lowest.pop("numpy")  # of their time, and needed by some of them
    assert lowest == floors


# File, the import that is put at its end, and the contract that it breaks.
PLANTED = {
    "upward": ("penalties/envelope.py", "lightning_wgsef.training.schedules", "Imports go down"),
    "sideways": ("reports/plots.py", "lightning_wgsef.slimming.slim", "Imports go down"),
    "in a circle": ("utils/tables.py", "lightning_wgsef.utils.validation", "No circles"),
    "Lightning": ("training/masks.py", "pytorch_lightning", "Only lightning/ knows Lightning"),
    "an example": ("export/runtimes.py", "examples.training", "The package knows neither"),
    "under another name": ("cli/checkpoints.py", "lightning.fabric", "Only lightning/"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_import_breaks_its_contract(planted: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "lightning_wgsef")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    place, module, contract = PLANTED[planted]
    with (tmp_path / "lightning_wgsef" / place).open("a") as file:
        file.write(f"import {module}\n")
    if planted == "in a circle":
        other = tmp_path / "lightning_wgsef" / "utils" / "validation.py"
        with other.open("a") as file:
            file.write("import lightning_wgsef.utils.tables\n")
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [command, "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [line for line in done.stdout.splitlines() if line.endswith("BROKEN")]
    assert any(line.startswith(contract) for line in broken), done.stdout


def test_the_planted_imports_are_not_there_already() -> None:
    for place, module, _ in PLANTED.values():
        tree = ast.parse((PACKAGE / place).read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert module not in names
