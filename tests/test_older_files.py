"""Files of an earlier version: a checkpoint resumes and a slim network loads as when they were new.

``tests/data/`` was written by commit 520c907, before the package got its folders::

    git worktree add ../older 520c907
    cp tests/test_older_files.py ../older
    python ../older/test_older_files.py tests/data

Where torch and the processor are those of then, everything is the same bit for bit; elsewhere sums
may be rounded in another order.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wgsef import Homotopy, WGSEFCallback, load_slim

FOLDER = Path(__file__).parent / "data"
EPOCHS = 4  # of four steps; the budget is reached and the mask frozen after two
MADE_WITH = {"torch": str(torch.__version__), "cpu": torch.backends.cpu.get_cpu_capability()}


def numbers(*shape: int) -> Tensor:
    """Numbers between -1 and 1 that are the same everywhere."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count) * 7919) % 2001 - 1000).double().div(1000).reshape(shape)


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers = OrderedDict(
            conv1=nn.Conv2d(1, 6, 3),
            norm1=nn.BatchNorm2d(6),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(6, 5, 3),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            fc=nn.Linear(5, 3),
        )
        self.net = nn.Sequential(layers).double()
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(numbers(*parameter.shape) / 2)
        self.example_input_array = numbers(2, 1, 6, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self) -> DataLoader:
        images = numbers(16, 1, 6, 6)
        return DataLoader(TensorDataset(images, torch.arange(16) % 3), batch_size=4)


class Saver(pl.Callback):
    """Write a checkpoint in the middle of the homotopy, and one after the freeze."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step in (4, 12):
            trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")


def train(*callbacks: pl.Callback, start: Path | None = None, **options: Any) -> Classifier:
    model = Classifier()
    pruning = WGSEFCallback(k=0.5, lam=Homotopy(length=8), grouping="structure", **options)
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        callbacks=[pruning, *callbacks],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    trainer.fit(model, ckpt_path=start, weights_only=True)
    return model


def write(folder: Path) -> None:
    """Two checkpoints, the slim network of the end, and what both led to."""
    model = train(Saver(folder), slim_to=folder / "slim.safetensors")
    (folder / "slim.json").unlink()
    with torch.no_grad():
        outputs = load_slim(folder / "slim.safetensors", Classifier)(numbers(2, 1, 6, 6))
    end = {"weights": model.state_dict(), "outputs": outputs, **MADE_WITH}
    torch.save(end, folder / "end.pt")


@pytest.fixture(scope="module")
def end() -> dict[str, Any]:
    return torch.load(FOLDER / "end.pt", weights_only=True)


@pytest.fixture(scope="module")
def tolerance(end: dict[str, Any]) -> dict[str, float]:
    """None where torch and processor are those of the files, else that of sums in another order."""
    same = all(end[name] == value for name, value in MADE_WITH.items())
    return {"rtol": 0, "atol": 0} if same else {"rtol": 1e-9, "atol": 1e-12}


# An older Lightning says that the checkpoint is of a newer one.
@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")
def test_checkpoint_resumes_as_the_older_version_went_on(
    end: dict[str, Any], tolerance: dict[str, float]
) -> None:
    """Saved after the freeze."""
    model = train(start=FOLDER / "step=12.ckpt")
    assert list(model.state_dict()) == list(end["weights"])
    for name, value in model.state_dict().items():
        expected = end["weights"][name]
        torch.testing.assert_close(value, expected, **tolerance)
        assert torch.equal(value == 0, expected == 0), name
    assert alive(model) == 3


@pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning")
def test_checkpoint_of_mid_homotopy_goes_on_and_arrives(end: dict[str, Any]) -> None:
    """The way to the budget is another one since, and so are the last weights."""
    model = train(start=FOLDER / "step=4.ckpt")
    assert list(model.state_dict()) == list(end["weights"])
    assert alive(model) == 3


def alive(model: Classifier) -> int:
    """Filters of conv1, of six, that are not zero."""
    return int((model.net.conv1.weight.detach().abs().sum((1, 2, 3)) > 0).sum())


def test_slim_network_gives_its_old_outputs(
    end: dict[str, Any], tolerance: dict[str, float]
) -> None:
    network = load_slim(FOLDER / "slim.safetensors", Classifier)
    assert network.net.conv1.out_channels == 3
    with torch.no_grad():
        outputs = network(numbers(2, 1, 6, 6))
    torch.testing.assert_close(outputs, end["outputs"], **tolerance)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
