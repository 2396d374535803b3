"""Does a number for lam arrive? Networks, optimizers, lams and groupings, each trained once.

    python -m examples.convergence --data-dir data
    python -m examples.convergence report

Three networks, each with a callback as anybody would write it, ``WGSEFCallback(k=..., lam=...,
grouping=...)``: what happens on the way, at the freeze, and what is left in the end. A run is a
line of ``examples/results/convergence/runs.jsonl``; runs that are there already are not done
again. On one core a run takes ten seconds to a minute.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib import pyplot
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from examples.benchmark.callbacks import CosineRate
from examples.benchmark.plots import save
from examples.data.modules import CIFAR10, FashionMNIST, InMemory
from examples.models.lenet import LeNet5
from examples.models.resnet import CifarResNet
from examples.training import Classifier
from lightning_wgsef import Constant, WGSEFCallback
from lightning_wgsef.training.masks import apply_masks

RESULTS = Path(__file__).parent / "results" / "convergence"
LAMS = ("None", "1e-4", "1e-3", "1e-2", "1e-1", "1")
VALIDATION = 1_000
WAY = 40
"""Points of the curve of group sparsity."""


def five_layers(*widths: int) -> nn.Sequential:
    """Convolutions with BatchNorm and ReLU, the first two with pooling, for grey images."""
    layers: list[nn.Module] = []
    inputs = 1
    for place, outputs in enumerate(widths):
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
        if place < 2:
            layers.append(nn.MaxPool2d(2))
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)).to(
        memory_format=torch.channels_last
    )  # faster on a CPU


@dataclass(frozen=True)
class Task:
    """A network, its data, and how long it trains."""

    make: Callable[[], nn.Module]
    data: type[InMemory]
    k: float
    images: int
    batch_size: int
    epochs: int
    sgd: float
    adamw: float = 2e-3


TASKS = {
    "five layers, BatchNorm": Task(
        lambda: five_layers(12, 24, 24, 32, 32), FashionMNIST, 0.25, 10_000, 128, 6, 0.05,
    ),
    "LeNet-5": Task(LeNet5, FashionMNIST, 0.1, 10_000, 128, 6, 0.05),
    "ResNet20": Task(lambda: CifarResNet(20, width=8), CIFAR10, 0.25, 2_500, 64, 6, 0.1),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training; ``lam`` is a number, "None", "Constant(number)" or "dense"."""

    task: str
    optimizer: str
    grouping: str
    lam: str
    seed: int


