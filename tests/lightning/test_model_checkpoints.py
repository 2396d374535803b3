"""What ModelCheckpoint calls best and last: a dense one is named, and can be avoided."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_wgsef import WGSEFCallback
from lightning_wgsef.training.masks import unmasked_in
from tests.helpers.trainers import NAMESPACES, make_module, make_trainer, namespace

ROWS = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def fitted(
    name: str,
    arguments: list[dict[str, Any]],
    losses: list[float],
    kind: type[WGSEFCallback] = WGSEFCallback,
) -> tuple[Any, list[Any], WGSEFCallback, list[str]]:
    """Train 6 epochs of 2 steps, validated with these losses; the mask is fixed in epoch 2."""
    base = make_module(name)

    class Validated(type(base)):
        def validation_step(self, batch, batch_idx):
            self.log("loss", losses[self.current_epoch])

    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(ROWS, torch.zeros(8).long()), batch_size=4
    )
    savers = [namespace(name).callbacks.ModelCheckpoint(**x) for x in arguments]
    pruning = kind(0.5)
    trainer = make_trainer(
        [*savers, pruning],
        name,
        max_epochs=6,
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Validated(), data, data)
    said = [str(x.message) for x in caught if "holds the dense network" in str(x.message)]
    return trainer, savers, pruning, said


def is_pruned(path: str, pruning: WGSEFCallback) -> bool:
    state = torch.load(path, weights_only=True)["state_dict"]
    regularizer = pruning.regularizer
    assert regularizer is not None
    assert regularizer.frozen
    return not unmasked_in(regularizer.groups, regularizer.masks, state)


DENSE_WINS = [0.1, 0.9, 0.8, 0.7, 0.6, 0.65]  # the first epoch, and of the pruned ones the fifth


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_dense_best_is_named_and_a_pruned_one_can_be_had(name: str, tmp_path: Path) -> None:
    ways = {
        "dense": {"monitor": "loss", "save_last": True},
        "pruned": {"monitor": "wgsef/pruned/loss", "save_last": True},
        "end": {},
        "all": {"monitor": "wgsef/pruned/loss", "mode": "max", "save_top_k": -1},
    }
    arguments = [{"dirpath": tmp_path / way, **more} for way, more in ways.items()]
    _, savers, pruning, said = fitted(name, arguments, DENSE_WINS)
    dense, pruned, end, every = savers
    assert not is_pruned(dense.best_model_path, pruning)
    assert not is_pruned(dense.last_model_path, pruning)
    for saver in (pruned, end, every):
        assert is_pruned(saver.best_model_path, pruning)
    assert is_pruned(pruned.last_model_path, pruning)
    for saver, score, epoch in ((pruned, 0.6, 4), (every, 0.8, 2)):
        assert float(saver.best_model_score) == pytest.approx(score)
        assert f"epoch={epoch}" in saver.best_model_path
    assert len(list((tmp_path / "pruned").iterdir())) == 2  # no dense file is left there
    (words,) = said
    for part in (
        "ModelCheckpoint(monitor='loss')",
        dense.best_model_path,
        dense.last_model_path,
        "monitor='wgsef/pruned/loss'",
        "trainer.save_checkpoint(..) after fit",
    ):
        assert part in words


def test_the_largest_metric_and_files_of_every_kind(tmp_path: Path) -> None:
    """Weights alone, settings that only code could read, and both names of one file."""
    arguments = [
        {"dirpath": tmp_path / "weights", "monitor": "loss", "save_weights_only": True},
        {"dirpath": tmp_path / "most", "monitor": "wgsef/pruned/loss", "mode": "max"},
        {"dirpath": tmp_path / "rare", "every_n_epochs": 2, "save_top_k": 0, "save_last": True},
    ]
    _, savers, pruning, said = fitted("pytorch_lightning", arguments, DENSE_WINS)
    weights, most, rare = savers
    assert not is_pruned(weights.best_model_path, pruning)
    assert float(most.best_model_score) == pytest.approx(0.8)
    assert is_pruned(most.best_model_path, pruning)
    assert not rare.last_model_path or is_pruned(rare.last_model_path, pruning)
    (words,) = said
    assert weights.best_model_path in words


class Setting:
    """What a safe reader refuses."""


def test_a_file_that_only_code_could_read_is_told_by_its_date(tmp_path: Path) -> None:
    class Keeping(WGSEFCallback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            checkpoint["setting"] = Setting()

    arguments = [{"dirpath": tmp_path, "monitor": "loss"}]
    _, savers, _, said = fitted("pytorch_lightning", arguments, DENSE_WINS, Keeping)
    assert len(said) == 1
    assert savers[0].best_model_path in said[0]


def test_no_words_where_best_and_last_are_pruned(tmp_path: Path) -> None:
    arguments = [{"dirpath": tmp_path / "a", "monitor": "loss", "save_last": True}]
    _, savers, pruning, said = fitted(
        "pytorch_lightning", arguments, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    )
    assert not said
    assert is_pruned(savers[0].best_model_path, pruning)
