"""The same training in a plain loop, Fabric, Accelerate, Hugging Face's Trainer and Lightning's."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_wgsef import WGSEF, Homotopy, WGSEFCallback
from tests.helpers.trainers import make_trainer

LENGTH, STEPS, SIZE = 10, 20, 16


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(STEPS * SIZE, 4, generator=generator)
    return inputs, inputs[:, :2].abs()


def batches() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*tensors()), batch_size=SIZE)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def in_steps(model: Any, optimizer: Any, backward: Any) -> None:
    for inputs, targets in batches():
        optimizer.zero_grad()
        backward(mse_loss(model(inputs), targets))
        optimizer.step()


def plain() -> tuple[nn.Module, WGSEF]:
    model = network()
    optimizer = adam(model)
    regularizer = WGSEF(model, k=3, lam=Homotopy(length=LENGTH)).attach(optimizer)
    in_steps(model, optimizer, lambda loss: loss.backward())
    return model, regularizer


def fabric() -> tuple[nn.Module, WGSEF]:
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model = network()
    wrapped, optimizer = fabric.setup(model, adam(model))
    regularizer = WGSEF(model, k=3, lam=Homotopy(length=LENGTH)).attach(optimizer)
    in_steps(wrapped, optimizer, fabric.backward)
    return model, regularizer


def accelerate() -> tuple[nn.Module, WGSEF]:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    model = network()
    wrapped, optimizer = accelerator.prepare(model, adam(model))
    regularizer = WGSEF(model, k=3, lam=Homotopy(length=LENGTH)).attach(optimizer)
    in_steps(wrapped, optimizer, accelerator.backward)
    return model, regularizer


def lightning() -> tuple[nn.Module, WGSEF]:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self.net)

    module, callback = Module(), WGSEFCallback(k=3, lam=Homotopy(length=LENGTH))
    make_trainer([callback], max_epochs=1).fit(module, batches())
    assert callback.regularizer is not None
    return module.net, callback.regularizer


@pytest.mark.filterwarnings("ignore:The 'train_dataloader'")
@pytest.mark.parametrize("loop", [fabric, accelerate, lightning])
def test_every_loop_ends_with_the_same_weights(loop: Any) -> None:
    (model, regularizer), (expected, first) = loop(), plain()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
    for own in (regularizer, first):
        assert own.frozen
        assert [part.taken for part in own.pruners] == [LENGTH]
        assert [int(mask.sum()) for mask in own.masks.values()] == [3]


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_of_hugging_face(tmp_path: Any) -> None:
    """Its own learning rate schedule is switched off, and its clipping."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Regressor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": mse_loss(self.net(inputs), labels)}

    class Pruning(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_train_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            lam = Homotopy(length=LENGTH)
            self.regularizer = WGSEF(model.net, k=3, lam=lam).attach(optimizer)

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model, pruning = Regressor(), Pruning()
    inputs, targets = tensors()
    rows = [{"inputs": x, "labels": y} for x, y in zip(inputs, targets, strict=True)]
    arguments = transformers.TrainingArguments(
        tmp_path,
        per_device_train_batch_size=SIZE,
        num_train_epochs=1,
        max_grad_norm=0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    optimizer = adam(model)
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with contextlib.redirect_stdout(None):
        InOrder(
            model,
            arguments,
            train_dataset=rows,
            callbacks=[pruning],
            optimizers=(optimizer, constant),
        ).train()
    expected, _ = plain()
    assert pruning.regularizer.frozen
    for one, other in zip(model.net.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)
