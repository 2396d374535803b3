"""From pytest-benchmark's JSON to bench.json, and from that alone to bench.md.

python tests/benchmarks/table.py RAW.json FOLDER  # both files
python tests/benchmarks/table.py FOLDER           # the table again, from FOLDER/bench.json
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

HEADER = [
    "name",
    "what",
    "floor",
    "ratio",
    "quartiles",
    "target",
    "met",
    "rounds",
    "time",
    "floor's",
]


def reduced(raw: dict[str, Any]) -> dict[str, Any]:
    """Medians, quartiles, versions and the machine: what is worth keeping of a run."""
    rows = [row for one in raw["benchmarks"] for row in one["extra_info"].get("rows", [])]
    return {
        "made_at": raw["datetime"][:16],
        "made_on": raw["made_on"],
        "rows": [{k: _rounded(v) for k, v in row.items() if v != ""} for row in rows],
        "not_run": raw["not_run"],
    }


def markdown(results: dict[str, Any]) -> str:
    """The table, one part for every case."""
    made = results["made_on"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    environment = " ".join(f"{k}={v}" for k, v in made["environment"].items())
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench` on {results['made_at']}, from `bench.json` alone: {made['cpu']}, "
        f"{made['cores']} cores, {made['threads']} threads, {made['memory_gib']} GiB, "
        f"{'GPU ' + made['gpu'] if made['gpu'] else 'no GPU'}, {made['system']}. {versions}."
        + (f" Environment: `{environment}`." if environment else ""),
        "",
        "A ratio is the median, over rounds, of the time of a step divided by the time of its "
        "floor in the same round (floor, step, floor, step, ...), with the lower and the upper "
        "quartile of these ratios. Weights are put back before every round where a step changes "
        "them for good. Times are medians, and those of this machine.",
    ]
    for case, rows in groupby(results["rows"], key=lambda row: row["case"]):
        lines += ["", f"## {case}", "", _line(HEADER), _line(["---"] * len(HEADER))]
        notes = {}
        for row in rows:
            lines.append(_line(_cells(row)))
            if row.get("note"):
                notes[row["note"]] = None
        if notes:
            lines += ["", *notes]
    if results["not_run"]:
        lines += ["", "## Not run", ""]
        counts = Counter(
            (one["outcome"], one["reason"], one["name"].partition("[")[0])
            for one in results["not_run"]
        )
        lines += [
            f"- `{name}`{f', {count} times' if count > 1 else ''}: {outcome}: {reason}"
            for (outcome, reason, name), count in counts.items()
        ]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    median, target = row["median"], row["target"]
    met = "" if target is None or median is None else "yes" if median <= target else "no"
    spread = f"{row['q1']:.3g} to {row['q3']:.3g}" if row["rounds"] > 1 else ""
    return [
        row["name"],
        row["what"],
        row["floor"],
        "-" if median is None else f"**{median:.3g}**",
        spread,
        "" if target is None else f"{target:g}",
        met,
        str(row["rounds"]) if row["rounds"] > 1 else "",
        _time(row["seconds"]),
        _time(row["floor_seconds"]),
    ]


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _rounded(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(arguments: list[str]) -> None:
    """Write the files."""
    *raw_file, folder = map(Path, arguments)
    folder.mkdir(exist_ok=True)
    kept = folder / "bench.json"
    if raw_file:
        raw = json.loads(raw_file[0].read_text(encoding="utf-8"))
        text = json.dumps(reduced(raw), indent=1, ensure_ascii=False) + "\n"
        kept.write_text(text, encoding="utf-8")
    table = markdown(json.loads(kept.read_text(encoding="utf-8")))
    (folder / "bench.md").write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
