"""ProxSGD, HSPG and AdaHSPG+ under one protocol, on LeNet-5 and Fashion-MNIST, over several seeds.

    python -m examples.sparse_learning --data-dir ../shared/data/fashion-mnist

Groups are filters with their biases and norms, in all layers but the last. All methods train with
plain SGD on the same batches, with the same learning rate. lam and epsilon were chosen by one seed
on the validation split, with the runs of the second table. For LeNet-5 lam is the largest that
costs ProxSGD half a point, and epsilon the largest that costs HSPG nothing more. With BatchNorm
ProxSGD has no zero groups until lam costs it points: there it is compared at several accuracies.
Every finished run is one JSON file under examples/results/sparse_learning; what has one is skipped.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

from examples.benchmark.baselines.classical import AdaHSPG, hspg, prox_sgd
from examples.comparison import RESULTS, accuracy
from examples.data.modules import FashionMNIST
from examples.models.lenet import Classifier, LeNet5
from examples.training import quiet_trainer
from lightning_wgsef import group_parameters

EPOCHS = 10
LR = 0.2
LAST = "*fc3"
PLAIN, NORMED = "LeNet-5", "LeNet-5 with BatchNorm"


@dataclass(frozen=True)
class Run:
    """One training run."""

    network: str
    method: str
    lam: float
    epsilon: float
    lr: float = LR
    seed: int = 0

    @property
    def name(self) -> str:
        """What its record is called."""
        parts = [self.network, self.method, f"lam{self.lam:g}", f"epsilon{self.epsilon:g}"]
        return "-".join([*parts, f"lr{self.lr:g}", f"seed{self.seed}"]).replace(" ", "_")


METHODS: dict[str, Callable[[Run], pl.Callback | None]] = {
    "dense": lambda run: None,
    "ProxSGD": lambda run: prox_sgd(run.lam, exclude=LAST),
    "HSPG": lambda run: hspg(run.lam, run.epsilon, start=0.5, exclude=LAST),
    "AdaHSPG+": lambda run: AdaHSPG(run.lam, highest=run.epsilon, exclude=LAST),
}


class NormedLeNet5(nn.Module):
    """LeNet-5 with a BatchNorm before every ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.norm2 = nn.BatchNorm2d(16)
        self.fc1 = nn.Linear(400, 120)
        self.norm3 = nn.BatchNorm1d(120)
        self.fc2 = nn.Linear(120, 84)
        self.norm4 = nn.BatchNorm1d(84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits (batch, 10)."""
        x = max_pool2d(relu(self.norm1(self.conv1(images))), 2)
        x = max_pool2d(relu(self.norm2(self.conv2(x))), 2)
        x = relu(self.norm3(self.fc1(x.flatten(1))))
        x = relu(self.norm4(self.fc2(x)))
        return self.fc3(x)


NETWORKS: dict[str, Callable[[], nn.Module]] = {PLAIN: LeNet5, NORMED: NormedLeNet5}
COMPARED = [
    Run(PLAIN, "dense", 0.0, 0.0),
    Run(PLAIN, "ProxSGD", 3e-3, 0.0),
    Run(PLAIN, "HSPG", 3e-3, 0.9),
    Run(PLAIN, "AdaHSPG+", 3e-3, 0.9),
    Run(NORMED, "dense", 0.0, 0.0),
    Run(NORMED, "ProxSGD", 1e-2, 0.0),
    Run(NORMED, "ProxSGD", 1.5e-2, 0.0),
    Run(NORMED, "ProxSGD", 2e-2, 0.0),
    Run(NORMED, "HSPG", 1e-2, 0.0),
    Run(NORMED, "HSPG", 1e-2, 0.95),
    Run(NORMED, "AdaHSPG+", 1e-2, 0.9),
]
TRIED = [
    *(Run(PLAIN, "dense", 0.0, 0.0, lr=lr) for lr in (0.05, 0.1, 0.2, 0.4)),
    *(Run(PLAIN, "ProxSGD", lam, 0.0) for lam in (1e-3, 3e-3, 1e-2)),
    *(Run(PLAIN, "HSPG", 1e-3, epsilon) for epsilon in (0.9, 0.95)),
    *(Run(PLAIN, "HSPG", 3e-3, epsilon) for epsilon in (0.0, 0.9, 0.95, 0.99)),
    *(Run(NORMED, "ProxSGD", lam, 0.0) for lam in (1e-3, 3e-3, 6e-3, 1e-2)),
    *(Run(NORMED, "HSPG", 3e-3, epsilon) for epsilon in (0.95, 0.99)),
    Run(NORMED, "HSPG", 6e-3, 0.95),
    *(Run(NORMED, "HSPG", 1e-2, epsilon) for epsilon in (0.0, 0.9, 0.95, 0.99)),
    Run(NORMED, "AdaHSPG+", 3e-3, 0.95),
]


class PlainSGD(Classifier):
    """SGD without momentum; the learning rate falls to a tenth in the last third of training."""

    def configure_optimizers(self) -> Any:
        """Returns the optimizer and its schedule."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr)
        epochs = self.trainer.max_epochs
        assert epochs is not None
        decay = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(epochs * 2 / 3)], gamma=0.1)
        return [optimizer], [decay]


