"""Tables of the documents are those of the records; ``python -m examples.benchmark documents``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from examples.benchmark import __main__ as command
from examples.benchmark.documents import CELLS, filled
from examples.benchmark.records import Records

CPU = "<!-- records: cpu {rows: {%s}, columns: [%s]} -->\n| a | b |\n|---|--:|\n"
ONE = CPU % ("ours: 'homotopy, structure, layer'", "[lenet-10, accuracy]")


def test_there_are_tables_in_the_documents() -> None:
    texts = [path.read_text("utf-8") for path in command.DOCUMENTS]
    assert [text.count("<!-- records:") for text in texts] == [1, 5, 0]
    assert [text.count("<!-- figures:") for text in texts] == [0, 2, 2]


@pytest.mark.parametrize("path", command.DOCUMENTS, ids=lambda path: path.parent.name)
def test_tables_are_up_to_date(path: Path) -> None:
    text = path.read_text("utf-8")
    assert filled(text, command.RESULTS, command.read) == text, "run the command above"


def test_other_numbers_are_replaced_and_nothing_else() -> None:
    row = "| ours | 83.09 ± 0.05 |\n"
    text = (
        f"before\n\n{ONE}| ours | 99.99 ± 0.00 |\n| more | 1 |\n\n| c | d |\n|---|---|\n| e | f |\n"
    )
    expected = f"before\n\n{ONE}{row}\n| c | d |\n|---|---|\n| e | f |\n"
    assert filled(text, command.RESULTS, command.read) == expected
    assert filled(expected, command.RESULTS, command.read) == expected
    assert filled(ONE, command.RESULTS, command.read) == ONE + row


def test_every_kind_of_cell(tmp_path: Path) -> None:
    columns = ", ".join(f"[lenet-10, {cell}]" for cell in CELLS)
    text = filled(CPU % ("x: HESSO, y: dense", columns), command.RESULTS, command.read)
    first, second = text.splitlines()[-2:]
    assert first == "| x | 86.40 ± 0.24 | 50 % | 70.5 → 40.1 | 0.87 |"
    assert second == "| y | 90.22 ± 0.82 | 100 % | | 1.00 |"
    text = filled(CPU % ("x: HESSO", "[lenet-10, accuracy]"), tmp_path, command.read)
    assert text.splitlines()[-1] == "| x | not run |"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ONE.replace("cpu", "tpu"), "suite must be one of"),
        (ONE.replace("lenet-10", "lenet"), "a column's task must be one of ['lenet-10', "),
        (ONE.replace("accuracy", "acuracy"), "did you mean 'accuracy'?"),
        (ONE.replace("homotopy", "homotopi"), "a row's method must be one of"),
    ],
)
def test_what_is_not_there_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        filled(text, command.RESULTS, command.read)


def test_figures_of_an_example(tmp_path: Path) -> None:
    records = Records(tmp_path / "zoo" / "figures.jsonl")
    records.append({"name": "lion", "legs": 4, "weight": [190.25, 126.0]})
    records.append({"name": "snake", "legs": 0})
    text = (
        "<!-- figures: zoo {rows: {a lion: lion, b: snake}, "
        "columns: ['{legs}', '{weight[1]:.1f} kg', '{tail}']} -->\n"
        "| | legs | | |\n|---|--:|---|---|\n"
    )
    expected = f"{text}| a lion | 4 | 126.0 kg | |\n| b | 0 | | |\n"
    assert filled(text, tmp_path, command.read) == expected
    assert filled(expected, tmp_path, command.read) == expected
    with pytest.raises(ValueError, match=r"a row of .* must be one of \['lion', 'snake'\]"):
        filled(text.replace("lion:", "tiger:").replace(": lion", ": tiger"), tmp_path, command.read)


def test_the_command_writes_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = tmp_path / "a.md"
    document.write_text(ONE)
    monkeypatch.setattr(command, "DOCUMENTS", (document,))
    monkeypatch.setattr(sys, "argv", ["benchmark", "documents"])
    assert command.main() == 0
    assert document.read_text() == f"{ONE}| ours | 83.09 ± 0.05 |\n"


def test_other_commands_need_a_suite(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmark", "report"])
    assert command.main() == 2
    assert "--suite must be one of ['adam', " in capsys.readouterr().err
