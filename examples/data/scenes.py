"""Scenes of pasted Fashion-MNIST items, with the boxes that a detector is to find."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from examples.data import downloads
from examples.data.modules import InMemory


class FashionScenes(InMemory):
    """Grey images with one to four items of Fashion-MNIST, of 14 to 40 pixels, on a noisy ground.

    Training and validation scenes are made of the training images, test scenes of the test images;
    they are always the same. Targets are tensors (n, 4, 5): class and corners x1, y1, x2, y2 in
    pixels, of the part of an item that is not black; class -1 where there is no item.

    Args:
        data_dir: folder of the four Fashion-MNIST files; missing ones are downloaded.
        batch_size: scenes in a training batch.
        scenes: how many there are for training, validation and testing.
        size: of a scene, in pixels.
        device: where the set is kept and batches are made.
    """

    image_shape = (1, 64, 64)
    items = 4

    def __init__(
        self,
        data_dir: str | Path,
        batch_size: int = 32,
        *,
        scenes: tuple[int, int, int] = (4_000, 500, 500),
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(batch_size, device)
        self.data_dir = Path(data_dir)
        self.scenes = scenes

    def prepare_data(self) -> None:
        """Downloads the files that are missing."""
        downloads.fetch_fashion_mnist(self.data_dir)

    def read(self) -> None:
        """Verifies and parses the files, and pastes."""
        train, val, test = self.scenes
        images, labels = downloads.read_fashion_mnist(self.data_dir, "train")
        self.train_set = paste(images, labels, train, self.image_shape[1], self.items, seed=0)
        self.val_set = paste(images, labels, val, self.image_shape[1], self.items, seed=1)
        images, labels = downloads.read_fashion_mnist(self.data_dir, "t10k")
        self.test_set = paste(images, labels, test, self.image_shape[1], self.items, seed=2)


def paste(
    images: Tensor, labels: Tensor, count: int, size: int, items: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Paste items onto scenes, where they fit without covering much of each other.

    Args:
        images: bytes (n, 1, 28, 28).
        labels: of the items, (n,).
        count: number of scenes.
        size: of a scene, in pixels.
        items: the largest number of items in a scene.
        seed: of all random numbers.

    Returns:
        Scenes (count, 1, size, size), about standardised, and targets (count, items, 5).
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        """From low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=generator))

    scenes = 0.1 * torch.randn(count, 1, size, size, generator=generator)
    targets = torch.full((count, items, 5), -1.0)
    for scene, target in zip(scenes, targets, strict=True):
        wanted, found = draw(1, items), 0
        for _ in range(10 * wanted):
            if found == wanted:
                break
            index, side = draw(0, len(images) - 1), draw(14, 40)
            item = interpolate(images[index, None].float() / 255, (side, side), mode="bilinear")[0]
            seen = item[0] > 0.1
            rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
            if len(rows) == 0:
                continue
            top, left = draw(0, size - side), draw(0, size - side)
            corners = [columns[0] + left, rows[0] + top, columns[-1] + left + 1, rows[-1] + top + 1]
            box = torch.tensor([float(corner) for corner in corners])
            if found and bool((overlaps(target[:found, 1:], box[None]) > 0.1).any()):
                continue
            place = scene[:, top : top + side, left : left + side]
            place.copy_(torch.maximum(place, item))
            target[found, 0], target[found, 1:] = float(labels[index]), box
            found += 1
    return (scenes - 0.15) / 0.3, targets


def overlaps(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes x1, y1, x2, y2; all axes but the last are broadcast.

    >>> overlaps(torch.tensor([0.0, 0, 2, 2]), torch.tensor([[1.0, 0, 3, 2], [5, 5, 6, 6]]))
    tensor([0.3333, 0.0000])
    """
    sides = torch.minimum(boxes[..., 2:], others[..., 2:]) - torch.maximum(
        boxes[..., :2], others[..., :2]
    )
    common = sides.clamp(min=0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (boxes, others)]
    return common / (areas[0] + areas[1] - common).clamp(min=1e-9)
