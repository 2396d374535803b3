"""What logging costs in time and bytes: ten epochs with and without the dashboard.

python -m tests.benchmarks.tables.logging

Networks have their usual width and ten epochs their usual 3,910 steps; images and batches are tiny,
so that it takes minutes: neither event files nor the time that logging takes depend on them. The
step that this time is compared with is one of 128 whole images, in the same process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from examples.models.lenet import LeNet5
from examples.models.resnet import ResNet18
from examples.training import Classifier
from lightning_wgsef import WGSEFCallback

Images = tuple[int, int, int]
EPOCHS, BATCHES = 10, 391
FILE = Path(__file__).parents[1] / "results" / "logging.md"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Images, Images]] = {
    "LeNet-5": (LeNet5, (1, 28, 28), (1, 28, 28)),
    "ResNet18": (ResNet18, (3, 8, 8), (3, 32, 32)),
}
"""How it is made, what it trains on here, and the images of a usual step."""
HEADER = """# What logging costs

`python -m tests.benchmarks.tables.logging`: `grouping="channel"`, {steps:,} steps, Lightning's
default of logging every 50 steps. Share: time in the callback's logging and in the logger itself,
over all steps, to the time of as many steps of 128 images ({threads} threads, same process).

| network | scalars | | event files, kB | logging, ms a step | a step, ms | share of a step |
|---|---|---|---|---|---|---|
"""


class Timed:
    """Sums up the time in a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        start = time.perf_counter()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.perf_counter() - start


def batches(count: int, size: int, shape: Images) -> DataLoader[Any]:
    """Random images."""
    images = torch.randn(count * size, *shape)
    return DataLoader(TensorDataset(images, torch.randint(10, (len(images),))), size)


def run(network: str, folder: Path, callbacks: list[WGSEFCallback]) -> tuple[int, float]:
    """Bytes of the event files, and seconds of logging in the whole run."""
    make, shape, _ = NETWORKS[network]
    pl.seed_everything(0, verbose=False)
    logger = TensorBoardLogger(folder)
    timed = [Timed(logger.log_metrics)]
    logger.log_metrics = timed[0]  # type: ignore[method-assign]
    for callback in callbacks:
        for hook in ("on_train_start", "on_train_batch_end", "on_train_end"):
            timed.append(Timed(getattr(callback, hook)))
            setattr(callback, hook, timed[-1])
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=list(callbacks),
        logger=logger,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(make(), lr=1e-4), batches(BATCHES, 2, shape))
    size = sum(path.stat().st_size for path in folder.rglob("events.out.tfevents.*"))
    return size, sum(each.seconds for each in timed)


def step_seconds(network: str) -> float:
    """Median of real steps."""
    make, _, shape = NETWORKS[network]
    model, seconds = make(), []
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for images, labels in batches(6, 128, shape):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Write the table."""
    warnings.filterwarnings("ignore")
    torch.set_flush_denormal(True)
    steps = EPOCHS * BATCHES
    text = HEADER.format(steps=steps, threads=torch.get_num_threads())
    for network in NETWORKS:
        step, base = step_seconds(network), 0.0
        kinds: dict[str, list[WGSEFCallback]] = {
            "no callback": [],
            "callback": [WGSEFCallback(k=0.25)],
            "with `dashboard=True`": [WGSEFCallback(k=0.25, dashboard=True)],
        }
        for name, callbacks in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                size, seconds = run(network, Path(folder), callbacks)
            base = base or seconds
            added = (seconds - base) / steps
            scalars = [len(x.regularizer.metrics()) for x in callbacks if x.regularizer]
            cells = [network, f"{sum(scalars)}", name, f"{size / 1000:,.0f}"]
            cells += [f"{1e3 * added:.2f}", f"{1e3 * step:,.1f}", f"{added / step:.2%}"]
            text += f"| {' | '.join(cells)} |\n"
            print(text.splitlines()[-1], flush=True)
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
