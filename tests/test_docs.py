"""Every block of code in the README runs, and what it shows as output is its output."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
KINDS = {"python", "bash", "text", "bibtex"}


def test_kinds_of_blocks() -> None:
    assert {language for language, _ in BLOCKS} <= KINDS
    assert len(PYTHON) >= 5


@pytest.mark.filterwarnings("ignore:.*litlogger")
@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_block_runs(
    number: int, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(PYTHON[number], f"README block {number}", "exec"), names)
    assert names
    following = BLOCKS[[code for _, code in BLOCKS].index(PYTHON[number]) + 1 :][:1]
    if following and following[0][0] == "text" and "print(" in PYTHON[number]:
        assert capsys.readouterr().out.strip() == following[0][1].strip()


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
    targets = [re.fullmatch(r"make (\w+)\s*(#.*)?", line) for line in commands if line]
    assert targets
    assert all(targets)
    for target in targets:
        assert re.search(rf"^{target.group(1)}:", makefile, flags=re.MULTILINE)


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
