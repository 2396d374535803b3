"""What a run shows in the terminal, and when it is silent."""

from __future__ import annotations

import re
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_wgsef import Constant, Homotopy, WGSEFCallback
from lightning_wgsef.training.freezing import FreezeRule, forecast
from tests.helpers.trainers import NAMESPACES, loader, make_module, make_trainer


def said(capsys: pytest.CaptureFixture[str], name: str = NAMESPACES[0], **arguments: Any) -> str:
    model = make_module(name)
    callback = WGSEFCallback(k=0.25, name=arguments.pop("called", None))
    make_trainer([callback], name, **arguments).fit(model, loader())
    return capsys.readouterr().out


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_table_at_the_start_a_line_at_the_freeze_and_the_report(
    capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text = said(capsys, name, enable_model_summary=True)
    _, start, report = text.split("wgsef:\n")
    assert re.search(r"^conv2 +channel +8 +108 +2 +yes$", start, re.MULTILINE)
    assert "left out: conv1: first layer: its channels are the network's input" in start
    (line,) = re.findall("^wgsef: mask fixed.*$", text, re.MULTILINE)
    assert line == ("wgsef: mask fixed after step 20: 5 of 20 groups alive, within a budget of 5")
    assert re.search(r"^conv2 +2 / 8 +2 +228 / 876", report, re.MULTILINE)
    assert line in start


class Breaks(pl.Callback):
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        del pl_module.fc


@pytest.mark.parametrize(("first", "operations"), [([], r"[\d,]+ / [\d,]+"), ([Breaks()], "-")])
def test_operations_are_reported_where_the_example_runs(
    capsys: pytest.CaptureFixture[str], first: list[pl.Callback], operations: str
) -> None:
    callback = WGSEFCallback(k=0.25, example_input=torch.zeros(2, 1, 8, 8), exclude="fc")
    trainer = make_trainer([*first, callback], enable_model_summary=True)
    trainer.fit(make_module(), loader())
    report = capsys.readouterr().out.split("wgsef:\n")[2]
    assert re.search(rf"^conv2 +2 / 8 +2 +228 / 876 +{operations}$", report, re.MULTILINE)


def test_names_of_callbacks_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, enable_model_summary=True, called="first")
    assert "wgsef/first: mask fixed after step 20" in text


def test_silent_without_the_model_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert "wgsef" not in said(capsys, enable_model_summary=False)


def test_the_line_is_said_once_and_not_again_in_a_second_fit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, callback = make_module(), WGSEFCallback(k=0.25, lam=Homotopy(length=5))
    for epochs in (1, 2):
        trainer = make_trainer([callback], max_epochs=epochs, enable_model_summary=True)
        trainer.fit(model, loader())
    assert capsys.readouterr().out.count("mask fixed after step 5:") == 1


def test_too_few_steps_to_fade_anything_out() -> None:
    with pytest.warns(UserWarning, match=r"has 1 of 2 steps to reach the budget: .*Train longer"):
        make_trainer([WGSEFCallback()], max_epochs=-1, max_steps=2).fit(make_module(), loader())


@pytest.mark.parametrize("schedule", [Homotopy(length=2), Homotopy(start=1.0), Constant(0.1)])
def test_few_steps_that_were_asked_for(schedule: Any) -> None:
    """Warnings are errors here."""
    constant = isinstance(schedule, Constant)
    callback = WGSEFCallback(k=1.0, lam=schedule, freeze=None if constant else "converged")
    make_trainer([callback], max_epochs=-1, max_steps=4).fit(make_module(), loader())
    assert callback.regularizer is not None
    assert callback.regularizer.frozen != constant


def test_a_fast_development_run_has_few_steps_on_purpose() -> None:
    callback = WGSEFCallback()
    make_trainer([callback], fast_dev_run=1).fit(make_module(), loader())  # a warning is an error
    assert callback.regularizer is not None
    assert callback.regularizer.frozen


