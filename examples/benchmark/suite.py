"""What is run: tasks, methods and seeds, read from a suite's YAML file."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

SUITES = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Task:
    """A network, its data, a budget, and how everything that is compared trains.

    Attributes:
        name: what it is called.
        network: a name in `examples.benchmark.networks`.
        arguments: what the network is made with.
        data: a name in `examples.benchmark.networks`.
        k: share of the groups that stay; or for patterns of layers, how many of theirs.
        epochs: in total, what is fine-tuned included.
        structure: the grouping that ties what is removed together, by name or by patterns.
        exclude: patterns of layers that no method groups.
        optimizer: "sgd" (momentum 0.9), "adam" or "adamw".
        lr: at the start; it falls along a cosine.
        weight_decay: the optimizer's own.
        batch_size: images of a training batch.
        precision: Lightning's name of it.
        share_of_epoch: how much of the training images an epoch is; 1.0: all.
        skip: methods that cannot do this task, with the reason.
    """

    name: str
    network: str
    data: str
    k: float | dict[str, float]
    epochs: int
    arguments: dict[str, Any] = field(default_factory=dict)
    structure: str | dict[str, str] = "structure"
    exclude: str | list[str] | None = None
    optimizer: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 5e-4
    batch_size: int = 128
    precision: str = "32-true"
    share_of_epoch: float = 1.0
    skip: dict[str, str] = field(default_factory=dict)

    def budget(self) -> str:
        """In words."""
        if isinstance(self.k, dict):
            return ", ".join(f"{k:g} groups of {name}" for name, k in self.k.items())
        return f"{self.k:.0%} of the groups"

    def methods(self, suite: Suite) -> list[str]:
        """Those of the suite that compete here."""
        return [method for method in suite.methods if method not in self.skip]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        task: on what.
        method: a name in `examples.benchmark.methods`.
        value: of the number that is tuned for this method.
        seed: of weights and order of images.
        trial: is it one that tunes, which sees no test image?
    """

    task: Task
    method: str
    value: float
    seed: int
    trial: bool

    @property
    def name(self) -> str:
        """What its record is called; other settings have other names."""
        content = {**asdict(self), "task": {**asdict(self.task), "name": ""}}
        del content["task"]["skip"]
        if self.method in WITHOUT_BUDGET:  # the same for every budget
            content["task"] |= {"k": 0, "structure": "", "exclude": ""}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        kind = "trial" if self.trial else "run"
        task = f"{self.task.network}-{self.task.data}" if content["task"]["k"] == 0 else ""
        parts = [task or self.task.name, self.method, f"{self.value:g}", f"seed{self.seed}"]
        return "-".join([*parts, kind, digest]).replace(" ", "_")


WITHOUT_BUDGET = ("dense",)


@dataclass(frozen=True)
class Suite:
    """Tasks times methods times seeds.

    Attributes:
        name: of its file.
        tasks: what is learnt.
        methods: who competes.
        seeds: of the runs that count.
        trial_seed: of the runs that tune.
        trial_share: their epochs, as a share of a run's.
        values: for every method the values that are run, all of them and on every seed, where it is
            about how much they matter; nothing is tuned then.
    """

    name: str
    tasks: tuple[Task, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    trial_seed: int = 100
    trial_share: float = 0.5
    values: dict[str, list[float]] | None = None


def known_suites() -> list[str]:
    """Names of the suites that come along."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def read_suite(name: str, known: Mapping[str, Iterable[str]]) -> Suite:
    """The suite of that name, or in the file of that path.

    Args:
        name: of a suite that comes along, or a path of a YAML file.
        known: the names that a task may use, by "network", "data" and "methods".

    Raises:
        ValueError: there is none, or something in it is not known; the message lists what is.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else SUITES / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"suite must be one of {known_suites()} or a YAML file, got {name!r}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict) or not {"tasks", "methods"} <= content.keys():
        raise ValueError(f"{path} must have 'tasks' and 'methods'")
    defaults = content.pop("defaults", {})
    tasks = []
    for task, own in content.pop("tasks").items():
        settings = {**defaults, **own}
        _check_keys(f"{path}: task {task!r}", settings, Task)
        for key in ("network", "data"):
            _check_known(key, settings[key], known[key])
        tasks.append(Task(name=task, **settings))
    for method in content["methods"]:
        _check_known("method", method, known["methods"])
    _check_keys(str(path), content, Suite)
    lists = {key: tuple(value) for key, value in content.items() if isinstance(value, list)}
    return Suite(name=path.stem, tasks=tuple(tasks), **{**content, **lists})


def _check_keys(where: str, settings: dict[str, Any], kind: type) -> None:
    fields = {entry.name: entry for entry in dataclasses.fields(kind)} | {"tasks": None}
    for key in settings:
        if key not in fields:
            raise ValueError(f"{where}: {key!r} is not known, but {sorted(fields)} are")
    needed = [
        name
        for name, entry in fields.items()
        if entry is not None
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in {*settings, "name", "tasks"}]
    if missing:
        raise ValueError(f"{where} lacks {missing}")


def _check_known(what: str, name: str, known: Iterable[str]) -> None:
    if name not in (names := sorted(known)):
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} must be one of {names}, got {name!r}{hint}")
