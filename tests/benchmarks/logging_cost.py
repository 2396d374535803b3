"""What logging costs in time and bytes: ten epochs of ResNet18, with and without the dashboard.

python -m tests.benchmarks.logging_cost

The network has its usual width and ten epochs their usual 3,910 steps; images and batches are tiny,
so that it takes minutes: neither event files nor the time that logging takes depend on them. The
step that this time is compared with is one of 128 images of 32 x 32 pixels, in the same process.
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
from torch.utils.data import DataLoader, TensorDataset

from examples.networks import Classifier
from examples.residual_networks import ResNet18
from lightning_wgsef import WGSEFCallback

EPOCHS, BATCHES = 10, 391
FILE = Path(__file__).parent / "results" / "logging.md"
HEADER = """# What logging costs

`python -m tests.benchmarks.logging_cost`: ResNet18, `grouping="channel"`, {steps:,} steps,
Lightning's default of logging every 50 steps. Share: time in the callback's logging and in the
logger itself, over all steps, to the time of as many steps of 128 images of 32 x 32 pixels
({step:.2f} s each, {threads} threads, same process).

| | event files, kB | logging, ms a step | share of a step |
|---|---|---|---|
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


def batches(count: int, size: int, pixels: int) -> DataLoader[Any]:
    """Random images."""
    images = torch.randn(count * size, 3, pixels, pixels)
    return DataLoader(TensorDataset(images, torch.randint(10, (len(images),))), size)


def run(folder: Path, callbacks: list[WGSEFCallback]) -> tuple[int, float]:
    """Bytes of the event files, and seconds of logging in the whole run."""
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
    trainer.fit(Classifier(ResNet18(), lr=1e-4), batches(BATCHES, 2, 8))
    size = sum(path.stat().st_size for path in folder.rglob("events.out.tfevents.*"))
    return size, sum(each.seconds for each in timed)


def step_seconds() -> float:
    """Median of real steps."""
    model, seconds = ResNet18(), []
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for images, labels in batches(6, 128, 32):
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
    steps, step = EPOCHS * BATCHES, step_seconds()
    text = HEADER.format(steps=steps, step=step, threads=torch.get_num_threads())
    kinds: dict[str, list[WGSEFCallback]] = {
        "no callback": [],
        "callback": [WGSEFCallback(k=0.25)],
        "with `dashboard=True`": [WGSEFCallback(k=0.25, dashboard=True)],
    }
    base = 0.0
    for name, callbacks in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            size, seconds = run(Path(folder), callbacks)
        base = base or seconds
        added = (seconds - base) / steps
        text += f"| {name} | {size / 1000:,.0f} | {1e3 * added:.2f} | {added / step:.2%} |\n"
        print(text.splitlines()[-1], flush=True)
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
