"""Compare ways to the same budget under one protocol, over several seeds.

    python -m examples.comparison lenet --data-dir ../shared/data/fashion-mnist
    python -m examples.comparison batchnorm --data-dir /tmp/cifar

Every method trains for the same number of epochs on the same batches, fixes its mask at the same
step and fine-tunes what is left. Every finished run is one JSON file under examples/results; runs
that have a file are skipped, so a stopped comparison goes on where it was. The table of all records
is printed and written beside them; ``--report`` does only that.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from examples.benchmark.baselines.classical import GradualMagnitude
from examples.data.batches import Batches
from examples.data.modules import CIFAR10, FashionMNIST, InMemory
from examples.models.lenet import Classifier, FiveLayerBatchNorm, LeNet5
from examples.training import quiet_trainer
from lightning_wgsef import Homotopy, WGSEFCallback, group_parameters, prox_multipliers

RESULTS = Path(__file__).parent / "results"
Method = Callable[[dict[str, Any], float], pl.Callback | None]


@dataclass(frozen=True)
class Task:
    """A network, its data and a budget that tells methods apart."""

    network: Callable[[], nn.Module]
    data: Callable[[Path], InMemory]
    k: float
    exclude: str
    groupings: tuple[str, ...]
    methods: tuple[str, ...]
    epochs: int


def _constant(lam: float, metric: str = "identity") -> Method:
    return lambda groups, freeze: WGSEFCallback(lam=lam, freeze=freeze, metric=metric, **groups)


def _homotopy(metric: str) -> Method:
    return lambda groups, freeze: WGSEFCallback(
        lam=Homotopy(length=freeze), metric=metric, **groups
    )


METHODS: dict[str, Method] = {
    "homotopy": lambda groups, freeze: WGSEFCallback(lam=Homotopy(length=freeze), **groups),
    "gradual magnitude": lambda groups, freeze: GradualMagnitude(length=freeze, **groups),
    "one-shot magnitude": _constant(0.0),  # nothing until the projection at the freeze
    **{f"constant lam {lam:g}": _constant(lam) for lam in (0.03, 0.1, 0.3, 1.0)},
}
# The same, in the metric that Adam steps in and in its means over groups. Its entries are of the
# size of gradients, so that the same lam weighs more.
IN_METRIC: dict[str, Method] = {
    "homotopy": _homotopy("identity"),
    "homotopy in Adam's metric": _homotopy("auto"),
    "homotopy in its group means": _homotopy("group"),
    **{f"constant lam {lam:g}": _constant(lam) for lam in (0.1, 0.3, 1.0)},
    **{
        f"constant lam {lam:g} in Adam's metric": _constant(lam, "auto")
        for lam in (1e-4, 1e-3, 1e-2)
    },
    **{
        f"constant lam {lam:g} in its group means": _constant(lam, "group")
        for lam in (1e-4, 1e-3, 1e-2)
    },
}
BEST_IN_METRIC = (  # of each kind the lam that was best with a tenth of the channels
    "homotopy",
    "homotopy in Adam's metric",
    "homotopy in its group means",
    "constant lam 0.3",
    "constant lam 0.001 in Adam's metric",
    "constant lam 0.0001 in its group means",
)
TASKS = {
    "lenet": Task(
        network=LeNet5,
        data=lambda folder: FashionMNIST(folder, batch_size=128),
        k=0.1,
        exclude="*fc3",
        groupings=("channel",),
        methods=tuple(METHODS),
        epochs=5,
    ),
    **{
        f"metric_{k:g}": Task(
            network=LeNet5,
            data=lambda folder: FashionMNIST(folder, batch_size=128),
            k=k,
            exclude="*fc3",
            groupings=("channel",),
            methods=methods,
            epochs=5,
        )
        for k, methods in ((0.1, tuple(IN_METRIC)), (0.25, BEST_IN_METRIC))
    },
    "batchnorm": Task(
        network=FiveLayerBatchNorm,
        data=lambda folder: CIFAR10(folder, batch_size=128),
        k=0.25,
        exclude="",
        groupings=("channel", "filter"),
        methods=("homotopy", "gradual magnitude"),
        epochs=5,
    ),
}


class AccuracyAtFreeze(pl.Callback):
    """Test accuracy just before the mask is fixed, and of the same weights with the mask applied.

    Looks at the network as it stands after the last step before the freeze, then at a copy of it
    that is projected onto the budget; training goes on undisturbed. List it after the pruning
    callback: hooks of an optimizer run in the order of their registration.
    """

    def __init__(self, batches: Batches, freeze: float, arguments: dict[str, Any]) -> None:
        self.batches, self.freeze, self.arguments = batches, freeze, arguments
        self.before: float | None = None
        self.after: float | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        last = max(1, math.floor(self.freeze * trainer.estimated_stepping_batches + 0.5))
        taken = 0

        def after_step(*_: object) -> None:
            nonlocal taken
            taken += 1
            if taken == last - 1:
                self.before = accuracy(pl_module, self.batches)
                network = copy.deepcopy(pl_module.network)
                projected = group_parameters(network, **self.arguments)
                projected.scale_(
                    prox_multipliers(
                        projected.norms(),
                        1.0,
                        projected.budgets,
                        segments=projected.segments,
                        debias=1.0,
                    )
                )
                self.after = accuracy(network, self.batches)

        trainer.optimizers[0].register_step_post_hook(after_step)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Share of right answers in percent, in evaluation mode; the mode is restored."""
    training = model.training
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    model.train(training)
    return 100 * right / len(batches.labels)