class Watch(pl.Callback):
    """What a run shows on the way; stands before the callback that prunes.

    Args:
        pruning: the callback that prunes.
        images: of validation.
        labels: theirs.
    """

    def __init__(self, pruning: WGSEFCallback, images: Tensor, labels: Tensor) -> None:
        self.pruning, self.images, self.labels = pruning, images, labels
        self.seen: dict[str, Any] = {"sparsity": [], "layers": [], "way": []}
        self._before: Tensor | None = None
        self._way: tuple[float, float, float] | None = None

    def right(self, module: Any, batch_statistics: bool = False) -> float:
        """Validation accuracy in percent, with the norms' running statistics or the batch's."""
        return accuracy_of(module.network, self.images, self.labels, batch_statistics)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look between the optimizer's step and what follows it."""
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(lambda *_: self._before_the_mask(pl_module))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Note what lives before the mask is fixed."""
        if self._is_due():
            self._before = self._alive()

    def _is_due(self) -> bool:
        regularizer = self.pruning.regularizer
        if regularizer is None or regularizer.frozen or not regularizer.pruners:
            return False
        (pruner,) = regularizer.pruners
        return pruner.freeze_rule.due(pruner.taken)

    def _alive(self) -> Tensor:
        assert self.pruning.regularizer is not None
        return self.pruning.regularizer.groups.norms() > 0

    def _before_the_mask(self, module: Any) -> None:
        if self._before is None or not self._is_due():
            return
        regularizer = self.pruning.regularizer
        assert regularizer is not None
        kept = copy.deepcopy(module.network.state_dict())
        apply_masks(regularizer.groups, regularizer.groups.split(self._before))
        self.seen["without_mask"] = [self.right(module), self.right(module, True)]
        module.network.load_state_dict(kept)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Note the sparsity, and what the freeze did."""
        regularizer = self.pruning.regularizer
        assert regularizer is not None
        done, total = trainer.global_step, int(trainer.estimated_stepping_batches)
        if done % max(1, total // WAY) == 0:
            alive = self._alive()
            zero = [1 - float(x.float().mean()) for x in regularizer.groups.split(alive).values()]
            whole = 1 - float(alive.float().mean())
            self.seen["sparsity"].append([round(done / total, 4), round(whole, 4)])
            self.seen["layers"].append([round(x, 4) for x in zero])
        if self._before is not None and regularizer.frozen and "with_mask" not in self.seen:
            self.seen["with_mask"] = [self.right(pl_module), self.right(pl_module, True)]
            alive = self._alive()
            last, dead = int((self._before & ~alive).sum()), int((~alive).sum())
            self.seen["deaths"] = [last, dead]
            self.seen["frozen_at"] = round(done / total, 4)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Look at the statistics as they were trained."""
        regularizer = self.pruning.regularizer
        if regularizer is not None and not regularizer.frozen and trainer.global_step:
            done = round(trainer.global_step / int(trainer.estimated_stepping_batches), 4)
            self._way = done, self.right(pl_module), self.right(pl_module, True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Compare with what was validated."""
        if self._way is not None:
            estimated = self.right(pl_module)
            self.seen["way"].append([*self._way, estimated])
            self._way = None


@torch.no_grad()
def accuracy_of(
    network: nn.Module, images: Tensor, labels: Tensor, batch_statistics: bool = False
) -> float:
    """Accuracy in percent; the network is left as it was."""
    training = network.training
    network.eval()
    norms = [x for x in network.modules() if isinstance(x, _BatchNorm)] if batch_statistics else []
    momenta = [norm.momentum for norm in norms]
    counts = [
        norm.num_batches_tracked.clone() for norm in norms if norm.num_batches_tracked is not None
    ]
    for norm in norms:
        norm.train()
        norm.momentum = 0.0
    right = sum(
        int((network(x).argmax(1) == y).sum())
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    )
    for norm, momentum, count in zip(norms, momenta, counts, strict=True):
        norm.momentum = momentum
        norm.num_batches_tracked.copy_(count)
    network.train(training)
    return 100 * right / len(labels)


class Trained(Classifier):
    """A classifier with the optimizer of a run."""

    def __init__(self, network: nn.Module, run: Run) -> None:
        task = TASKS[run.task]
        super().__init__(network, getattr(task, run.optimizer))
        self.kind = run.optimizer

    def configure_optimizers(self) -> Optimizer:
        """SGD with momentum, or AdamW."""
        if self.kind == "sgd":
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)
        return torch.optim.AdamW(self.parameters(), self.lr)


