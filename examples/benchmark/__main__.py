"""Run a suite, measure what it left, or make its tables and plots from the records.

python -m examples.benchmark --suite cpu --data-dir data
python -m examples.benchmark latencies --suite cpu
python -m examples.benchmark report --suite cpu
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from examples.benchmark.latencies import measure_all, read_latencies
from examples.benchmark.methods import METHODS
from examples.benchmark.plots import draw
from examples.benchmark.registry import DATA, NETWORKS
from examples.benchmark.report import read_records, report
from examples.benchmark.scheduler import Folders, run_suite
from examples.benchmark.sensitivity import grid_report, heat_maps
from examples.benchmark.suite import known_suites, read_suite

RESULTS = Path(__file__).parent.parent / "results"


def main() -> int:
    """The exit status: 0 when everything is finished."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("run", "latencies", "report"), default="run")
    parser.add_argument("--suite", required=True, help=f"one of {known_suites()}, or a YAML file")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="of the data sets")
    parser.add_argument("--results", type=Path, default=RESULTS, help="of records and tables")
    parser.add_argument("--work", type=Path, default=Path(".benchmarks"), help="of checkpoints")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no run after this time")
    options = parser.parse_args()
    known = {"network": NETWORKS, "data": DATA, "methods": METHODS}
    try:
        suite = read_suite(options.suite, known)
        if options.what == "run":
            for name in sorted({task.data for task in suite.tasks}):
                DATA[name](options.data_dir, 1, "cpu").prepare_data()
    except (ValueError, RuntimeError) as error:  # of data that cannot be downloaded, too
        print(error, file=sys.stderr)
        return 2
    folder = options.results / suite.name
    work = options.work / suite.name
    work.mkdir(parents=True, exist_ok=True)
    folders = Folders(options.data_dir, folder / "records", work)
    if options.what == "run":
        until = time.time() + 60 * options.minutes
        try:
            done = run_suite(suite, folders, options.device, options.workers, until)
        except OSError as error:
            print(error, file=sys.stderr)
            return 1
        return 0 if done else 1
    if options.what == "latencies":
        measure_all(folders.records, work, options.device)
        return 0
    records = read_records(folders.records)
    command = f"python -m examples.benchmark --suite {suite.name}"
    tuned = suite.values is None
    if tuned:
        text = report(suite, records, read_latencies(folder), command)
    else:
        text = grid_report(suite, records, command)
    (folder / "README.md").write_text(text, encoding="utf-8")
    for path in [folder / "README.md", *(draw if tuned else heat_maps)(suite, records, folder)]:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
