"""ResNet18 on Fashion-MNIST with 30 % of its groups: filters, channels, structure.

    python -m examples.resnet18_structure --data-dir ../shared/data/fashion-mnist

Every epoch sees the same share of the training images (a full epoch takes a quarter of an hour on
two cores). Every finished run is one JSON file under examples/results/resnet18_structure.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from examples.comparison import RESULTS, accuracy
from examples.data.modules import FashionMNIST
from examples.models.lenet import Classifier
from examples.models.resnet import ResNet18
from examples.training import quiet_trainer
from lightning_wgsef import WGSEFCallback, group_parameters

EPOCHS = 4
BATCHES = 60
EXAMPLE = torch.zeros(2, 1, 28, 28)
SETTINGS: dict[str, dict[str, Any]] = {
    "filter": {"grouping": "filter", "scope": "layer"},
    "channel": {"grouping": "channel", "scope": "layer"},
    "structure, a budget a set": {"grouping": "structure", "scope": "layer"},
    "structure, one budget": {"grouping": "structure", "scope": "global"},
}


def run(setting: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train once; the record of the run."""
    pl.seed_everything(seed)
    data = FashionMNIST(folder, batch_size=128)
    data.prepare_data()
    data.setup()
    model = Classifier(ResNet18(channels=1))
    record = {"setting": setting, "seed": seed, "epochs": EPOCHS, "batches": BATCHES}
    record |= train(model, data, setting, EPOCHS, BATCHES)
    return {**record, "accuracy": accuracy(model, data.test_dataloader())}


def train(
    model: Classifier, data: FashionMNIST, setting: str, epochs: int, batches: int
) -> dict[str, Any]:
    """Train a model in place; what is alive then."""
    arguments = {"k": 0.3, "example_input": EXAMPLE, **SETTINGS.get(setting, {})}
    callback = WGSEFCallback(**arguments)
    started = time.time()
    trainer = quiet_trainer(epochs, [None if setting == "dense" else callback], batches)
    trainer.fit(model, data)
    record: dict[str, Any] = {"seconds": round(time.time() - started, 1)}
    if setting != "dense":
        groups = group_parameters(model, **arguments)
        alive = groups.alive()
        record["alive"] = {name: int(part.sum()) for name, part in groups.split(alive).items()}
        record["groups"] = dict(zip(groups.split(alive), groups.counts, strict=True))
        record["budgets"] = groups.budgets.tolist()
        record["left_out"] = groups.left_out
    return record


def table(records: list[dict[str, Any]]) -> str:
    """The runs as Markdown."""
    lines = [
        "| groups | test accuracy | alive | budget met exactly | seeds |",
        "|---|---|---|---|---|",
    ]
    for setting in ["dense", *SETTINGS]:
        runs = [record for record in records if record["setting"] == setting]
        if runs:
            scores = ", ".join(f"{record['accuracy']:.2f}" for record in runs)
            cells = ["-", "-"] if setting == "dense" else _budget(runs[0])
            lines.append(f"| {setting} | {scores} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def _budget(record: dict[str, Any]) -> list[str]:
    alive, budgets = list(record["alive"].values()), record["budgets"]
    spent = alive if len(budgets) == len(alive) else [sum(alive)]
    met = "yes" if spent == [round(budget) for budget in budgets] else f"no: {spent} of {budgets}"
    return [f"{sum(alive)} of {sum(record['groups'].values())}", met]


def main() -> None:
    """Run what has no record yet, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--settings", nargs="+", default=["dense", *SETTINGS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", ".*LeafSpec.*")
    folder = RESULTS / "resnet18_structure"
    folder.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for setting in options.settings:
            path = folder / f"{setting.replace(', ', '-').replace(' ', '_')}-seed{seed}.json"
            if not path.exists():
                record = run(setting, seed, options.data_dir)
                path.with_suffix(".part").write_text(json.dumps(record, indent=1) + "\n")
                path.with_suffix(".part").rename(path)
                print(f"{setting}: {record['accuracy']:.2f} in {record['seconds']} s", flush=True)
    text = table([json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))])
    (RESULTS / "resnet18_structure.md").write_text(f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
