"""Run a suite, measure what it left, or make tables and plots from the records.

python -m examples.benchmark --suite cpu --data-dir data
python -m examples.benchmark --suite paper --task vgg16-cifar10-25 --method "homotopy*" --seed 0
python -m examples.benchmark latencies --suite cpu
python -m examples.benchmark report --suite cpu
python -m examples.benchmark documents
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from examples.benchmark.curves import curve_lines, curves_of
from examples.benchmark.documents import filled
from examples.benchmark.latencies import measure_all, read_latencies
from examples.benchmark.methods import METHODS
from examples.benchmark.plots import draw, heat_maps
from examples.benchmark.records import Records
from examples.benchmark.registry import DATA, NETWORKS
from examples.benchmark.report import grid_report, report
from examples.benchmark.scheduler import Folders, run_suite, waiting
from examples.benchmark.suite import Run, Suite, known_suites, read_suite

RESULTS = Path(__file__).parent.parent / "results"
# With tables that `documents` fills.
DOCUMENTS = (
    RESULTS.parent.parent / "README.md",
    RESULTS / "README.md",
    RESULTS.parent / "guides" / "quantise.md",
)
KNOWN = {"network": NETWORKS, "data": DATA, "methods": METHODS}


def main() -> int:
    """The exit status: 0 when everything is finished, 75 when the time was over before that."""
    options = _options()
    try:
        if options.what == "documents":
            for path in DOCUMENTS:
                text = filled(path.read_text(encoding="utf-8"), options.results, read)
                path.write_text(text, encoding="utf-8")
            return 0
        if options.suite is None:
            raise ValueError(f"--suite must be one of {known_suites()}, or a YAML file")
        suite = read(options.suite)
        part = suite.only(options.task, options.method, options.seed)
        if options.what == "run":
            for name in sorted({task.data for task in part.tasks}):
                DATA[name](options.data_dir, 1, "cpu").prepare_data()
        elif part != suite:
            raise ValueError("--task, --method and --seed choose what is run, nothing else")
    except (ValueError, RuntimeError) as error:  # of data that cannot be downloaded, too
        print(error, file=sys.stderr)
        return 2
    folder = options.results / suite.name
    records = Records(folder / "records.jsonl")
    work = options.work / suite.name
    work.mkdir(parents=True, exist_ok=True)
    if options.what == "latencies":
        measure_all(records, work, options.device)
    elif options.what == "report":
        for path in write_report(suite, records, folder):
            print(path)
    else:
        until = time.time() + 60 * options.minutes
        folders = Folders(options.data_dir, records, work, folder / "weights")
        _warn_of_emulated_bfloat16(waiting(part, folders), options.device)
        try:
            status = run_suite(part, folders, options.device, options.workers, until)
        except OSError as error:
            print(error, file=sys.stderr)
            return 1
        print(f"tables and plots: python -m examples.benchmark report --suite {options.suite}")
        return status
    return 0


def read(name: str) -> Suite:
    """The suite of that name, see `read_suite`."""
    return read_suite(name, KNOWN)


def write_report(suite: Suite, records: Records, folder: Path) -> list[Path]:
    """Write the tables and plots of a suite from its records; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = suite.counted(records.all())
    command = f"python -m examples.benchmark --suite {suite.name}"
    tuned = suite.values is None
    if tuned:
        text = report(suite, runs, read_latencies(folder), command)
        for curve in curves_of(suite):
            text += "\n".join(curve_lines(suite, runs, curve)) + "\n"
    else:
        text = grid_report(suite, runs, command)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return [folder / "README.md", *(draw if tuned else heat_maps)(suite, runs, folder)]


def _warn_of_emulated_bfloat16(runs: Iterable[Run], device: str) -> None:
    """Say which tasks take days instead of hours: without AVX-512 convolutions are plain loops."""
    slow = sorted({run.task.name for run in runs if run.task.precision.startswith("bf16")})
    if device == "cpu" and slow and torch.backends.cpu.get_cpu_capability() == "AVX2":
        print(
            f"this processor has AVX2 and no bfloat16: {', '.join(slow)} will take ten times as "
            "long as in precision 32-true; take one with AVX-512, or --device cuda",
            file=sys.stderr,
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = ("run", "latencies", "report", "documents")
    parser.add_argument("what", nargs="?", choices=what, default="run")
    parser.add_argument("--suite", help=f"one of {known_suites()}, or a YAML file")
    only = {"action": "append", "default": []}
    parser.add_argument("--task", help="run only this one, or those that fit a pattern", **only)
    parser.add_argument("--method", help="run only this one, or those that fit a pattern", **only)
    parser.add_argument("--seed", type=int, help="run only this one", **only)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="of the data sets")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of records and tables")
    parser.add_argument("--work", type=Path, default=Path(".benchmarks"), help="of checkpoints")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    late = "begin no run and no epoch after this time; the next call goes on"
    parser.add_argument("--minutes", type=float, default=1e9, help=late)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
