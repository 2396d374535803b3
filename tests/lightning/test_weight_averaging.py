"""Averages of the weights, EMA and SWA, stay sparse."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
)
from torch import Tensor

from lightning_wgsef import Homotopy, WGSEFCallback
from tests.helpers.groups import dense_network
from tests.helpers.plain_loops import RATE, Dense, K, alive, assert_same, data
from tests.helpers.trainers import make_trainer


def pruning(length: int) -> WGSEFCallback:
    return WGSEFCallback(k=K, lam=Homotopy(length=length))


class Watch(pl.Callback):
    """The weights after every step, and at the start of every epoch."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.epochs: list[dict[str, Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.epochs.append({k: v.clone() for k, v in pl_module.net.state_dict().items()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.steps.append({k: v.clone() for k, v in pl_module.net.state_dict().items()})


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("what", "start"), [("ema", 0), ("swa", 2), ("swa", 3)])
def test_averages_keep_the_zeros(what: str, start: int, first: bool) -> None:
    """What is left is the average of the weights, where the mask keeps them.

    The last one of these averages begins after the freeze.
    """

    def make() -> pl.Callback:
        if what == "ema":
            return EMAWeightAveraging(decay=0.5)
        return StochasticWeightAveraging(RATE, swa_epoch_start=start, annealing_epochs=1)

    model, callback, seen = Dense(), pruning(6), Watch()
    both = [callback, make()] if first else [make(), callback]
    make_trainer([*both, seen], max_epochs=4).fit(model, data(4))
    assert callback.regularizer.pruners[0].taken == 6
    if what == "ema":
        expected = seen.steps[0]
        for step in seen.steps[1:]:
            expected = {name: (expected[name] + value) / 2 for name, value in step.items()}
    else:
        chosen = seen.epochs[start - 1 :]
        expected = {name: sum(x[name] for x in chosen) / len(chosen) for name in chosen[0]}
    for name, mask in callback.regularizer.masks.items():
        expected[f"{name.removeprefix('net.')}.weight"] *= mask
    twin = dense_network()
    twin.load_state_dict(expected)
    assert_same(model.net, twin)
    assert [len(columns) for columns in alive(model.net)] == [K, K]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:lam = .* had not reached the budget")
def test_checkpoints_hold_a_sparse_average(first: bool, tmp_path: Any) -> None:
    """Saved at step 12, after the freeze at step 6; the fit that goes on from it stays sparse."""
    callback, average = pruning(6), EMAWeightAveraging(decay=0.5)
    both = [callback, average] if first else [average, callback]
    saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=12)
    trainer = make_trainer([*both, saver], max_epochs=3, enable_checkpointing=True)
    trainer.fit(Dense(), data(4))
    (path,) = tmp_path.glob("*.ckpt")
    saved = Dense()
    saved.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert [len(columns) for columns in alive(saved.net)] == [K, K]
    resumed, again = Dense(), [pruning(6), EMAWeightAveraging(decay=0.5)]
    make_trainer(again if first else again[::-1], max_epochs=4).fit(
        resumed, data(4), ckpt_path=path, weights_only=True
    )
    assert alive(resumed.net) == alive(saved.net)
