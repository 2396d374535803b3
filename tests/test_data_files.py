"""The files of Fashion-MNIST: the real ones where they are at hand, and broken ones."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from helpers import FASHION_MNIST, needs_fashion_mnist
from local_server import UNREACHABLE, contents, served

from examples import files
from examples.data import FashionMNIST

# --- Fashion-MNIST -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fashion() -> FashionMNIST:
    data = FashionMNIST(FASHION_MNIST, val_size=0)
    data.prepare_data()
    data.setup()
    return data


@needs_fashion_mnist
def test_fashion_mnist_is_complete(fashion: FashionMNIST) -> None:
    images, labels = fashion.train_set
    assert images.shape == (60_000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [6_000] * 10
    assert labels[:5].tolist() == [9, 0, 0, 3, 0]
    assert abs(float(images.mean())) < 1e-3
    assert abs(float(images.std()) - 1) < 1e-3
    images, labels = fashion.test_set
    assert images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(labels).tolist() == [1_000] * 10
    assert fashion.val_dataloader() == []
    images, labels = next(iter(fashion.train_dataloader()))
    assert images.shape == (128, 1, 28, 28)
    assert labels.dtype == torch.int64


@needs_fashion_mnist
def test_validation_images_are_cut_from_the_training_images(fashion: FashionMNIST) -> None:
    data = FashionMNIST(FASHION_MNIST, val_size=1_000)
    data.setup()
    assert torch.equal(data.val_set[0], fashion.train_set[0][59_000:])
    assert torch.equal(data.train_set[1], fashion.train_set[1][:59_000])
    with pytest.raises(ValueError, match=r"val_size must be in 0\.\.59999, got 60000"):
        data.cut(*fashion.train_set, 60_000)


def with_truncated(folder: Path, name: str) -> str:
    """Copies the real files, one of them cut in half; returns the half's MD5."""
    for each in files.FASHION_MNIST_MD5:
        (folder / each).write_bytes((FASHION_MNIST / each).read_bytes())
    half = (FASHION_MNIST / name).read_bytes()
    half = half[: len(half) // 2]
    (folder / name).write_bytes(half)
    return hashlib.md5(half).hexdigest()


@needs_fashion_mnist
@pytest.mark.parametrize("name", files.FASHION_MNIST_MD5)
def test_a_truncated_file_is_named_with_both_sums(tmp_path: Path, name: str) -> None:
    found = with_truncated(tmp_path, name)
    data = FashionMNIST(tmp_path)
    data.prepare_data()
    with pytest.raises(ValueError, match="truncated") as error:
        data.setup()
    for said in (str(tmp_path / name), files.FASHION_MNIST_MD5[name], found, "delete it"):
        assert said in str(error.value)


def test_without_network_the_message_says_which_files_go_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(files, "FASHION_MNIST_URL", UNREACHABLE)
    present, *missing = files.FASHION_MNIST_MD5
    (tmp_path / present).touch()
    with pytest.raises(RuntimeError, match="Cannot download") as error:
        FashionMNIST(tmp_path).prepare_data()
    by_hand = f"put {', '.join(missing)} into {tmp_path}."
    assert by_hand in str(error.value)
    assert UNREACHABLE in str(error.value)
    assert contents(tmp_path) == [present]


@needs_fashion_mnist
def test_missing_files_are_downloaded_and_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    data = FashionMNIST(folder)
    with served(FASHION_MNIST) as address:
        monkeypatch.setattr(files, "FASHION_MNIST_URL", address)
        data.prepare_data()
    assert contents(folder) == sorted(files.FASHION_MNIST_MD5)
    data.setup()
    assert len(data.train_set[1]) == 55_000
    monkeypatch.setattr(files, "FASHION_MNIST_URL", UNREACHABLE)
    data.prepare_data()  # nothing is missing any more


@needs_fashion_mnist
def test_a_corrupt_download_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served").mkdir()
    name = "train-images-idx3-ubyte.gz"
    found = with_truncated(tmp_path / "served", name)
    with served(tmp_path / "served") as address:
        monkeypatch.setattr(files, "FASHION_MNIST_URL", address)
        with pytest.raises(ValueError, match="Nothing was kept") as error:
            FashionMNIST(tmp_path / "mine").prepare_data()
    for said in (name, files.FASHION_MNIST_MD5[name], found, str(tmp_path / "mine")):
        assert said in str(error.value)
    assert contents(tmp_path / "mine") == []


def test_a_file_that_the_server_does_not_have_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(tmp_path) as address:
        monkeypatch.setattr(files, "FASHION_MNIST_URL", address)
        with pytest.raises(RuntimeError, match="404"):
            FashionMNIST(tmp_path / "mine").prepare_data()
    assert contents(tmp_path / "mine") == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an IDX file"),
        (bytes([0, 0, 9, 1, 0, 0, 0, 1, 7]), "not an IDX file"),
        (bytes([0, 0, 8, 2, 0, 0, 0, 1]), "not an IDX file"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 3, 7]), r"shape \(3,\) announced, 1 values found"),
    ],
)
def test_broken_idx_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"some name.*{message}"):
        files.parse_idx(data, "some name")
