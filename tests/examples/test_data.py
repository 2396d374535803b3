"""The example data modules in batches and in Lightning, on the digits."""

from __future__ import annotations

import doctest
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from examples.data import batches
from examples.data import downloads as files
from examples.data.batches import Batches, crop_and_flip, normalised
from examples.data.modules import CIFAR10, Digits, FashionMNIST
from examples.models.lenet import FiveLayerBatchNorm, LeNet5, SmallConvNet
from examples.training import Classifier

# pytorch-lightning 2.6 under torch 2.13, in every fit


@pytest.mark.parametrize("module", [batches, files])
def test_docstring_examples(module: object) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny networks on a busy machine wait more for a second thread than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- batches -----------------------------------------------------------------------------------


def counting(n: int = 10) -> tuple[Tensor, Tensor]:
    return torch.arange(n).float().view(n, 1, 1, 1).expand(n, 1, 8, 8).clone(), torch.arange(n)


def orders(seed: int, epochs: int = 3, n: int = 50) -> list[list[int]]:
    torch.manual_seed(seed)
    loader = Batches(*counting(n), 8, shuffle=True)
    return [torch.cat([labels for _, labels in loader]).tolist() for _ in range(epochs)]


def test_order_is_the_same_under_the_same_seed_and_another_in_every_epoch() -> None:
    assert orders(3) == orders(3)
    seen = orders(3) + orders(4)
    assert all(sorted(order) == list(range(50)) for order in seen)
    assert len({tuple(order) for order in seen}) == 6


def test_images_stay_with_their_labels_and_the_last_batch_is_kept() -> None:
    drawn = list(Batches(*counting(), 4, shuffle=True))
    assert [len(labels) for _, labels in drawn] == [4, 4, 2]
    assert all(torch.equal(images[:, 0, 0, 0], labels.float()) for images, labels in drawn)


def test_set_epoch_replays_an_epoch_whole_whatever_was_drawn_before() -> None:
    loader = Batches(*counting(), 4, shuffle=True, augment=crop_and_flip)
    first, second = list(loader), list(loader)
    loader.set_epoch(1)
    again = list(loader)
    assert len(again) == len(second) == 3
    for (images, labels), (same_images, same_labels) in zip(second, again, strict=True):
        assert torch.equal(images, same_images)
        assert torch.equal(labels, same_labels)
    assert not torch.equal(first[0][0], second[0][0])


def test_a_restored_loader_hands_out_the_rest_of_the_epoch_under_any_seed() -> None:
    def drawn(iterator: Iterator[tuple[Tensor, Tensor]]) -> list[float]:
        return [float(images.sum()) for images, _ in iterator]

    make = partial(Batches, *counting(40), 4, shuffle=True, augment=crop_and_flip)
    torch.manual_seed(1)
    loader = make()
    list(loader)
    rest = iter(loader)
    for _ in range(3):
        next(rest)
    state = loader.state_dict()
    torch.manual_seed(2)
    restored = make()
    restored.load_state_dict(state)
    assert drawn(iter(restored)) == drawn(rest)
    assert restored.state_dict() == loader.state_dict()
    assert drawn(iter(restored)) == drawn(iter(loader))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_crop_and_flip_gives_windows_of_the_padded_image(device: str) -> None:
    images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(device) + 1
    changed = crop_and_flip(images, torch.Generator(device).manual_seed(0), margin=2)
    padded = torch.nn.functional.pad(images, [2] * 4)
    for image, result in zip(padded, changed, strict=True):
        windows = [image[:, r : r + 8, c : c + 8] for r in range(5) for c in range(5)]
        windows += [window.flip(2) for window in windows]
        assert sum(torch.equal(window, result) for window in windows) == 1
    still = crop_and_flip(images, torch.Generator(device).manual_seed(0), margin=0)
    mirrored = sum(torch.equal(a.flip(2), b) for a, b in zip(images, still, strict=True))
    assert 20 < mirrored < 44


def test_normalised_has_the_given_statistics_removed_per_channel() -> None:
    images = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).view(1, 2, 2, 1)
    result = normalised(images, (0.5, 0.2), (0.5, 0.1))
    torch.testing.assert_close(result.flatten(), torch.tensor([-1.0, 1.0, 0.0, 2.0]))


# --- digits and Lightning ----------------------------------------------------------------------


def test_digits_are_split_evenly_and_always_alike() -> None:
    data, again = Digits(), Digits()
    for module in (data, again):
        module.prepare_data()
        module.setup()
    sizes = {"train": 1257, "val": 180, "test": 360}
    for name, size in sizes.items():
        images, labels = getattr(data, f"{name}_set")
        assert images.shape == (size, *data.image_shape)
        assert images.dtype == torch.float32
        assert (torch.bincount(labels) - size / 10).abs().max() <= 0.06 * size / 10 + 1
        assert torch.equal(images, getattr(again, f"{name}_set")[0])
    assert abs(float(data.train_set[0].mean())) < 1e-5
    flat = torch.cat([getattr(data, f"{name}_set")[0] for name in sizes]).flatten(1)
    assert len(flat.unique(dim=0)) == 1797
    assert sum(len(labels) for _, labels in data.val_dataloader()) == 180


def trainer(folder: Path, **arguments: object) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=folder, **{**quiet, **arguments})


class SaveOnce(pl.Callback):
    """Saves a checkpoint after a step, or at the end of the second epoch if the step is None."""

    def __init__(self, path: Path, step: int | None) -> None:
        self.path = path
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if self.step is None and trainer.current_epoch == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("limit", [20, 12], ids=["whole epochs", "limited epochs"])
@pytest.mark.parametrize("where", ["in an epoch", "at its last batch", "at its end"])
def test_a_resumed_run_ends_in_the_same_weights(tmp_path: Path, where: str, limit: int) -> None:
    step = {"in an epoch": limit + 7, "at its last batch": 2 * limit, "at its end": None}[where]
    path = tmp_path / "saved.ckpt"
    arguments = {"max_epochs": 3, "limit_train_batches": limit, "enable_checkpointing": False}
    pl.seed_everything(0)
    model = Classifier(SmallConvNet((4, 4, 4)), 0.1, "sgd")
    trainer(tmp_path, callbacks=[SaveOnce(path, step)], **arguments).fit(model, Digits())
    pl.seed_everything(0)
    resumed = Classifier(SmallConvNet((4, 4, 4)), 0.1, "sgd")
    second = trainer(tmp_path, **arguments)
    second.fit(resumed, Digits(), ckpt_path=path, weights_only=True)
    assert second.global_step == 3 * limit
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.usefixtures("one_thread")
def test_digits_are_learnt(tmp_path: Path) -> None:
    pl.seed_everything(0)
    model = Classifier(SmallConvNet(), 0.01)
    run = trainer(tmp_path, max_epochs=4, enable_checkpointing=False)
    run.fit(model, Digits())
    assert set(run.logged_metrics) == {"train/loss", "val/accuracy"}
    assert run.test(model, Digits(), verbose=False)[0]["test/accuracy"] > 0.9


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (SmallConvNet(), Digits.image_shape),
        (LeNet5(), FashionMNIST.image_shape),
        (FiveLayerBatchNorm(), CIFAR10.image_shape),
    ],
)
def test_networks_give_ten_logits(network: torch.nn.Module, shape: tuple[int, ...]) -> None:
    assert Classifier(network)(torch.zeros(2, *shape)).shape == (2, 10)


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r'"adam" or "sgd", got \'lion\''):
        Classifier(LeNet5(), optimizer="lion")


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


@pytest.mark.gpu
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
