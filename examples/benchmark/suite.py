"""What is run: tasks, methods and seeds, read from a suite's YAML file."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from argparse import ArgumentError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

SUITES = Path(__file__).parent / "suites"
WITHOUT_BUDGET = ("dense",)
YOUNGER = ("freeze", "operations", "pretrained")


@dataclass(frozen=True)
class Task:
    """A network, its data, a budget, and how everything that is compared trains.

    Attributes:
        name: what it is called.
        network: a name in `examples.benchmark.registry`.
        arguments: what the network is made with.
        data: a name in `examples.benchmark.registry`.
        epochs: in total, what is fine-tuned included.
        k: share of the groups that stay; or for patterns of layers, how many of theirs. Or else:
        operations: share of the operations that the slim network keeps; every method has the k
            that leaves it.
        pretrained: settings of the training of the dense network, ``epochs`` among them, from which
            the others start. "small from scratch" trains like this, for all of the epochs and in
            the precision of the task.
        structure: the grouping that ties what is removed together, by name or by patterns.
        exclude: patterns of layers that no method groups.
        optimizer: "sgd" (momentum 0.9), "adam" or "adamw".
        lr: at the start; it falls along a cosine.
        weight_decay: the optimizer's own.
        batch_size: images of a training batch.
        precision: Lightning's name of it.
        share_of_epoch: how much of the training images an epoch is; 1.0: all.
        freeze: share of the epochs after which masks are fixed.
        skip: methods that cannot do this task, with the reason.
    """

    name: str
    network: str
    data: str
    epochs: int
    k: int | float | dict[str, int | float] | None = None
    operations: float | None = None
    pretrained: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    structure: str | dict[str, str] = "structure"
    exclude: str | list[str] | None = None
    optimizer: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 5e-4
    batch_size: int = 128
    precision: str = "32-true"
    share_of_epoch: float = 1.0
    freeze: float = 0.5
    skip: dict[str, str] = field(default_factory=dict)

    def settings(self, method: str) -> dict[str, Any]:
        """All that matters to a run, and no name; what concerns the budget is nothing to "dense".

        Settings that are younger than the first records stand here where they are used.
        """
        found = {**asdict(self), "name": ""}
        del found["skip"]
        for entry in fields(self):
            if entry.name in YOUNGER and found[entry.name] == entry.default:
                del found[entry.name]
        if method in WITHOUT_BUDGET:
            found |= {"k": 0, "structure": "", "exclude": ""}
            found.pop("operations", None)
        return found

    def of(self, method: str) -> Task:
        """As a method trains on it: the dense network and the small one are not pretrained."""
        if self.pretrained is None or method not in (*WITHOUT_BUDGET, "small from scratch"):
            return self
        own = dict(self.pretrained)
        if method not in WITHOUT_BUDGET:
            own |= {"epochs": own["epochs"] + self.epochs, "precision": self.precision}
        return replace(self, **own, pretrained=None)

    def shorter(self, share: float) -> Task:
        """The same with about that share of the epochs, the mask fixed between two of them."""
        whole = Fraction(self.freeze).limit_denominator(100).denominator
        epochs = whole * max(1, math.ceil(self.epochs * share / whole))
        return replace(self, epochs=epochs)

    def budget(self) -> str:
        """In words."""
        if self.operations is not None:
            return f"{self.operations:.0%} of the operations"
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
    def pretraining(self) -> Run | None:
        """The run that it starts from."""
        if self.task.pretrained is None:
            return None
        return Run(self.task.of("dense"), "dense", 1.0, self.seed, trial=False)

    @property
    def name(self) -> str:
        """What its record is called; other settings have other names."""
        content = {**asdict(self), "task": self.task.settings(self.method)}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
        kind = "trial" if self.trial else "run"
        every = f"{self.task.network}-{self.task.data}"  # the same for every budget
        task = every if self.method in WITHOUT_BUDGET else self.task.name
        parts = [task, self.method, f"{self.value:g}", f"seed{self.seed}"]
        return "-".join([*parts, kind, digest]).replace(" ", "_")


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
        fixed: for some of the methods the value that they have without trials.
        seeds_of: for some of the methods their own seeds.
        anchors: from papers, for their names test accuracy, share of the operations, training.
    """

    name: str
    tasks: tuple[Task, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    trial_seed: int = 100
    trial_share: float = 0.5
    values: dict[str, list[float]] | None = None
    fixed: dict[str, float] = field(default_factory=dict)
    seeds_of: dict[str, list[int]] = field(default_factory=dict)
    anchors: dict[str, list[str]] = field(default_factory=dict)

    def seeds_for(self, method: str) -> list[int]:
        """Of the runs of a method that count."""
        own = self.seeds_of.get(method, self.seeds)
        return [seed for seed in own if seed in self.seeds]

    def counted(self, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Records without those of another value than the one that the suite fixes.

        >>> suite = Suite("short", (), ("dense",), fixed={"dense": 1.0})
        >>> suite.counted([{"method": "dense", "value": 0.5}, {"method": "dense", "value": 1.0}])
        [{'method': 'dense', 'value': 1.0}]
        """
        return [x for x in records if self.fixed.get(x["method"], x["value"]) == x["value"]]

    def only(
        self, tasks: Sequence[str] = (), methods: Sequence[str] = (), seeds: Sequence[int] = ()
    ) -> Suite:
        """A part of it.

        Args:
            tasks: names or patterns of names; none: all.
            methods: names or patterns of names; none: all.
            seeds: of the runs that count; none: all.

        Raises:
            ValueError: nothing in the suite is called that; the message lists what there is.
        """
        names = _matching("--task", tasks, [task.name for task in self.tasks])
        for seed in seeds:
            if seed not in self.seeds:
                raise ValueError(f"--seed must be one of {list(self.seeds)}, got {seed}")
        return replace(
            self,
            tasks=tuple(task for task in self.tasks if task.name in names),
            methods=tuple(_matching("--method", methods, self.methods)),
            seeds=tuple(seeds) or self.seeds,
        )


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
    if not (
        isinstance(content, dict)
        and isinstance(content.get("tasks"), dict)
        and isinstance(content.get("methods"), list)
    ):
        raise ValueError(f"{path} must have 'tasks' and 'methods'")
    defaults, tasks = content.pop("defaults", {}), content.pop("tasks")
    for method in content["methods"]:
        check_known("method", method, known["methods"])
    for method in content["methods"] if content.get("values") else ():
        check_known("a method with values", method, content["values"])
    for method in (*content.get("fixed", ()), *content.get("seeds_of", ())):
        check_known("method", method, known["methods"])
    suite = Suite(path.stem, (), **_parsed(Suite, content, str(path), {"name", "tasks"}))
    for name, own in tasks.items():
        settings = {**defaults, **(own or {})}
        parsed = _parsed(Task, settings, f"{path}: task {name!r}", {"name"})
        for key in ("network", "data"):
            check_known(key, settings[key], known[key])
        if (parsed["k"] is None) == (parsed["operations"] is None):
            raise ValueError(f"{path}: task {name!r} must have one of 'k' and 'operations'")
        if parsed["pretrained"] is not None:
            where, own = f"{path}: task {name!r}: pretrained", settings["pretrained"]
            _parsed(Task, {**settings, **own}, where, {"name"})
            if "epochs" not in own:
                raise ValueError(f"{where} must have 'epochs', got {own}")
        suite = replace(suite, tasks=(*suite.tasks, Task(name, **parsed)))
    return suite


def _parsed(kind: type, settings: dict[str, Any], where: str, given: set[str]) -> dict[str, Any]:
    """What ``kind`` is made with besides ``given``, of the types that it declares."""
    names = {entry.name for entry in fields(kind)} - given
    for key in settings:
        check_known(f"{where}: a setting", key, names)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, skip=given)
    try:
        return parser.parse_object(settings).as_dict()
    except ArgumentError as error:
        raise ValueError(f"{where}: {error}") from error


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise `ValueError` unless ``name`` is one of the known ones; the message lists them."""
    if name not in (names := sorted(known)):
        near = difflib.get_close_matches(str(name), names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{what} must be one of {names}, got {name!r}{hint}")


def _matching(option: str, patterns: Sequence[str], names: Sequence[str]) -> list[str]:
    """The names that one of the patterns is, or fits; all where there is none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            check_known(option, pattern, names)
    return [name for name in names if not patterns or any(fnmatchcase(name, x) for x in patterns)]
