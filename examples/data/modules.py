"""Lightning data modules that keep a small data set in memory, normalised once, as tensors.

    data = FashionMNIST("data/fashion-mnist")
    trainer.fit(Classifier(LeNet5()), data)

Missing files are downloaded and verified (see `examples.data.downloads` and
`examples.data.cifar`). With ``device="cuda"`` the whole set lies there, and batches are drawn and
augmented there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from examples.data import cifar
from examples.data import downloads as files
from examples.data.batches import Augmentation, Batches, crop_and_flip, normalised

EVALUATION_BATCH = 500


class InMemory(pl.LightningDataModule):
    """The three loaders over three pairs (images, labels); subclasses fill them in `read`.

    Args:
        batch_size: Images in a training batch.
        device: Where the set is kept and batches are made.
    """

    num_classes = 10
    image_shape: tuple[int, int, int]
    augment: Augmentation | None = None

    def __init__(self, batch_size: int, device: str | torch.device = "cpu") -> None:
        super().__init__()
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.train_set: tuple[Tensor, Tensor] | None = None
        self.val_set: tuple[Tensor, Tensor] | None = None
        self.test_set: tuple[Tensor, Tensor] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Reads the set and brings it to the device; once, however often it is called."""
        if self.test_set is not None:
            return
        self.read()
        for name in ("train_set", "val_set", "test_set"):
            images, labels = getattr(self, name)
            setattr(self, name, (images.to(self.device), labels.to(self.device)))

    def read(self) -> None:
        """Fills ``train_set``, ``val_set`` and ``test_set``."""
        raise NotImplementedError  # every data set reads its own files

    def cut(self, images: Tensor, labels: Tensor, val_size: int) -> None:
        """Takes the last ``val_size`` images for validation and the others for training."""
        if not 0 <= val_size < len(labels):
            raise ValueError(f"val_size must be in 0..{len(labels) - 1}, got {val_size}")
        kept = len(labels) - val_size
        self.train_set = images[:kept], labels[:kept]
        self.val_set = images[kept:], labels[kept:]

    def train_dataloader(self) -> Batches:
        """Returns shuffled batches, augmented where the set is."""
        assert self.train_set is not None, "setup() has not run"
        return Batches(*self.train_set, self.batch_size, shuffle=True, augment=self.augment)

    def val_dataloader(self) -> Batches | list[Batches]:
        """Returns the validation batches in their order; an empty list if no images were cut."""
        assert self.val_set is not None, "setup() has not run"
        return Batches(*self.val_set, EVALUATION_BATCH) if len(self.val_set[1]) else []

    def test_dataloader(self) -> Batches:
        """Returns the test batches in their order."""
        assert self.test_set is not None, "setup() has not run"
        return Batches(*self.test_set, EVALUATION_BATCH)


class Digits(InMemory):
    """Handwritten digits, 8 x 8 grey: the 1,797 images that scikit-learn carries.

    The split (1,257 for training, 180 for validation, 360 for testing) is stratified and always
    the same.

    Args:
        batch_size: Images in a training batch.
        device: Where the set is kept and batches are made.
    """

    image_shape = (1, 8, 8)

    def __init__(self, batch_size: int = 64, *, device: str | torch.device = "cpu") -> None:
        super().__init__(batch_size, device)

    def read(self) -> None:
        """Loads and splits the set; nothing is downloaded."""
        pixels, classes = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels).float().view(-1, *self.image_shape)
        labels = torch.from_numpy(classes).long()
        rest, test = train_test_split(
            np.arange(len(labels)), test_size=360, stratify=classes, random_state=0
        )
        train, val = train_test_split(rest, test_size=180, stratify=classes[rest], random_state=0)
        images = (images - images[train].mean()) / images[train].std()
        self.train_set = images[train], labels[train]
        self.val_set = images[val], labels[val]
        self.test_set = images[test], labels[test]


