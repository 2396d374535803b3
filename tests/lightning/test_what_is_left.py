"""What is decided when a fit starts is compared with what is left: steps, zeros, weights, state."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_wgsef import WGSEF, WGSEFCallback
from tests.helpers.trainers import make_trainer
from tests.lightning.test_mask_is_kept import K, Net, alive, data

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


@pytest.mark.parametrize("arguments", [{}, {"freeze": 0.5}, {"freeze": 0.9}, {"lam": 0.1}])
def test_a_dense_checkpoint_behind_the_freeze_point(arguments: Any, tmp_path: Path) -> None:
    trainer = make_trainer([], max_epochs=6)
    trainer.fit(Net(), data())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    model, callback = Net(), WGSEFCallback(k=K, **arguments)
    make_trainer([callback], max_epochs=10).fit(model, data(), ckpt_path=tmp_path / "dense.ckpt")
    assert callback.regularizer.pruners[0].total_steps == 4 * 8
    assert callback.regularizer.frozen
    assert alive(model.net) == [K, K]


class Stop(pl.Callback):
    """End after an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


def sized(batch_size: int) -> Any:
    return torch.utils.data.DataLoader(data().dataset, batch_size=batch_size)


# Epochs, batch size, settings of the Trainer, and how many steps are left after 16 of 80.
CHANGED = {
    "more epochs": (20, 8, {}, 144),
    "fewer epochs": (5, 8, {}, 24),
    "a smaller batch": (10, 4, {}, 8 * 16),
    "a larger batch": (10, 16, {}, 8 * 4),
    "both, and as many steps in all": (20, 16, {}, 18 * 4),
    "a number of steps": (10, 8, {"max_steps": 50}, 34),
    "accumulated": (10, 8, {"accumulate_grad_batches": 2}, 8 * 4),
}


