"""The callback's errors: before training where that is possible, with names and values."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from trainers import NAMESPACES, loader, make_module, make_trainer, namespace

from lightning_wgsef import WGSEFCallback


@pytest.mark.parametrize("name", NAMESPACES)
@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_flatten_weights_are_refused(name: str, strategy: str) -> None:
    kind = getattr(namespace(f"{name}.strategies"), strategy)
    instance = kind.__new__(kind)  # to make one needs a GPU, or DeepSpeed
    trainer = SimpleNamespace(strategy=instance)
    with pytest.raises(ValueError, match=f"strategy={strategy}.*use 'ddp', or ModelParallel"):
        WGSEFCallback(k=0.5).setup(trainer, make_module(name), "fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be .*got 0"),
        ({"k": -3}, "k must be .*got -3"),
        ({"k": 1.01}, r"k must be .*got 1\.01"),
        ({"k": float("nan")}, "k must be .*got nan"),
        ({"k": 0.5, "lam": -0.1}, r"lam must be .*got -0\.1"),
        ({"k": 0.5, "lam": float("nan")}, "lam must be .*got nan"),
        ({"k": 0.5, "grouping": "chanel"}, "grouping must be 'channel', 'element', 'filter'.*chan"),
        ({"k": 0.5, "freeze": "soon"}, "freeze must be .*'soon'"),
        ({"k": 0.5, "debias": -1.0}, "debias must be .*got -1"),
    ],
)
def test_bad_arguments_are_named_on_construction(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WGSEFCallback(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 9}, "k = 9 is more than the 8 groups of layer 'conv2'"),
        ({"k": 0.5, "include": "conv7"}, "include: the pattern 'conv7' matches no layer"),
        ({"k": 0.5, "exclude": ["nope*"]}, r"exclude: the pattern 'nope\*' matches no layer"),
        ({"k": {"nope": 0.5}}, "k: the pattern 'nope' matches no layer"),
        ({"k": 0.5, "exclude": "*"}, "has no layer that grouping='channel' can group"),
        ({"k": 0.5, "masks": "gone.ckpt"}, r"masks: 'gone\.ckpt' cannot be read"),
    ],
)
def test_what_does_not_fit_the_model_is_named_before_training(
    arguments: dict, message: str
) -> None:
    class NoStep(type(make_module())):
        def training_step(self, *_: Any) -> None:
            raise AssertionError("training has started")

    with pytest.raises(ValueError, match=message):
        make_trainer([WGSEFCallback(**arguments)]).fit(NoStep(), loader())


def test_training_without_an_end_is_named() -> None:
    trainer = make_trainer([WGSEFCallback(k=0.5)], max_epochs=-1)
    with pytest.raises(ValueError, match=r"Homotopy\(length=...\) = 0\.5 is a share of training"):
        trainer.fit(make_module(), loader())


def test_diverged_weights_stop_training_with_the_layers_name() -> None:
    class Diverge(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            with torch.no_grad():
                pl_module.conv2.weight[0, 0, 0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match=r"weights of conv2.* are NaN or infinite"):
        make_trainer([WGSEFCallback(k=0.5), Diverge()]).fit(make_module(), loader())