def run(setting: Run, folder: Path, limit_batches: float = 1.0) -> dict[str, Any]:
    """Train once; the record of the run. ``limit_batches`` is the share of every epoch used."""
    pl.seed_everything(setting.seed)
    data = FashionMNIST(folder)
    data.prepare_data()
    data.setup()
    model = PlainSGD(NETWORKS[setting.network](), lr=setting.lr)
    callback = METHODS[setting.method](setting)
    started = time.time()
    trainer = quiet_trainer(EPOCHS, [callback], limit_batches)
    trainer.fit(model, data)
    seconds = round(time.time() - started, 1)
    groups = group_parameters(model, "filter", 1.0, exclude=LAST)
    norms, zero = groups.norms(), ~groups.alive()
    largest = torch.cat([(part / part.max()).nan_to_num() for part in groups.split(norms).values()])
    return {
        **asdict(setting),
        "epochs": EPOCHS,
        "accuracy": accuracy(model, data.test_dataloader()),
        "validation": accuracy(model, data.val_dataloader()),
        "zero": {name: int(part.sum()) for name, part in groups.split(zero).items()},
        "near_zero": int(((largest < 0.05) & ~zero).sum()),
        "groups": len(groups),
        "seconds": seconds,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "date": time.strftime("%Y-%m-%d"),
    }


def tables(records: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, then the runs that were tried, as Markdown."""
    lines = [
        "| network | method | lam | epsilon | test accuracy | zero of 226 | near zero | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting in COMPARED:
        group = [x for x in records if replace(_setting(x), seed=0) == setting]
        if group:
            cells = [
                setting.network,
                setting.method,
                f"{setting.lam:g}",
                f"{setting.epsilon:g}",
                _spread([x["accuracy"] for x in group], 2),
                _spread([_zero(x) for x in group], 1),
                _spread([x["near_zero"] for x in group], 1),
                f"{len(group)}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Near zero: below 5 % of the largest norm of the layer, but not 0. What was tried, seed 0:",
        "",
        "| network | method | learning rate | lam | epsilon | validation accuracy | zero groups |",
        "|---|---|---|---|---|---|---|",
    ]
    by_setting = {_setting(record): record for record in records}
    for setting in TRIED:
        if record := by_setting.get(setting):
            start = f"{setting.network} | {setting.method} | {setting.lr:g} | {setting.lam:g}"
            end = f"{setting.epsilon:g} | {record['validation']:.2f} | {_zero(record)}"
            lines.append(f"| {start} | {end} |")
    return "\n".join(lines)


def _setting(record: dict[str, Any]) -> Run:
    return Run(**{name: record[name] for name in Run.__dataclass_fields__})


def _zero(record: dict[str, Any]) -> int:
    return sum(record["zero"].values())


def _spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def main() -> None:
    """Run what has no record yet, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--networks", choices=NETWORKS, nargs="+", default=list(NETWORKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--report", action="store_true", help="only the tables of finished runs")
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    folder = RESULTS / "sparse_learning"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [replace(setting, seed=seed) for seed in options.seeds for setting in COMPARED]
    for setting in [] if options.report else wanted + TRIED:
        if setting.network not in options.networks:
            continue
        path = folder / f"{setting.name}.json"
        if not path.exists():
            record = run(setting, options.data_dir)
            path.with_suffix(".part").write_text(json.dumps(record, indent=1) + "\n")
            path.with_suffix(".part").rename(path)
            print(
                f"{setting.name}: {record['accuracy']:.2f}, {_zero(record)} zero groups, "
                f"{record['seconds']} s",
                flush=True,
            )
    text = tables([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))])
    (RESULTS / "sparse_learning.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
