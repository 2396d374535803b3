"""Batches are made where the set lies, in a few operations, and on the CPU always alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from test_data import counting
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from examples.batches import Batches, crop_and_flip
from examples.data import Digits


def one_by_one(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The first epoch of shuffled, augmented batches on the CPU, image by image."""
    mixed = np.random.SeedSequence((torch.initial_seed(), 0)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(mixed[0]))
    for index in torch.randperm(len(labels), generator=generator).split(size):
        top, left = torch.randint(9, (2, len(index), 1), generator=generator).squeeze(2).tolist()
        mirrored = torch.rand(len(index), 1, generator=generator).squeeze(1) < 0.5
        changed = []
        for i, number in enumerate(index.tolist()):
            padded = torch.nn.functional.pad(images[number], [4] * 4)
            window = padded[:, top[i] :, left[i] :][:, : images.shape[2], : images.shape[3]]
            changed.append(window.flip(2) if mirrored[i] else window)
        yield torch.stack(changed), labels[index]


def test_batches_on_the_cpu_are_those_of_a_loop_over_images() -> None:
    images = torch.rand(30, 2, 8, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    drawn = list(Batches(images, torch.arange(30), 8, shuffle=True, augment=crop_and_flip))
    expected = list(one_by_one(images, torch.arange(30), 8))
    assert len(drawn) == len(expected) == 4
    for (one, its_labels), (other, other_labels) in zip(drawn, expected, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(its_labels, other_labels)


class Operations(TorchDispatchMode):
    """Counts operations, and notes on which devices their results are."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.devices: set[str] = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        self.count += 1
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            self.devices.add(tensor.device.type)
        return result


def epoch_on(device: str, n: int, monkeypatch: pytest.MonkeyPatch) -> Operations:
    """The operations of an epoch of three shuffled, augmented batches of n images."""
    # There are no generators for meta tensors, and random operations on them need none.
    monkeypatch.setattr(Batches, "_generator", lambda self: None)
    images, labels = (tensor.to(device) for tensor in counting(3 * n))
    loader = Batches(images, labels, n, shuffle=True, augment=crop_and_flip)
    with Operations() as seen:
        assert [tuple(images.shape) for images, _ in loader] == [(n, 1, 8, 8)] * 3
    return seen


def test_batches_are_made_on_the_device_of_the_set_in_a_few_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, large = (epoch_on("meta", n, monkeypatch) for n in (2, 200))
    assert small.devices == large.devices == {"meta"}
    assert small.count == large.count < 100
    assert epoch_on("cpu", 2, monkeypatch).devices == {"cpu"}


def test_a_data_module_keeps_its_sets_on_the_device() -> None:
    data, on_cpu = Digits(device="meta"), Digits()
    for module in (data, on_cpu):
        module.setup("fit")
    for name in ("train_set", "val_set", "test_set"):
        for there, here in zip(getattr(data, name), getattr(on_cpu, name), strict=True):
            assert there.is_meta
            assert there.shape == here.shape
    before = data.train_set
    data.setup("test")
    assert data.train_set is before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_an_accelerator_follow_seed_and_epoch() -> None:
    images, labels = (tensor.cuda() for tensor in counting(50))
    loader = Batches(images, labels, 8, shuffle=True)
    first, second = list(loader), list(loader)
    loader.set_epoch(1)
    for (image, label), (same_image, same_label) in zip(second, list(loader), strict=True):
        assert image.is_cuda
        assert torch.equal(image, same_image)
        assert torch.equal(label, same_label)
        assert torch.equal(image[:, 0, 0, 0], label.float())
    assert not torch.equal(first[0][1], second[0][1])
    seen = torch.cat([label for _, label in first])
    assert sorted(seen.tolist()) == list(range(50))
