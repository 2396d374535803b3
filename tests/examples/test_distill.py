"""Distillation and the rewound learning rate: the teacher stays outside, the rate starts again."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from examples.distill import Distilled, RewoundCosine, main
from examples.models.lenet import SmallConvNet
from lightning_wgsef import WGSEFCallback, group_parameters
from tests.helpers.trainers import loader, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")

IMAGES, LABELS = torch.randn(8, 1, 8, 8), torch.arange(8)


def softmax(logits: torch.Tensor, temperature: float) -> Any:
    powers = np.exp(logits.detach().double().numpy() / temperature)
    return powers / powers.sum(1, keepdims=True)


@pytest.mark.parametrize(("temperature", "share"), [(2.0, 0.5), (4.0, 0.9), (1.0, 0.0)])
def test_the_loss_is_that_of_the_definition(temperature: float, share: float) -> None:
    torch.manual_seed(0)
    network, teacher = SmallConvNet().eval(), SmallConvNet().eval()
    model = Distilled(network, teacher, temperature=temperature, share=share)
    model.log = lambda *_, **__: None
    own, taught = softmax(network(IMAGES), temperature), softmax(teacher(IMAGES), temperature)
    hard = -np.log(softmax(network(IMAGES), 1.0)[np.arange(8), LABELS.numpy()]).mean()
    soft = (taught * np.log(taught / own)).sum(1).mean()
    expected = (1 - share) * hard + share * temperature**2 * soft
    found = float(model.training_step((IMAGES, LABELS), 0).detach())
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_the_teacher_is_no_part_of_the_module() -> None:
    network, teacher = SmallConvNet(), SmallConvNet()
    model = Distilled(network, teacher)
    plain = Distilled(network, None)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {id(p) for p in model.parameters()} == {id(p) for p in network.parameters()}
    assert all(p.requires_grad for p in teacher.parameters())  # the copy is frozen, not the given
    names = [layer.name for layer in group_parameters(model).layers]
    assert names == [layer.name for layer in group_parameters(plain).layers]


class Rates(pl.Callback):
    """The learning rate of every step, and the step after which the mask was frozen."""

    def __init__(self, pruning: WGSEFCallback) -> None:
        self.pruning = pruning
        self.rates: list[float] = []
        self.frozen_after = 0

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not self.frozen_after and self.pruning.regularizer.frozen:
            self.frozen_after = trainer.global_step


def test_the_rate_starts_again_at_the_freeze_and_the_teacher_stays_as_it_was() -> None:
    pl.seed_everything(0, verbose=False)
    network, dense = SmallConvNet(), SmallConvNet()
    model = Distilled(network, dense, lr=1e-3)
    pruning = WGSEFCallback(k=0.25)
    watch = Rates(pruning)
    make_trainer([pruning, watch]).fit(model, loader())
    assert watch.frozen_after == 20
    cosine = [1e-3 * (1 + math.cos(math.pi * i / 40)) / 2 for i in range(20)]
    again = [1e-3 * (1 + math.cos(math.pi * i / 20)) / 2 for i in range(20)]
    assert watch.rates == pytest.approx([*cosine, *again])
    (teacher,) = model.teachers
    for name, value in dense.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], value), name
    alive = {name: int(mask.sum()) for name, mask in pruning.regularizer.masks.items()}
    assert alive == {"network.conv2": 4, "network.conv3": 8, "network.fc": 16}


@pytest.mark.parametrize("stop", [2, 5])
def test_the_schedule_goes_on_from_its_state(stop: int) -> None:
    def make() -> tuple[torch.optim.Optimizer, RewoundCosine]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        return optimizer, RewoundCosine(optimizer, 8, lambda: scheduler_steps[0] >= 3)

    scheduler_steps = [0]

    def run(optimizer: Any, scheduler: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            scheduler_steps[0] += 1
            scheduler.step()
            rates.append(scheduler.get_last_lr()[0])
        return rates

    whole = run(*make(), 8)
    scheduler_steps[0] = 0
    optimizer, scheduler = make()
    first = run(optimizer, scheduler, stop)
    resumed_optimizer, resumed = make()
    resumed.load_state_dict(scheduler.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    assert first + run(resumed_optimizer, resumed, 8 - stop) == whole
    assert "frozen" not in scheduler.state_dict()


def test_without_a_callback_the_rate_falls_once() -> None:
    model = Distilled(SmallConvNet(), None)
    make_trainer([], max_epochs=1).fit(model, loader())
    assert model.lr_schedulers().rewound_at == 0


def test_the_example_compares_three_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distill", "--epochs", "2"])
    main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "% right" in line]
    assert [line.partition(":")[0] for line in lines] == [
        "dense",
        "pruned",
        "pruned, rate rewound at the freeze",
        "pruned, rewound, with the dense teacher",
    ]
