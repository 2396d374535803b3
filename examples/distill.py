"""What the second half of a run is worth: a learning rate that is rewound, and a dense teacher.

    python -m examples.distill
    python -m examples.distill --task LeNet-5 --data-dir data

Half of a run makes the network sparse, the other half trains what stays. Compared are a learning
rate that falls over the whole run, one that starts again at the freeze, and the same with a dense
teacher, whose outputs are learned beside the labels (Hinton, Vinyals and Dean, 2015). On the digits
of scikit-learn in under a minute, or on the tasks of `examples.convergence`.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from examples.convergence import TASKS, loaded
from examples.data.modules import Digits, InMemory
from examples.models.lenet import SmallConvNet
from examples.training import Batch, Classifier, accuracy, quiet_trainer
from lightning_wgsef import WGSEFCallback


class RewoundCosine(LRScheduler):
    """Learning rate that falls along a cosine, and starts again when the mask is frozen.

    Args:
        optimizer: whose learning rates it sets; step it after every step.
        total_steps: how many steps training lasts, when the rate is 0.
        frozen: tells whether the mask is frozen.

    >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    >>> scheduler = RewoundCosine(optimizer, 8, frozen=lambda: scheduler.last_epoch >= 4)
    >>> rates = []
    >>> for _ in range(8):
    ...     rates.append(round(scheduler.get_last_lr()[0], 2))
    ...     optimizer.step()
    ...     scheduler.step()
    >>> rates
    [1.0, 0.96, 0.85, 0.69, 1.0, 0.85, 0.5, 0.15]
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, frozen: Callable[[], bool]) -> None:
        self.total_steps = total_steps
        self.frozen = frozen
        self.rewound_at = 0
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of every group of parameters."""
        if not self.rewound_at and self.last_epoch > 0 and self.frozen():
            self.rewound_at = self.last_epoch
        share = (self.last_epoch - self.rewound_at) / max(1, self.total_steps - self.rewound_at)
        factor = (1 + math.cos(math.pi * min(1.0, share))) / 2
        return [rate * factor for rate in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer and what asks for the freeze."""
        return {name: value for name, value in super().state_dict().items() if name != "frozen"}


class Taught(pl.LightningModule):
    """Module that learns from a dense teacher, which is no part of it.

    A subclass has the loss and the optimizer.

    Attributes:
        teachers: the teacher, or nothing where there is none: a frozen copy, kept out of the
            module's parameters, state and checkpoints, so that it is neither trained nor pruned.
    """

    teachers: list[nn.Module]  # modules in a list are none of the module's own

    def taught_by(self, teacher: nn.Module | None) -> None:
        """Keep a frozen copy of a network that was trained; None: there is none."""
        teachers = [] if teacher is None else [copy.deepcopy(teacher).eval().requires_grad_(False)]
        self.teachers = teachers

    def on_fit_start(self) -> None:
        """Take the teacher to the device of the network."""
        for teacher in self.teachers:
            teacher.to(self.device)

    def rewound(self, optimizer: Optimizer) -> Any:
        """Return an optimizer and its rate over the run, which starts again at the freeze."""
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = RewoundCosine(optimizer, steps, self.is_frozen)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def is_frozen(self) -> bool:
        """Tell whether the masks of all callbacks that prune are frozen; False without one."""
        callbacks = [x for x in self.trainer.callbacks if isinstance(x, WGSEFCallback)]  # type: ignore[attr-defined]  # set by a connector
        frozen = [x.regularizer is not None and x.regularizer.frozen for x in callbacks]
        return bool(frozen) and all(frozen)


class Distilled(Taught, Classifier):
    """Classifier that learns from labels and from a dense teacher.

    The loss is ``(1 - share)`` times the cross-entropy of the labels plus ``share`` times
    ``temperature`` squared times the divergence of the teacher's softened outputs from its own.

    Args:
        network: gives logits (batch, classes).
        teacher: does so, too, and was trained, see `Taught`. None: labels alone.
        temperature: by which both logits are divided.
        share: of the teacher in the loss.
        more: of `Classifier`.
    """

    def __init__(
        self,
        network: nn.Module,
        teacher: nn.Module | None,
        *,
        temperature: float = 2.0,
        share: float = 0.5,
        **more: Any,
    ) -> None:
        super().__init__(network, **more)
        self.temperature, self.share = temperature, share
        self.taught_by(teacher)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        logits = self(images)
        loss = cross_entropy(logits, labels)
        for teacher in self.teachers:
            with torch.no_grad():
                taught = log_softmax(teacher(images) / self.temperature, dim=1)
            own = log_softmax(logits / self.temperature, dim=1)
            soft = kl_div(own, taught, reduction="batchmean", log_target=True)
            loss = (1 - self.share) * loss + self.share * self.temperature**2 * soft
        self.log("train/loss", loss, batch_size=len(labels))
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and its learning rate over the run."""
        return self.rewound(super().configure_optimizers())


class FallingOnce(Distilled):
    """The same with a learning rate that falls over the whole run, to compare with."""

    def is_frozen(self) -> bool:
        """Never tell of a freeze."""
        return False


def main() -> None:
    """Train a dense network, and from its weights three that keep a quarter of the channels."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=("digits", *TASKS), default="digits")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="of the data sets")
    parser.add_argument("--epochs", type=int, default=20, help="on the digits")
    parser.add_argument("--k", type=float, default=0.25, help="share of the channels that stay")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    make: Callable[[], nn.Module] = SmallConvNet
    epochs, k, more = options.epochs, options.k, {"lr": 3e-3}
    data: InMemory = Digits(batch_size=64)
    if options.task != "digits":
        task = TASKS[options.task]
        make, data = task.make, loaded(task, options.data_dir)
        epochs, k = task.epochs, task.k
        more = {"lr": task.sgd, "optimizer": "sgd", "weight_decay": 5e-4}

    def train(name: str, kind: type[Distilled], start: Any, teacher: Any, *callbacks: Any) -> Any:
        pl.seed_everything(options.seed, verbose=False)
        network = make()
        if start is not None:
            network.load_state_dict(start.state_dict())
        model = kind(network, teacher, **more)
        quiet_trainer(epochs, list(callbacks)).fit(model, data)
        print(f"{name}: {accuracy(model, data.test_dataloader()):.1f} % right")
        return network

    dense = train("dense", FallingOnce, None, None)

    def pruned(name: str, kind: type[Distilled], teacher: nn.Module | None) -> None:
        train(name, kind, dense, teacher, WGSEFCallback(k=k))

    pruned("pruned", FallingOnce, None)
    pruned("pruned, rate rewound at the freeze", Distilled, None)
    pruned("pruned, rewound, with the dense teacher", Distilled, dense)


if __name__ == "__main__":
    main()
