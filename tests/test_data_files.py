"""The files of the example data: real ones where they are at hand, small made ones elsewhere."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FASHION_MNIST, needs_fashion_mnist

from examples import files
from examples.data import CIFAR10, FashionMNIST

UNREACHABLE = "http://127.0.0.1:9/"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """Gives a function that serves a folder on the loopback and returns the address."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=folder))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve
) -> None:
    monkeypatch.setattr(files, "FASHION_MNIST_URL", serve(FASHION_MNIST))
    folder = tmp_path / "not" / "there" / "yet"
    data = FashionMNIST(folder)
    data.prepare_data()
    assert contents(folder) == sorted(files.FASHION_MNIST_MD5)
    data.setup()
    assert len(data.train_set[1]) == 55_000
    monkeypatch.setattr(files, "FASHION_MNIST_URL", UNREACHABLE)
    data.prepare_data()  # nothing is missing any more


@needs_fashion_mnist
def test_a_corrupt_download_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve
) -> None:
    (tmp_path / "served").mkdir()
    name = "train-images-idx3-ubyte.gz"
    found = with_truncated(tmp_path / "served", name)
    monkeypatch.setattr(files, "FASHION_MNIST_URL", serve(tmp_path / "served"))
    with pytest.raises(ValueError, match="Nothing was kept") as error:
        FashionMNIST(tmp_path / "mine").prepare_data()
    for said in (name, files.FASHION_MNIST_MD5[name], found, str(tmp_path / "mine")):
        assert said in str(error.value)
    assert contents(tmp_path / "mine") == []


def test_a_file_that_the_server_does_not_have_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve
) -> None:
    monkeypatch.setattr(files, "FASHION_MNIST_URL", serve(tmp_path))
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


# --- CIFAR-10 ----------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six files of 20 records each in the documented layout; their sums are taken as published."""
    folder = tmp_path / "data" / files.CIFAR10_FOLDER
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in files.CIFAR10_MD5:
        records = random.integers(0, 256, (20, 3073), np.uint8)
        records[:, 0] = np.arange(20) % 10
        (folder / name).write_bytes(records.tobytes())
    sums = {
        name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in contents(folder)
    }
    monkeypatch.setattr(files, "CIFAR10_MD5", sums)
    return folder


def test_cifar10_is_read_in_the_documented_layout(cifar: Path) -> None:
    data = CIFAR10(cifar.parent, batch_size=32, val_size=10)
    data.prepare_data()
    data.setup()
    assert [len(part[1]) for part in (data.train_set, data.val_set, data.test_set)] == [90, 10, 20]
    images, labels = data.test_set
    assert labels.tolist() == [i % 10 for i in range(20)]
    raw = (cifar / "test_batch.bin").read_bytes()
    byte = raw[3 * 3073 + 1 + 2 * 1024 + 5 * 32 + 7]  # record 3, blue, row 5, column 7
    expected = (byte / 255 - data.mean[2]) / data.std[2]
    assert float(images[3, 2, 5, 7]) == pytest.approx(expected, abs=1e-5)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (32, 3, 32, 32)


@pytest.mark.parametrize("place", ["argument", "in", "beside", "with the files"])
def test_inexact_test_images_are_left_out(cifar: Path, place: str) -> None:
    places = {"in": cifar.parent, "beside": cifar.parent.parent, "with the files": cifar}
    if place in places:
        (places[place] / "test_inexact_indices.txt").write_text("3\n19\n")
    raw = bytearray((cifar / "test_batch.bin").read_bytes())
    raw[3 * 3073 + 1] ^= 255
    (cifar / "test_batch.bin").write_bytes(raw)
    data = CIFAR10(cifar.parent, val_size=0, exclude_test=[3, 19] if place == "argument" else None)
    data.setup()
    assert data.test_set[1].tolist() == [i % 10 for i in range(20) if i not in (3, 19)]


@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_a_changed_cifar10_file_is_refused(cifar: Path, name: str) -> None:
    data = (cifar / name).read_bytes()
    (cifar / name).write_bytes(data[:-3073])
    with pytest.raises(ValueError, match=files.CIFAR10_MD5[name]) as error:
        CIFAR10(cifar.parent, val_size=0).setup()
    assert str(cifar / name) in str(error.value)


def test_broken_records_are_refused() -> None:
    with pytest.raises(ValueError, match=r"some name: 3,072 bytes are not whole records"):
        files.parse_cifar10(bytes(3072), "some name")
    with pytest.raises(ValueError, match="label 12 found"):
        files.parse_cifar10(bytes([12]) + bytes(3072), "some name")


def test_missing_cifar10_without_network_says_what_to_unpack_where(
    cifar: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(files, "CIFAR10_URL", UNREACHABLE + "cifar-10-binary.tar.gz")
    (cifar / "data_batch_2.bin").unlink()
    with pytest.raises(RuntimeError, match="Cannot download") as error:
        CIFAR10(cifar.parent).prepare_data()
    assert f"unpack cifar-10-binary.tar.gz in {cifar.parent}" in str(error.value)
    assert "missing there: cifar-10-batches-bin/data_batch_2.bin." in str(error.value)


def test_the_cifar10_archive_is_downloaded_verified_and_unpacked(
    cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve
) -> None:
    archive = tmp_path / "served" / "cifar-10-binary.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cifar, files.CIFAR10_FOLDER)
    monkeypatch.setattr(files, "CIFAR10_URL", serve(archive.parent) + archive.name)
    target = tmp_path / "mine"
    with pytest.raises(ValueError, match=files.CIFAR10_ARCHIVE_MD5):
        CIFAR10(target).prepare_data()
    assert contents(target) == []
    published = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setattr(files, "CIFAR10_ARCHIVE_MD5", published)
    data = CIFAR10(target, val_size=0)
    data.prepare_data()
    data.setup()
    assert contents(target) == sorted([files.CIFAR10_FOLDER, *files.CIFAR10_MD5])
    assert len(data.train_set[1]) == 100
    shutil.rmtree(archive.parent)
    data.prepare_data()  # nothing is missing any more
