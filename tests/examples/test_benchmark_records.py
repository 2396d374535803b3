"""Records of the benchmark: written whole, read while others write, and those that lie in git."""

from __future__ import annotations

import json
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from examples.benchmark.__main__ import RESULTS, write_report
from examples.benchmark.methods import METHODS
from examples.benchmark.records import Records
from examples.benchmark.registry import DATA, NETWORKS
from examples.benchmark.suite import Run, Task, read_suite

FILES = sorted(RESULTS.glob("*/records.jsonl"))
KNOWN = {"network": NETWORKS, "data": DATA, "methods": METHODS}
COUNTS = {
    "allocation": 54,
    "budget": 90,
    "cpu": 636,
    "curves": 348,
    "optimizers": 94,
    "resnet20": 85,
    "sensitivity": 96,
    "two_of_four": 49,
}


def test_what_is_appended_is_read_by_whoever_looks(tmp_path: Path) -> None:
    path = tmp_path / "suite" / "records.jsonl"
    writer, reader = Records(path), Records(path)
    assert reader.get("a") is None
    assert reader.all() == []
    writer.append({"name": "b", "loss": [0.1, 1e-300]})
    assert reader.get("b") == {"name": "b", "loss": [0.1, 1e-300]}
    writer.append({"name": "a"})
    assert [record["name"] for record in reader.all()] == ["a", "b"]


def append_many(path: Path, letter: str) -> None:
    for number in range(50):
        Records(path).append({"name": f"{letter}{number}", "text": letter * 5000})


def test_several_processes_append_at_a_time(tmp_path: Path) -> None:
    context = get_context("fork")
    path = tmp_path / "records.jsonl"
    processes = [context.Process(target=append_many, args=(path, x)) for x in "abcd"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    records = Records(path).all()
    assert len(records) == 200
    assert all(set(record["text"]) == {record["name"][0]} for record in records)


def test_half_a_line_is_no_record_and_spoils_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"name": "a"}\n{"name": "b", ')
    records = Records(path)
    assert [record["name"] for record in records.all()] == ["a"]
    records.append({"name": "c"})
    assert [record["name"] for record in records.all()] == ["a", "c"]
    assert f"line 2 of {path} is damaged" in capsys.readouterr().err
    assert records.get("b") is None


@pytest.mark.parametrize("line", ["[1, 2]", "{}", "3", '{"nam', "\x00\x00", '"name"'])
def test_what_is_no_record_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(f'{line}\n{{"name": "a"}}\n')
    assert Records(path).all() == [{"name": "a"}]
    assert "line 1 of" in capsys.readouterr().err


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left"):
        Records(Path("/dev/full")).append({"name": "a"})


def test_all_records_are_there() -> None:
    """What was run once stays."""
    assert COUNTS.items() <= {path.parent.name: len(lines(path)) for path in FILES}.items()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_every_record_is_whole_and_named_after_its_run(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = lines(path)
    assert Counter(record["name"] for record in records).most_common(1)[0][1] == 1
    assert Records(path).all() == sorted(records, key=lambda record: record["name"])
    assert capsys.readouterr().err == ""
    for record in records:
        task = Task(**record["task"])
        run = Run(task, record["method"], record["value"], record["seed"], record["trial"])
        assert run.name == record["name"]
        assert len(record["validation"]) == len(record["alive"]) == task.epochs
        assert record["trial"] != ("test_accuracy" in record)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_tables_and_plots_are_those_of_the_records(path: Path, tmp_path: Path) -> None:
    """``python -m examples.benchmark report --suite ..`` writes what lies there."""
    folder = path.parent
    if (folder / "latencies.json").exists():
        (tmp_path / "latencies.json").write_bytes((folder / "latencies.json").read_bytes())
    suite = read_suite(folder.name, KNOWN)
    text, *plots = write_report(suite, Records(path), tmp_path)
    assert text.read_text(encoding="utf-8") == (folder / text.name).read_text(encoding="utf-8")
    assert {plot.name for plot in plots} == {plot.name for plot in folder.glob("*.svg")}
    assert not list(folder.glob("*.png"))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