def train(run: Run, data_dir: Path) -> dict[str, Any]:
    """Train once; the record of the run."""
    task = TASKS[run.task]
    started = time.process_time()
    pl.seed_everything(run.seed, verbose=False)
    data = loaded(task, data_dir)
    network = task.make()
    model = Trained(network, run)
    assert data.val_set is not None
    assert data.test_set is not None
    callbacks: list[pl.Callback] = [CosineRate(model.lr)]
    seen: dict[str, Any] = {}
    if run.lam != "dense":
        pruning = WGSEFCallback(
            k=task.k, lam=as_lam(run.lam), grouping=run.grouping,
            example_input=torch.zeros(2, *data.image_shape),
        )  # fmt: skip
        watch = Watch(pruning, *data.val_set)
        callbacks += [watch, pruning]
        seen = watch.seen
    trainer = pl.Trainer(
        max_epochs=task.epochs, callbacks=callbacks, val_check_interval=0.5, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_model_summary=False,
        enable_progress_bar=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(model, data)
    masks = {}
    if run.lam != "dense":
        assert pruning.regularizer is not None
        masks = {name: [int(x.sum()), len(x)] for name, x in pruning.regularizer.masks.items()}
    return {
        **asdict(run),
        "test": round(accuracy_of(model.network, *data.test_set), 2),
        "alive": masks,
        **seen,
        "seconds": round(time.process_time() - started),
    }


_LOADED: dict[Any, InMemory] = {}


def loaded(task: Task, data_dir: Path) -> InMemory:
    """The data of a task, cut to the images that it trains on."""
    key = task.data, task.images, task.batch_size
    if key not in _LOADED:
        folder = data_dir if task.data is CIFAR10 else data_dir / "fashion-mnist"
        data = task.data(folder, task.batch_size)
        data.setup()
        assert data.train_set is not None
        assert data.val_set is not None
        data.train_set = tuple(x[: task.images].clone() for x in data.train_set)
        data.val_set = tuple(x[:VALIDATION].clone() for x in data.val_set)
        _LOADED[key] = data
    return _LOADED[key]


def as_lam(text: str) -> Any:
    """What the callback is given."""
    if text.startswith("Constant"):
        return Constant(float(text[len("Constant(") : -1]))
    return None if text == "None" else float(text)


def runs() -> Iterator[Run]:
    """All of them, in the order in which they tell most."""
    bn, lenet, resnet = TASKS
    both = ("sgd", "adamw")

    def some(task: str, grouping: str, lams: tuple[str, ...], seed: int) -> Iterator[Run]:
        for lam in lams:
            for optimizer in both:
                yield Run(task, optimizer, grouping, lam, seed)

    yield from some(lenet, "channel", ("dense", *LAMS), 0)
    yield from some(bn, "channel", ("dense", "None", "1e-4", "1e-2", "1"), 0)
    yield from some(bn, "structure", ("None", "1"), 0)
    yield from some(lenet, "structure", ("None", "1"), 0)
    yield from some(lenet, "filter", ("None", "1"), 0)
    yield from some(resnet, "channel", ("dense", "None", "1e-2"), 0)
    yield from some(bn, "filter", ("None", "1"), 0)
    yield from some(lenet, "channel", ("dense", *LAMS), 1)
    yield from some(bn, "channel", ("1e-3", "1e-1", "3", "10", "Constant(1e-2)"), 0)
    yield from some(bn, "channel", ("dense", "None", "1e-2"), 1)
    yield from some(lenet, "channel", ("dense", *LAMS), 2)
    yield from some(resnet, "channel", ("1e-4", "1"), 0)
    yield from some(bn, "channel", ("1e-4", "1e-3", "1e-1", "1"), 1)
    yield from some(bn, "structure", ("1e-3",), 0)
    yield from some(lenet, "structure", ("1e-3", "1e-2"), 0)
    yield from some(resnet, "structure", ("None", "1e-2"), 0)
    yield from some(bn, "channel", ("dense", *LAMS), 2)
    yield from some(resnet, "channel", ("1e-3", "1e-1"), 0)
    yield from some(resnet, "channel", ("dense", "None", "1e-2", "1"), 1)
    yield from some(bn, "channel", ("3", "10"), 1)


def read(path: Path) -> list[dict[str, Any]]:
    """The records so far."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def report(records: list[dict[str, Any]], folder: Path) -> None:
    """Write the tables, and a picture of one run."""
    pruned = [x for x in records if x["lam"] != "dense"]
    rows = sorted({(x["task"], x["grouping"], x["optimizer"]) for x in pruned}, key=in_order)
    lams = ("dense", *LAMS, "3", "10", "Constant(1e-2)")
    accuracies = [f"| | {' | '.join(lams)} |", f"|---|{'--:|' * len(lams)}"]
    freezes = [
        "| | runs | largest jump | deaths in the last step | running | estimated | budget |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    near = cases = 0
    for row in rows:
        named = f"{row[0]}, `{row[1]}`, {row[2]}"
        found = {lam: [x for x in records if is_of(x, row, lam)] for lam in lams}
        accuracies.append(f"| {named} | {' | '.join(map(spread, found.values()))} |")
        own = [x for lam in LAMS for x in found[lam]]
        freezes.append(f"| {named} | {len(own)} | {' | '.join(at_the_freeze(own))} |")
        for lam in LAMS[1:]:
            if found[lam] and found["None"]:
                cases += 1
                seeds = {x["seed"] for x in found[lam]}
                reference = [x for x in found["None"] if x["seed"] in seeds]
                near += mean_test(found[lam]) >= mean_test(reference) - 1
    tasks = [
        f"- {name}: k={task.k}; {task.images:,} images of {task.data.__name__}, "
        f"{task.epochs} epochs, batches of {task.batch_size}; SGD with momentum from {task.sgd}, "
        f"AdamW from {task.adamw}."
        for name, task in TASKS.items()
    ]
    text = f"""# convergence

`python -m examples.convergence`; this page: `python -m examples.convergence report`.

{chr(10).join(tasks)}

Learning rates fall along half a cosine; the mask freezes at half of training.

![Group sparsity of every layer, of every lam, and validation accuracy on the way](curves.svg)

The five-layer network, SGD, `channel`. On the left lam=1e-2, in the middle all of them; on the
right validation accuracy on the way with BatchNorm's statistics as they were trained, as the
callback estimates them for validation, and of the validation batches themselves.

## Test accuracy

In percent; mean and standard deviation where there are several seeds. {near} of {cases} numbers for
lam from 1e-4 to 1 end at most a point below `lam=None`, in the mean over their seeds.

{chr(10).join(accuracies)}

## At the freeze, and on the way

Runs with None and with 1e-4 to 1. Jump: points of validation accuracy between the weights before
the mask is fixed and those after, the larger of two, with running and with batch statistics.
Running, estimated: by how many points validation accuracy on the way differs at most from what the
validation batches' own statistics give, with the statistics as they were trained, and as the
callback estimates them.

{chr(10).join(freezes)}
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
    draw(records, folder / "curves.svg")


def in_order(row: tuple[str, str, str]) -> tuple[int, str, bool]:
    """Where a row stands: tasks as they were named, SGD first."""
    return list(TASKS).index(row[0]), row[1], row[2] != "sgd"


def is_of(record: dict[str, Any], row: tuple[str, str, str], lam: str) -> bool:
    """Whether a record belongs into a cell; a dense network has no grouping."""
    task, grouping, optimizer = row
    grouped = record["grouping"] == grouping or lam == "dense"
    own = (record["task"], record["optimizer"], record["lam"])
    return grouped and own == (task, optimizer, lam)


def mean_test(runs: list[dict[str, Any]]) -> float:
    """Mean test accuracy in percent."""
    return statistics.mean(x["test"] for x in runs)


def spread(runs: list[dict[str, Any]]) -> str:
    """Mean test accuracy, and the standard deviation of several."""
    if len(runs) < 2:
        return "".join(f"{x['test']:.1f}" for x in runs)
    return f"{mean_test(runs):.1f} ± {statistics.stdev(x['test'] for x in runs):.1f}"


def at_the_freeze(runs: list[dict[str, Any]]) -> Iterator[str]:
    """The largest jump, deaths in the last step, how far validation is off, and the budget."""
    jumps = [abs(x["with_mask"][kind] - x["without_mask"][kind]) for x in runs for kind in (0, 1)]
    yield f"{max(jumps):.1f}"
    worst = max(runs, key=lambda x: x["deaths"][0])
    yield f"{worst['deaths'][0]} of {worst['deaths'][1]}"
    for place in (1, 3):
        yield f"{max(abs(way[place] - way[2]) for x in runs for way in x['way']):.1f}"
    yield "kept" if len({json.dumps(x["alive"]) for x in runs}) == 1 else "differs"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draw one run, and all lams beside it."""
    row = (next(iter(TASKS)), "channel", "sgd")
    found = {lam: [x for x in records if is_of(x, row, lam)] for lam in LAMS}
    run = found["1e-2"][0]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    shares = [100 * share for share, _ in run["sparsity"]]
    for name, values in zip(run["alive"], zip(*run["layers"], strict=True), strict=True):
        left.plot(shares, [100 * x for x in values], label=name.removeprefix("network."))
    left.set_ylabel("zero groups of a layer, %")
    left.legend(fontsize=7, title="layer")
    for lam, own in found.items():
        points = [(100 * x, 100 * y) for run in own[:1] for x, y in run["sparsity"]]
        middle.plot([x for x, _ in points], [y for _, y in points], label=lam)
    middle.set_ylabel("zero groups, %")
    middle.legend(fontsize=7, title="lam")
    way = list(zip(*run["way"], strict=True))
    names = ("running statistics", "of the batch", "estimated, as validated")
    for name, values, style in zip(names, way[1:], (":", "--", "-"), strict=True):
        right.plot([100 * x for x in way[0]], values, style, marker=".", label=name)
    right.set_ylabel("validation accuracy, %")
    right.legend(fontsize=7)
    for axes in (left, middle, right):
        axes.axvline(100 * run["frozen_at"], color="grey", linestyle=":")
        axes.set_xlabel("training, %")
        axes.grid(alpha=0.3)
    save(figure, path)


def main() -> None:
    """Do the runs that are left, or write the tables and the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="of the data sets")
    parser.add_argument("--records", type=Path, default=RESULTS / "runs.jsonl")
    options = parser.parse_args()
    if options.what == "report":
        report(read(options.records), options.records.parent)
        return
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # shrinking weights become denormal, which is slow
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options.records.parent.mkdir(parents=True, exist_ok=True)
    names = Run.__dataclass_fields__
    done = [{name: x[name] for name in names} for x in read(options.records)]
    for run in runs():
        if asdict(run) in done:
            continue
        record = train(run, options.data_dir)
        with options.records.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(run, record["test"], flush=True)


if __name__ == "__main__":
    main()
