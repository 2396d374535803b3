"""Batches of a data set that lies in memory, drawn and augmented as whole tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


class Batches:
    """Batches (images, labels) of a set in memory; order and augmentation follow (seed, epoch).

    One indexing operation draws a whole batch, and nothing is collated. All of it, random numbers
    included, happens on the device that the set lies on; other devices draw other numbers. The seed
    is torch's at construction (`pl.seed_everything`). Lightning tells the epoch and keeps
    `state_dict` in its checkpoints: a run that is resumed under the same seed sees the batches that
    the first run would have seen, in mid-epoch too. In a plain loop every new iteration is the next
    epoch. Under DDP every process sees all batches.

    Example:
        >>> batches = Batches(torch.zeros(5, 1, 8, 8), torch.arange(5), batch_size=2)
        >>> [labels.tolist() for _, labels in batches]
        [[0, 1], [2, 3], [4]]
    """

    batch_sampler = None  # Lightning asks

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: Augmentation | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self._seed = torch.initial_seed()
        self._epoch = 0
        self._handed_out = 0  # batches of this epoch, those before a resume included
        self._next_epoch = 0
        self._resume: dict[str, int] | None = None

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    @property
    def sampler(self) -> Batches:
        """Lightning calls ``loader.sampler.set_epoch(epoch)``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch the next iteration is."""
        self._next_epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        skip = self._start_epoch()
        generator = self._generator()
        n = len(self.labels)
        device = self.images.device
        order = torch.arange(n, device=device)
        if self.shuffle:
            order = torch.randperm(n, generator=generator, device=device)
        for i, index in enumerate(order.split(self.batch_size)):
            images = self.images.index_select(0, index)
            if self.augment is not None:
                images = self.augment(images, generator)
            if i >= skip:
                self._handed_out = i + 1
                yield images, self.labels.index_select(0, index)

    def _start_epoch(self) -> int:
        """Moves to the next epoch; returns how many of its batches were seen before a resume."""
        self._epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        resume, self._resume = self._resume, None
        seen = resume is not None and resume["epoch"] == self._epoch
        self._handed_out = resume["handed_out"] if resume is not None and seen else 0
        return self._handed_out

    def _generator(self) -> torch.Generator:
        # seed + epoch would give seeds 0 and 1 the same orders one epoch apart
        mixed = np.random.SeedSequence((self._seed, self._epoch)).generate_state(1, np.uint64)
        return torch.Generator(self.images.device).manual_seed(int(mixed[0]))

    def state_dict(self) -> dict[str, int]:
        """Returns the seed, the epoch and how many of its batches have been handed out."""
        return {"seed": self._seed, "epoch": self._epoch, "handed_out": self._handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Lets the next iteration go on where the run that saved ``state`` stood."""
        self._seed = state["seed"]
        self._next_epoch = state["epoch"]
        self._resume = dict(state)


def crop_and_flip(images: Tensor, generator: torch.Generator, *, margin: int = 4) -> Tensor:
    """Shifts every image by up to ``margin`` pixels (zeros come in), mirrors it or not.

    Args:
        images: (n, channels, height, width).
        generator: Draws the shifts and the mirrored images, on the device of the images.
        margin: The largest shift, in pixels.

    Returns:
        New images of the same shape.
    """
    n, channels, height, width = images.shape
    device = images.device
    top, left = torch.randint(2 * margin + 1, (2, n, 1), generator=generator, device=device)
    mirrored = torch.rand(n, 1, generator=generator, device=device) < 0.5
    rows = top + torch.arange(height, device=device)
    columns = torch.arange(width, device=device)
    columns = left + torch.where(mirrored, columns.flip(0), columns)
    return pad(images, [margin] * 4)[
        torch.arange(n, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def normalised(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Returns byte images (n, channels, ...) as float32, scaled to [0, 1] and then standardised."""
    shape = (-1, *[1] * (images.dim() - 2))
    scaled = images.float().div_(255)
    return scaled.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
