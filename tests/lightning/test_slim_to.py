"""`slim_to`: at the end of a fit, a smaller network lies on disk, with the trained outputs."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_wgsef import WGSEFCallback
from lightning_wgsef.slimming.files import load_slim
from tests.helpers.groups import raises_naming
from tests.helpers.trainers import NAMESPACES, alive, loader, make_module, make_trainer

EXAMPLE = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def fit(callback: WGSEFCallback, name: str = "pytorch_lightning", **more: Any) -> Any:
    model = make_module(name)
    for attribute, value in more.items():
        setattr(model, attribute, value)
    make_trainer([callback], name).fit(model, loader())
    return model


@pytest.mark.parametrize("name", NAMESPACES)
@pytest.mark.parametrize("grouping", ["structure", "channel"])
def test_a_slim_network_is_written(tmp_path: Any, capsys: Any, name: str, grouping: str) -> None:
    path = tmp_path / "small.safetensors"
    callback = WGSEFCallback(k=0.25, grouping=grouping, slim_to=path)
    model = fit(callback, name, example_input_array=EXAMPLE)
    assert sorted(os.listdir(tmp_path)) == ["small.json", "small.safetensors"]
    assert alive(model)["conv2"] == (2 if grouping == "channel" else 8)
    small = load_slim(path, lambda: make_module(name))
    assert small.conv1.out_channels == 2
    assert small.conv2.in_channels == 2
    assert small.conv2.out_channels == small.fc.in_features == 3
    images = torch.randn(16, 1, 8, 8)
    with torch.no_grad():
        assert torch.allclose(small(images), model.eval()(images), atol=1e-5)
    report = json.loads((tmp_path / "small.json").read_text())
    before, after = report["networks"]
    assert before["parameters"] == sum(p.numel() for p in model.parameters())
    assert after["parameters"] == sum(p.numel() for p in small.parameters()) < before["parameters"]
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert "parameters" in printed


def test_the_trained_model_stays_as_it_is(tmp_path: Any) -> None:
    path = tmp_path / "small.safetensors"
    options = {"k": 0.25, "grouping": "channel", "example_input": EXAMPLE}
    plain = fit(WGSEFCallback(**options))
    model = fit(WGSEFCallback(**options, slim_to=path))
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert model.trainer is not None
    assert not hasattr(model, "slimming")


def test_without_an_example(tmp_path: Any) -> None:
    with raises_naming("slim_to", "example_input"):
        fit(WGSEFCallback(slim_to=tmp_path / "small.safetensors"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_in_low_precision(tmp_path: Any, precision: str) -> None:
    """Nothing could be proved at the end: said before training."""
    callback = WGSEFCallback(slim_to=tmp_path / "small.safetensors", example_input=EXAMPLE)
    trainer = make_trainer([callback], precision=precision)
    with raises_naming("slim_to: model must be float32 or float64", "'bf16-mixed'"):
        trainer.fit(make_module("pytorch_lightning"), loader())
    assert trainer.global_step == 0
    assert os.listdir(tmp_path) == []


def test_its_folder_is_made(tmp_path: Any) -> None:
    path = tmp_path / "some" / "where" / "small.safetensors"
    fit(WGSEFCallback(k=0.25, slim_to=path, example_input=EXAMPLE))
    assert sorted(os.listdir(path.parent)) == ["small.json", "small.safetensors"]


def test_where_nothing_can_be_written(tmp_path: Any) -> None:
    """Said before training."""
    (tmp_path / "file").touch()
    callback = WGSEFCallback(slim_to=tmp_path / "file" / "small.safetensors", example_input=EXAMPLE)
    with raises_naming("slim_to must be a file that can be written", "small.safetensors"):
        fit(callback)
    assert callback.regularizer is None


def test_training_that_stops_before_the_freeze_writes_nothing(tmp_path: Any) -> None:
    """A dense network is not what was asked for."""
    path = tmp_path / "small.safetensors"
    callback = WGSEFCallback(k=0.25, slim_to=path, example_input=EXAMPLE)
    stopping = pl.callbacks.EarlyStopping("loss", patience=1, min_delta=100.0)
    model = make_module()
    trainer = make_trainer([callback, Loss(), stopping], max_epochs=50)
    with pytest.warns(UserWarning, match="ended before the mask was frozen") as caught:
        trainer.fit(model, loader())
    (said,) = [str(one.message) for one in caught if "frozen" in str(one.message)]
    assert "due at step 500; groups alive: {'conv2': 8, 'fc': 12}" in said
    assert f"slim_to: {path} was not written. Train longer, name a smaller max_epochs" in said
    assert trainer.current_epoch < 5
    assert os.listdir(tmp_path) == []


class Loss(pl.Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        pl_module.log("loss", outputs["loss"], on_step=False, on_epoch=True)


def test_a_mask_that_was_never_to_be_frozen(tmp_path: Any) -> None:
    path = tmp_path / "small.safetensors"
    fit(WGSEFCallback(k=0.25, freeze=None, slim_to=path, example_input=EXAMPLE))
    assert sorted(os.listdir(tmp_path)) == ["small.json", "small.safetensors"]


@pytest.mark.parametrize("name", ["small.json", "small.pt", "small"])
def test_another_ending(tmp_path: Any, name: str) -> None:
    """The report of a network in small.json would take its place."""
    with raises_naming("slim_to must end in .safetensors", name):
        fit(WGSEFCallback(slim_to=tmp_path / name, example_input=EXAMPLE))
    assert os.listdir(tmp_path) == []


def test_single_weights_are_not_taken_out(tmp_path: Any, capsys: Any) -> None:
    path = tmp_path / "small.safetensors"
    fit(WGSEFCallback(k=0.5, grouping="element", slim_to=path, example_input=EXAMPLE))
    printed = capsys.readouterr().out
    assert "(100.0%)" in printed
    assert "nothing was taken out: no channel, head, hidden unit or block is zero" in printed
    assert "to_sparse" in printed


def test_a_network_whose_outputs_differ_is_not_written(tmp_path: Any, monkeypatch: Any) -> None:
    """And what was trained is not lost."""
    compare = "lightning_wgsef.network.equivalence.relative_difference"
    monkeypatch.setattr(compare, lambda *_: 0.5)
    path = tmp_path / "small.safetensors"
    with pytest.warns(UserWarning, match=r"slim_to: nothing was written: .*differ by 5.0e-01"):
        model = fit(WGSEFCallback(k=0.25, slim_to=path, example_input=EXAMPLE))
    assert os.listdir(tmp_path) == []
    assert alive(model) == {"conv2": 2, "fc": 3}