class FashionMNIST(InMemory):
    """Fashion-MNIST, 28 x 28 grey: 60,000 training and 10,000 test images (Xiao et al., 2017).

    Args:
        data_dir: Folder of the four original ``*-ubyte.gz`` files; missing ones are downloaded.
        batch_size: Images in a training batch.
        val_size: How many of the last training images are kept for validation instead. With 0, give
            the Trainer ``limit_val_batches=0``: it warns about an empty loader otherwise.
        device: Where the set is kept and batches are made.
    """

    image_shape = (1, 28, 28)
    mean, std = (0.2860,), (0.3530,)

    def __init__(
        self,
        data_dir: str | Path,
        batch_size: int = 128,
        *,
        val_size: int = 5_000,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(batch_size, device)
        self.data_dir = Path(data_dir)
        self.val_size = val_size

    def prepare_data(self) -> None:
        """Downloads the files that are missing."""
        files.fetch_fashion_mnist(self.data_dir)

    def read(self) -> None:
        """Verifies, parses and normalises the files."""
        images, labels = files.read_fashion_mnist(self.data_dir, "train")
        self.cut(normalised(images, self.mean, self.std), labels.long(), self.val_size)
        images, labels = files.read_fashion_mnist(self.data_dir, "t10k")
        self.test_set = normalised(images, self.mean, self.std), labels.long()


class Cifar(InMemory):
    """What CIFAR-10 and CIFAR-100 have in common; training images are cropped and flipped.

    Args:
        data_dir: Folder in which the binary version is unpacked (``cifar-10-batches-bin/*.bin``,
            ``cifar-100-binary/*.bin``); if it is not there, it is downloaded.
        batch_size: Images in a training batch.
        val_size: How many of the last training images are kept for validation instead. With 0, give
            the Trainer ``limit_val_batches=0``: it warns about an empty loader otherwise.
        device: Where the set is kept and batches are made.
    """

    version: cifar.Version
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_shape = cifar.SHAPE
    augment = staticmethod(crop_and_flip)

    def __init__(
        self,
        data_dir: str | Path,
        batch_size: int = 128,
        *,
        val_size: int = 5_000,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(batch_size, device)
        self.data_dir = Path(data_dir)
        self.val_size = val_size

    def prepare_data(self) -> None:
        """Downloads and unpacks the archive if files are missing."""
        cifar.fetch(self.version, self.data_dir)

    def read(self) -> None:
        """Verifies, parses and normalises the files."""
        *training, _ = self.version.files
        parts = [cifar.read(self.version, self.data_dir, name) for name in training]
        images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self.cut(normalised(images, self.mean, self.std), labels.long(), self.val_size)
        images, labels = self.read_test()
        self.test_set = normalised(images, self.mean, self.std), labels.long()

    def read_test(self) -> tuple[Tensor, Tensor]:
        """Returns the bytes of the last file: images and labels."""
        return cifar.read(self.version, self.data_dir, list(self.version.files)[-1])


class CIFAR10(Cifar):
    """CIFAR-10, 32 x 32 colour: 50,000 training and 10,000 test images (Krizhevsky, 2009).

    Args:
        data_dir: See `Cifar`.
        batch_size: See `Cifar`.
        val_size: See `Cifar`.
        exclude_test: Indices of test images to leave out, where the copy of the test file is known
            to be inexact there. None: read them from ``test_inexact_indices.txt`` in or beside
            ``data_dir`` if there is such a file. With indices the test file's MD5 is not checked.
        device: See `Cifar`.
    """

    version = cifar.CIFAR10
    mean = (0.49139968, 0.48215841, 0.44653091)
    std = (0.24703223, 0.24348513, 0.26158784)

    def __init__(
        self,
        data_dir: str | Path,
        batch_size: int = 128,
        *,
        val_size: int = 5_000,
        exclude_test: Sequence[int] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(data_dir, batch_size, val_size=val_size, device=device)
        self.exclude_test = exclude_test

    def read_test(self) -> tuple[Tensor, Tensor]:
        """Returns the bytes of the last file without the excluded images."""
        excluded = self._excluded()
        name = list(self.version.files)[-1]
        images, labels = cifar.read(self.version, self.data_dir, name, verify=not excluded)
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[excluded] = False
        return images[kept], labels[kept]

    def _excluded(self) -> list[int]:
        if self.exclude_test is not None:
            return list(self.exclude_test)
        for folder in (self.data_dir, self.data_dir / self.version.folder, self.data_dir.parent):
            path = folder / "test_inexact_indices.txt"
            if path.exists():
                return [int(line) for line in path.read_text().split()]
        return []


class CIFAR100(Cifar):
    """CIFAR-100, 32 x 32 colour: 50,000 training and 10,000 test images (Krizhevsky, 2009).

    The labels are the 100 fine ones. No sums of the unpacked files are published: only their size
    and the range of their labels are checked, and after a download the archive's sum.

    Args:
        data_dir: See `Cifar`.
        batch_size: See `Cifar`.
        val_size: See `Cifar`.
        device: See `Cifar`.
    """

    version = cifar.CIFAR100
    num_classes = 100
    mean = (0.50707516, 0.48654887, 0.44091784)
    std = (0.26733429, 0.25643846, 0.27615047)