def run(
    task: Task,
    method: str,
    grouping: str,
    freeze: float,
    seed: int,
    folder: Path,
    limit_batches: float = 1.0,
) -> dict[str, Any]:
    """Train once; the record of the run. ``limit_batches`` is the share of every epoch used."""
    pl.seed_everything(seed)
    data = task.data(folder)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    model = Classifier(task.network())
    arguments = {"k": task.k, "grouping": grouping, "exclude": task.exclude or None}
    pruning = None if method == "dense" else (METHODS | IN_METRIC)[method](arguments, freeze)
    watch = AccuracyAtFreeze(data.test_dataloader(), freeze, arguments)
    started = time.time()
    trainer = quiet_trainer(task.epochs, [pruning, watch if pruning else None], limit_batches)
    trainer.fit(model, data)
    groups = group_parameters(model, **arguments)
    alive = {name: int((norms > 0).sum()) for name, norms in groups.split(groups.norms()).items()}
    budgets = {layer.name: int(layer.budget) for layer in groups.layers}
    return {
        "method": method,
        "grouping": grouping,
        "k": task.k,
        "epochs": task.epochs,
        "freeze": freeze,
        "seed": seed,
        "accuracy": accuracy(model, data.test_dataloader()),
        "before_freeze": watch.before,
        "after_freeze": watch.after,
        "alive": alive,
        "budgets": budgets,
        "seconds": round(time.time() - started, 1),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
    }


def table(records: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds as a Markdown table, best first."""
    runs: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for record in records:
        key = record["grouping"], record["method"], record["freeze"]
        runs.setdefault(key, []).append(record)
    lines = [
        "| groups | mask fixed | method | accuracy | before the mask | with it | budget met |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = sorted(runs.items(), key=lambda item: (item[0][0], item[0][2], -_mean(item[1])))
    for (grouping, method, freeze), group in rows:
        met = sum(record["alive"] == record["budgets"] for record in group)
        final = _spread(group, "accuracy")
        if method == "dense":
            lines.append(f"| - | - | dense | {final} | - | - | - |")
        else:
            before, after = _spread(group, "before_freeze"), _spread(group, "after_freeze")
            cells = [
                grouping,
                f"{freeze:.0%}",
                method,
                final,
                before,
                after,
                f"{met} of {len(group)}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(group: list[dict[str, Any]]) -> float:
    return statistics.mean(record["accuracy"] for record in group)


def _spread(group: list[dict[str, Any]], key: str) -> str:
    values = [record[key] for record in group]
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.2f} ± {deviation:.2f}"


def main() -> None:
    """Run what has no record yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--freeze", type=float, nargs="+", default=[0.5])
    parser.add_argument("--report", action="store_true", help="only the table of finished runs")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    task = TASKS[options.task]
    folder = RESULTS / options.task
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [("dense", task.groupings[0], options.freeze[0])]
    wanted += [(m, g, f) for m in task.methods for g in task.groupings for f in options.freeze]
    for seed in [] if options.report else options.seeds:
        for method, grouping, freeze in wanted:
            name = f"{method}-{grouping}-{freeze:g}-seed{seed}".replace(" ", "_")
            path = folder / f"{name}.json"
            if not path.exists():
                record = run(task, method, grouping, freeze, seed, options.data_dir)
                path.with_suffix(".part").write_text(json.dumps(record, indent=1) + "\n")
                path.with_suffix(".part").rename(path)
                print(f"{name}: {record['accuracy']:.2f} in {record['seconds']} s", flush=True)
    text = table([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))])
    (RESULTS / f"{options.task}.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
