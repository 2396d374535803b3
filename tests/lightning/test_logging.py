"""What reaches the loggers."""

from __future__ import annotations

import csv
import warnings
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_wgsef import WGSEFCallback
from tests.helpers.trainers import NAMESPACES, loader, make_module, make_trainer, namespace

LAYERS = ("conv2", "fc")
KEYS = {f"wgsef/{layer}/{key}" for layer in LAYERS for key in ("group_sparsity", "value", "gap")}
KEYS |= {f"wgsef/{key}" for key in ("sparsity", "value", "gap", "step", "frozen")}


@pytest.mark.parametrize("name", NAMESPACES)
def test_curves_in_tensorboard(tmp_path: Any, name: str) -> None:
    logger = namespace(f"{name}.loggers").TensorBoardLogger(tmp_path, name="", version="")
    trainer = make_trainer([WGSEFCallback(k=0.25)], name, logger=logger, log_every_n_steps=5)
    trainer.fit(make_module(name), loader())
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("wgsef/")} == KEYS
    curves = {tag: events.Scalars(tag) for tag in KEYS}
    for curve in curves.values():  # the same steps for all, those of Lightning's own scalars
        assert [point.step for point in curve] == [4, 9, 14, 19, 24, 29, 34, 39]
    frozen = [point.value for point in curves["wgsef/frozen"]]
    assert frozen == [0, 0, 0, 1, 1, 1, 1, 1]  # at step 20 of 40
    steps = [point.value for point in curves["wgsef/step"]]
    assert steps[:3] == pytest.approx([0.5 ** (1 - n / 20) for n in (5, 10, 15)])
    assert curves["wgsef/gap"][0].value > 0
    assert curves["wgsef/gap"][-1].value == 0
    assert curves["wgsef/conv2/group_sparsity"][-1].value == pytest.approx(6 / 8)
    assert curves["wgsef/fc/group_sparsity"][-1].value == pytest.approx(9 / 12)


def test_several_loggers_get_the_same(tmp_path: Any) -> None:
    loggers = [CSVLogger(tmp_path / "csv", ""), TensorBoardLogger(tmp_path / "tb", "", "")]
    callback = WGSEFCallback(k=0.25, name="mine")
    make_trainer([callback], logger=loggers, log_every_n_steps=10).fit(make_module(), loader())
    with next((tmp_path / "csv").rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    expected = {key.replace("wgsef/", "wgsef/mine/") for key in KEYS}
    assert expected <= set(rows[0])
    assert [row["wgsef/mine/frozen"] for row in rows] == ["0.0", "1.0", "1.0", "1.0"]
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert expected <= set(events.Tags()["scalars"])


def test_metrics_for_monitors_at_the_end_of_every_epoch() -> None:
    seen = []

    class Monitor(namespace("pytorch_lightning").Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append(trainer.callback_metrics["wgsef/sparsity"].item())

    make_trainer([WGSEFCallback(k=0.25), Monitor()]).fit(make_module(), loader())
    assert seen[0] == seen[1] == pytest.approx((6 * 12 * 9 + 9 * 10) / (8 * 12 * 9 + 12 * 10))


@pytest.mark.parametrize("arguments", [{"fast_dev_run": 2}, {"barebones": True}])
def test_without_loggers(arguments: dict[str, Any]) -> None:
    if arguments.get("barebones"):
        off = ("enable_checkpointing", "logger", "enable_progress_bar", "enable_model_summary")
        arguments = {**arguments, **dict.fromkeys(off, None)}
    callback = WGSEFCallback(k=0.25, freeze=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*barebones.*")
        make_trainer([callback], max_epochs=1, **arguments).fit(make_module(), loader())
    assert callback.regularizer.frozen