def test_masks_that_are_given_are_the_budget(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_module()
    with torch.no_grad():
        model.conv2.weight[:, :3] = 0
    callback = WGSEFCallback(masks="from_zeros")
    make_trainer([callback], enable_model_summary=True).fit(model, loader())
    _, start, report = capsys.readouterr().out.split("wgsef:\n")
    assert re.search(r"^conv2 +channel +8 +108 +5 +yes$", start, re.MULTILINE)
    assert re.search(r"^conv2 +5 / 8 +5 ", report, re.MULTILINE)
    assert re.search(r"^fc +12 / 12 +12 ", report, re.MULTILINE)


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
def test_sparsity_and_gap_are_in_the_progress_bar(bar: str) -> None:
    import pytorch_lightning.callbacks as callbacks

    seen = {}

    class Seen(callbacks.Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            seen.update(trainer.progress_bar_metrics)

    both = [WGSEFCallback(k=0.25), getattr(callbacks, bar)(), Seen()]
    make_trainer(both, enable_progress_bar=True).fit(make_module(), loader())
    assert set(seen) == {"wgsef/sparsity", "wgsef/gap"}
    assert seen["wgsef/sparsity"] == pytest.approx(1 - (2 * 108 + 3 * 10) / (8 * 108 + 12 * 10))


@pytest.mark.parametrize(
    ("lam", "freeze", "words"),
    [
        (None, "converged", "the budget will be reached at step 20 (epoch 0) of 40, the mask"),
        (0.1, 0.75, "the budget will be reached at step 30 (epoch 1) of 40, the mask fixed then"),
        (Homotopy(), 0.75, "the budget will be reached at step 30 (epoch 1) of 40, the mask fixed"),
        (Homotopy(), None, "at step 20 (epoch 0) of 40, the mask will not be fixed (freeze=None)"),
        (Constant(1e-9), None, "(0 groups in 4 steps) too few die; the mask will not be fixed"),
        (Constant(1e-9), 1.0, "15 groups will have to be cut when the mask is fixed at step 40"),
        (Constant(1e-9), "converged", "to be cut when the mask is fixed at step 30 (epoch 1)"),
    ],
)
@pytest.mark.filterwarnings("ignore:lam = Constant.* had not reached")
def test_a_forecast_after_a_tenth_of_the_run(
    capsys: pytest.CaptureFixture[str], lam: Any, freeze: Any, words: str
) -> None:
    callback = WGSEFCallback(k=0.25, lam=lam, freeze=freeze)
    make_trainer([callback], enable_model_summary=True).fit(make_module(), loader())
    (line,) = re.findall("^wgsef: after .*$", capsys.readouterr().out, re.MULTILINE)
    assert line.startswith("wgsef: after 4 steps: ")
    assert words in line


@pytest.mark.parametrize("taken", [40, 12])
def test_a_forecast_by_the_rate_comes_true(taken: int) -> None:
    """What lives beyond the budget at a constant rate: the oracle counts every step."""
    rule = FreezeRule("converged", Constant(0.1), total_steps=400)
    for dead, over in ((1, 20), (7, 13), (20, 30)):
        said = forecast(rule, taken, dead, over)
        reached = next(n for n in range(taken, 10**6) if dead * (n - taken) >= over * taken)
        if reached <= 300:
            assert f"reached at step {reached} of 400" in said
        else:
            cut = over - dead * (300 - taken) // taken
            assert f"{cut} groups will have to be cut when the mask is fixed at step 300" in said


def test_a_forecast_of_a_ramp_that_training_is_too_short_for() -> None:
    rule = FreezeRule("converged", Homotopy(length=1000), total_steps=40)
    assert "will not be fixed: that is due at step 1000, training ends at 40" in forecast(
        rule, 4, 0, 9
    )


def test_no_forecast_where_masks_are_given(capsys: pytest.CaptureFixture[str]) -> None:
    model = make_module()
    with torch.no_grad():
        model.conv2.weight[:, :3] = 0
    callback = WGSEFCallback(masks="from_zeros")
    make_trainer([callback], enable_model_summary=True).fit(model, loader())
    assert "will be" not in capsys.readouterr().out
