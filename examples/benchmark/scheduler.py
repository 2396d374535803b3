"""Runs of a suite in processes of their own, several at a time."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

from examples.benchmark.callbacks import NO_TIME
from examples.benchmark.methods import METHODS
from examples.benchmark.records import Record, Records
from examples.benchmark.suite import WITHOUT_BUDGET, Run, Suite, Task

NO_SPACE = 28
"""Exit status of a run that found the disk full."""


@dataclass(frozen=True)
class Folders:
    """Where everything is.

    Attributes:
        data: the data sets.
        records: of finished runs.
        work: checkpoints of runs that are under way, and why others failed.
        weights: of dense networks that others start from.
    """

    data: Path
    records: Records
    work: Path
    weights: Path

    def weights_of(self, run: Run) -> Path:
        """Where a dense network is kept, if the run is finished."""
        return self.weights / f"{run.name}.safetensors"

    def record(self, run: Run) -> Record | None:
        """Of a run, if it is finished."""
        return self.records.get(run.name)


def trials(suite: Suite, task: Task, method: str) -> list[Run]:
    """The runs that tune a method: one for each of its values."""
    fixed = method in suite.fixed or (task.pretrained is not None and method in WITHOUT_BUDGET)
    if suite.values is not None or fixed:
        return []
    shorter = task.of(method).shorter(suite.trial_share)
    values = METHODS[method].tried(task)
    return [Run(shorter, method, value, suite.trial_seed, trial=True) for value in values]


def best_value(suite: Suite, task: Task, method: str, folders: Folders) -> float | None:
    """The value of the trial with the best validation accuracy; None while one is missing."""
    runs = trials(suite, task, method)
    if not runs:
        return suite.fixed.get(method, 1.0)
    found = {run.value: record for run in runs if (record := folders.record(run)) is not None}
    if len(found) < len(runs):
        return None
    return max(found, key=lambda value: found[value]["validation_accuracy"])


def finals(suite: Suite, task: Task, method: str, folders: Folders) -> list[Run]:
    """The runs that count; empty while the method is not tuned."""
    if suite.values is not None:
        pairs = [(value, seed) for value in suite.values[method] for seed in suite.seeds]
        return [Run(task.of(method), method, value, seed, trial=False) for value, seed in pairs]
    value = best_value(suite, task, method, folders)
    if value is None:
        return []
    seeds = suite.seeds_for(method)
    return [Run(task.of(method), method, value, seed, trial=False) for seed in seeds]


def waiting(suite: Suite, folders: Folders) -> Iterator[Run]:
    """Runs without a record whose turn it is; the dense networks that others start from first."""
    for task in suite.tasks:
        for method in task.methods(suite):
            runs = trials(suite, task, method) + finals(suite, task, method, folders)
            for run in runs:
                if folders.record(run) is None:
                    before = run.pretraining
                    there = before is None or folders.weights_of(before).exists()
                    yield run if there else before


def run_suite(suite: Suite, folders: Folders, device: str, workers: int, until: float) -> int:
    """Run what has no record yet; 0 if all is finished, 1 if a run failed, `NO_TIME` if it goes on.

    Args:
        suite: what to run.
        folders: where everything is.
        device: "cpu" or "cuda".
        workers: how many runs at a time.
        until: no run and no epoch is begun after this moment, in seconds since the epoch.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["examples.benchmark.run"])
    active: dict[str, tuple[Run, BaseProcess]] = {}
    failed: set[str] = set()
    with tqdm(total=_epochs(suite), unit="epoch", desc=suite.name, mininterval=5) as bar:
        bar.update(_finished_epochs(suite, folders))
        bar.unpause()
        while True:
            free = len(active) < workers and time.time() <= until
            for run in waiting(suite, folders) if free else ():
                if len(active) == workers:
                    break
                if run.name not in active and run.name not in failed:
                    process = context.Process(
                        target=_work, args=(run, folders, device, until), name=run.name
                    )
                    process.start()
                    active[run.name] = (run, process)
            if not active:
                break
            time.sleep(0.2)
            for name, (run, process) in list(active.items()):
                if process.is_alive():
                    continue
                del active[name]
                if process.exitcode == NO_SPACE:
                    raise OSError(errno.ENOSPC, "no space left; finished runs are intact")
                if process.exitcode == NO_TIME:
                    continue
                if folders.record(run) is None:
                    failed.add(name)
                    tqdm.write(f"{name} failed: {_reason(process.exitcode, folders.work, name)}")
                else:
                    bar.update(run.task.epochs)
                    tqdm.write(_line(run, folders.record(run)))
    if next(waiting(suite, folders), None) is None:
        return 0
    return NO_TIME if time.time() > until else 1


def _work(run: Run, folders: Folders, device: str, until: float) -> None:
    """One run in a process of its own."""
    import torch

    from examples.benchmark.run import execute

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    reason = folders.work / f"{run.name}.failed"
    reason.unlink(missing_ok=True)
    try:
        before = run.pretraining
        weights = folders.weights_of(run if before is None else before)
        record = execute(run, folders.data, folders.work / run.name, device, weights, until)
        if folders.record(run) is None:  # or only the weights were missing
            folders.records.append(record)
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code == NO_TIME:
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            sys.exit(NO_SPACE)
        reason.write_text(traceback.format_exc(), encoding="utf-8")
        sys.exit(1)


def _reason(status: int | None, work: Path, name: str) -> str:
    """The last line of what the run said, and where all of it is.

    >>> _reason(-11, Path("work"), "a run that said nothing")
    'its process was ended by a signal (Segmentation fault); run the suite again to go on with it'
    """
    path = work / f"{name}.failed"
    if not path.exists():
        how = f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was ended by a signal ({signal.strsignal(-status)})"
        return f"its process {how}; run the suite again to go on with it"
    return f"{path.read_text(encoding='utf-8').rstrip().splitlines()[-1]} (all of it: {path})"


def _epochs(suite: Suite) -> int:
    total = 0
    for task in suite.tasks:
        for method in task.methods(suite):
            total += sum(run.task.epochs for run in trials(suite, task, method))
            times = 1 if suite.values is None else len(suite.values[method])
            total += task.of(method).epochs * len(suite.seeds_for(method)) * times
    return total


def _finished_epochs(suite: Suite, folders: Folders) -> int:
    total = 0
    for task in suite.tasks:
        for method in task.methods(suite):
            runs = trials(suite, task, method) + finals(suite, task, method, folders)
            total += sum(run.task.epochs for run in runs if folders.record(run) is not None)
    return total


def _line(run: Run, record: Record | None) -> str:
    assert record is not None
    kind = "validation" if run.trial else "test"
    return f"{run.name}: {kind} {record[f'{kind}_accuracy']:.2f} in {record['seconds']} s"