@pytest.fixture(scope="module")
def half_way(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of 10 epochs that ended after two, 16 of 40 steps to the freeze."""
    return stopped(tmp_path_factory.mktemp("half") / "half.ckpt")


def stopped(path: Path, **arguments: Any) -> Path:
    trainer = make_trainer([WGSEFCallback(k=K, **arguments), Stop(1)], max_epochs=10)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training ended before the mask was frozen")
        trainer.fit(Net(), data())
    trainer.save_checkpoint(path)
    return path


def resumed(
    path: Path, epochs: int, size: int, capsys: pytest.CaptureFixture[str], **more: Any
) -> tuple[Net, WGSEFCallback, str]:
    model, callback = Net(), WGSEFCallback(k=K)
    capsys.readouterr()
    trainer = make_trainer([callback, Frozen()], max_epochs=epochs, **more)
    trainer.fit(model, sized(size), ckpt_path=path, weights_only=True)
    return model, callback, capsys.readouterr().out


class Frozen(pl.Callback):
    """Notes how many steps of this fit came before the freeze."""

    steps: int | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.first, Frozen.steps = trainer.global_step, None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        pruning = next(x for x in trainer.callbacks if isinstance(x, WGSEFCallback))
        if pruning.regularizer.frozen and Frozen.steps is None:
            Frozen.steps = trainer.global_step - self.first


@pytest.mark.parametrize("change", CHANGED)
def test_a_run_goes_on_over_the_steps_that_are_left(
    change: str, half_way: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs, size, settings, left = CHANGED[change]
    model, callback, said = resumed(half_way, epochs, size, capsys, **settings)
    assert f"64 steps were to come when the run was saved, {left} are now" in said
    assert callback.regularizer.frozen
    assert alive(model.net) == [K, K]
    # 24 of 64 steps led to the freeze: as large a share of those that are left does.
    assert Frozen.steps == pytest.approx(left * 24 / 64, abs=1)
    assert f"the mask is fixed after {Frozen.steps} more" in said


def test_nothing_is_said_where_nothing_changed(
    half_way: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, callback, said = resumed(half_way, 10, 8, capsys)
    assert "were to come" not in said
    assert Frozen.steps == 24
    assert callback.regularizer.pruners[0].total_steps == 80


def test_a_number_of_steps_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stopped(tmp_path / "half.ckpt", freeze=40)
    callback = WGSEFCallback(k=K, freeze=40)
    make_trainer([callback, Frozen()], max_epochs=20).fit(
        Net(), data(), ckpt_path=path, weights_only=True
    )
    assert Frozen.steps == 24
    assert "were to come" not in capsys.readouterr().out


class Thawing(Net):
    """Its second layer is frozen for two epochs."""

    def __init__(self, later: bool = False) -> None:
        super().__init__()
        self.net[2].requires_grad_(False)
        self.later = later

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.parameters() if p.requires_grad or not self.later]
        return torch.optim.Adam(trained, 1e-2)

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2 and not self.net[2].weight.requires_grad:
            self.net[2].requires_grad_(True)
            if self.later:
                self.optimizers().optimizer.add_param_group({"params": self.net[2].parameters()})


@pytest.mark.parametrize(
    ("later", "scope", "how"), [(False, "layer", ""), (True, "global", "with scope='layer' ")]
)
def test_a_layer_that_thaws_is_said(later: bool, scope: Any, how: str) -> None:
    """What compete for one budget begin together."""
    callback = WGSEFCallback(k=K, scope=scope)
    trainer = make_trainer([callback], max_epochs=4)
    with pytest.warns(
        UserWarning, match=rf"^net\.2: frozen when the fit began.*dense\. {how}include=\['net.2'\]"
    ):
        trainer.fit(Thawing(later), data())
    assert list(callback.regularizer.masks) == ["net.4"]


@pytest.mark.filterwarnings("ignore:net.2. no optimizer trains")
@pytest.mark.filterwarnings("ignore:lam = Homotopy")
def test_a_layer_that_was_included_joins(capsys: pytest.CaptureFixture[str]) -> None:
    callback = WGSEFCallback(k=K, include=["net.2", "net.4"])
    model = Thawing(later=True)
    make_trainer([callback], max_epochs=8).fit(model, data())
    said = capsys.readouterr().out
    assert "net.2 began to train in epoch 2; their schedule runs over the 48 steps" in said
    assert callback.regularizer.frozen
    assert alive(model.net) == [K, K]


def pruned() -> nn.Sequential:
    net = Net().net
    with torch.no_grad():
        for layer in (net[2], net[4]):
            layer.weight[:, K:] = 0
    return net


def test_a_layer_that_is_zero_as_a_whole_is_named() -> None:
    net = pruned()
    nn.init.zeros_(net[4].weight)
    with pytest.warns(UserWarning, match=r"^4: zero as a whole.*exclude=\['4'\]"):
        WGSEF(net, masks="from_zeros")
    WGSEF(net, masks="from_zeros", exclude=["4"])


def test_masks_of_weights_that_were_not_loaded(tmp_path: Path) -> None:
    net, path = pruned(), tmp_path / "pruned.pt"
    torch.save(net.state_dict(), path)
    with pytest.raises(ValueError, match=r"weights of 2, 4 that are zero.*load_state_dict"):
        WGSEF(Net().net, masks=path)
    masks = WGSEF(net, masks=path).masks
    assert [int(mask.sum()) for mask in masks.values()] == [K, K]


@pytest.mark.parametrize(
    "arguments",
    [
        {"scope": "global"},
        {"weights": "size"},
        {"costs": "params", "example_input": torch.zeros(1, 6)},
    ],
)
def test_other_arguments_are_not_called_damage(arguments: Any) -> None:
    def attached(**more: Any) -> WGSEF:
        net = Net().net
        return WGSEF(net, k=0.25, total_steps=9, **more).attach(torch.optim.Adam(net.parameters()))

    for before, after in (({}, arguments), (arguments, {})):
        with pytest.raises(ValueError, match=r"the arguments changed.*scope=, weights=, costs="):
            attached(**after).load_state_dict(attached(**before).state_dict())
