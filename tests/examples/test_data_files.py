"""The files of CIFAR-10 and CIFAR-100: small made ones, and real ones where they are at hand."""

from __future__ import annotations

import hashlib
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.data import cifar
from examples.data import downloads as files
from examples.data.modules import CIFAR10, CIFAR100, Cifar, FashionMNIST
from tests.conftest import DATA
from tests.helpers.local_server import UNREACHABLE, contents, served


@pytest.fixture(params=[CIFAR10, CIFAR100])
def made(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[type[Cifar], Path]:
    """Files of 20 records in the documented layout; their sums are the published ones, if any."""
    version = request.param.version
    folder = tmp_path / "data" / version.folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    entries = {}
    for name, published in version.files.items():
        records = random.integers(0, 256, (20, version.record_size), np.uint8)
        for byte, classes in enumerate(version.labels):
            records[:, byte] = np.arange(20) * classes // 20
        data = records.tobytes()
        (folder / name).write_bytes(data)
        entries[name] = cifar.BinaryFile(20, hashlib.md5(data).hexdigest() if published.md5 else "")
    monkeypatch.setattr(request.param, "version", replace(version, files=entries))
    return request.param, folder


only_cifar10 = pytest.mark.parametrize("made", [CIFAR10], indirect=True)
only_cifar100 = pytest.mark.parametrize("made", [CIFAR100], indirect=True)


def test_cifar_is_read_in_the_documented_layout(made: tuple[type[Cifar], Path]) -> None:
    module, folder = made
    data = module(folder.parent, batch_size=4, val_size=10)
    data.prepare_data()
    data.setup()
    *training, test = data.version.files
    sizes = [len(part[1]) for part in (data.train_set, data.val_set, data.test_set)]
    assert sizes == [20 * len(training) - 10, 10, 20]
    images, labels = data.test_set
    assert labels.tolist() == [i * data.num_classes // 20 for i in range(20)]
    before = {CIFAR10: 1, CIFAR100: 2}[module]  # label bytes
    raw = (folder / test).read_bytes()
    # record 3, blue, row 5, column 7
    byte = raw[3 * (before + 3072) + before + 2 * 1024 + 5 * 32 + 7]
    expected = (byte / 255 - data.mean[2]) / data.std[2]
    assert float(images[3, 2, 5, 7]) == pytest.approx(expected, abs=1e-5)
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32)


@only_cifar10
@pytest.mark.parametrize("place", ["argument", "in", "beside", "with the files"])
def test_inexact_test_images_are_left_out(made: tuple[type[Cifar], Path], place: str) -> None:
    _, folder = made
    places = {"in": folder.parent, "beside": folder.parent.parent, "with the files": folder}
    if place in places:
        (places[place] / "test_inexact_indices.txt").write_text("3\n19\n")
    raw = bytearray((folder / "test_batch.bin").read_bytes())
    raw[3 * 3073 + 1] ^= 255
    (folder / "test_batch.bin").write_bytes(raw)
    data = CIFAR10(folder.parent, val_size=0, exclude_test=[3, 19] if place == "argument" else None)
    data.setup()
    assert data.test_set[1].tolist() == [i // 2 for i in range(20) if i not in (3, 19)]


@only_cifar10
@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_a_changed_file_with_a_published_sum_is_refused(
    made: tuple[type[Cifar], Path], name: str
) -> None:
    module, folder = made
    data = bytearray((folder / name).read_bytes())
    data[100] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=module.version.files[name].md5) as error:
        module(folder.parent, val_size=0).setup()
    assert str(folder / name) in str(error.value)


@only_cifar100
@pytest.mark.parametrize("name", ["train.bin", "test.bin"])
def test_a_file_of_another_size_is_refused(made: tuple[type[Cifar], Path], name: str) -> None:
    _, folder = made
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-3074])
    with pytest.raises(
        ValueError, match=r"must have 61,480 bytes, 20 records.* has 58,406"
    ) as error:
        CIFAR100(folder.parent, val_size=0).setup()
    assert str(folder / name) in str(error.value)


@pytest.mark.parametrize(
    ("version", "labels", "message"),
    [
        (cifar.CIFAR10, [10], "label 10 found in byte 0"),
        (cifar.CIFAR100, [20, 0], "label 20 found in byte 0"),
        (cifar.CIFAR100, [0, 100], "label 100 found in byte 1"),
    ],
)
def test_broken_records_are_refused(
    version: cifar.Version, labels: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=r"some name: 3,072 bytes are not whole records"):
        cifar.parse(version, bytes(3072), "some name")
    with pytest.raises(ValueError, match=message):
        cifar.parse(version, bytes(labels) + bytes(3072), "some name")
    largest = bytes(classes - 1 for classes in version.labels)
    assert cifar.parse(version, largest + bytes(3072), "")[1].tolist() == [version.labels[-1] - 1]


def test_missing_files_without_network_are_named_with_their_archive(
    made: tuple[type[Cifar], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, folder = made
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    archive = module.version.url.rpartition("/")[2]
    monkeypatch.setattr(module, "version", replace(module.version, url=UNREACHABLE + archive))
    missing = list(module.version.files)[1]
    (folder / missing).unlink()
    with pytest.raises(RuntimeError, match="Cannot download") as error:
        module(folder.parent).prepare_data()
    assert f"unpack {archive} in {folder.parent}" in str(error.value)
    assert f"missing there: {folder.name}/{missing}." in str(error.value)


def test_the_archive_is_downloaded_verified_and_unpacked(
    made: tuple[type[Cifar], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, folder = made
    archive = tmp_path / "served" / module.version.url.rpartition("/")[2]
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    target = tmp_path / "mine"
    data = module(target, val_size=0)
    with served(archive.parent) as address:
        there = replace(module.version, url=address + archive.name)
        monkeypatch.setattr(module, "version", there)
        with pytest.raises(ValueError, match=there.archive_md5):
            data.prepare_data()
        assert contents(target) == []
        published = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(module, "version", replace(there, archive_md5=published))
        data.prepare_data()
    data.setup()
    assert contents(target) == sorted([folder.name, *there.files])
    assert len(data.train_set[1]) == 20 * (len(there.files) - 1)
    data.prepare_data()  # nothing is missing any more


CIFAR = Path(os.environ.get("CIFAR", "/tmp/cifar"))
# Of the copies of CIFAR-10's test file that are at hand some images are known to be inexact.
INEXACT = "test_inexact_indices.txt"
FIRST_LABELS = {CIFAR10: [6, 9, 9, 4, 1], CIFAR100: [19, 29, 0, 11, 1]}


@pytest.mark.parametrize("module", FIRST_LABELS)
def test_real_cifar_is_complete(module: type[Cifar]) -> None:
    if not (CIFAR / module.version.folder).is_dir():
        pytest.skip(
            f"{module.version.folder} is not in {CIFAR} (the variable CIFAR names a folder)"
        )
    data, excluded = module(CIFAR, val_size=0), []
    if module is CIFAR10:
        folders = [*(folder / "cifar10" for folder in DATA), CIFAR]
        lists = [folder / INEXACT for folder in folders if (folder / INEXACT).exists()]
        excluded = [int(line) for path in lists[:1] for line in path.read_text().split()]
        data.exclude_test = excluded
    data.setup()
    images, labels = data.train_set
    assert images.shape == (50_000, 3, 32, 32)
    assert torch.bincount(labels).tolist() == [50_000 // data.num_classes] * data.num_classes
    assert labels[:5].tolist() == FIRST_LABELS[module]
    assert float(images.mean((0, 2, 3)).abs().max()) < 1e-4
    assert float((images.std((0, 2, 3)) - 1).abs().max()) < 1e-4
    assert len(data.test_set[1]) == 10_000 - len(excluded)
    missing = 10_000 // data.num_classes - torch.bincount(data.test_set[1])
    assert len(missing) == data.num_classes
    assert int(missing.min()) >= 0


# --- Fashion-MNIST -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fashion(fashion_mnist: Path) -> FashionMNIST:
    data = FashionMNIST(fashion_mnist, val_size=0)
    data.prepare_data()
    data.setup()
    return data


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


def test_validation_images_are_cut_from_the_training_images(
    fashion: FashionMNIST, fashion_mnist: Path
) -> None:
    data = FashionMNIST(fashion_mnist, val_size=1_000)
    data.setup()
    assert torch.equal(data.val_set[0], fashion.train_set[0][59_000:])
    assert torch.equal(data.train_set[1], fashion.train_set[1][:59_000])
    with pytest.raises(ValueError, match=r"val_size must be in 0\.\.59999, got 60000"):
        data.cut(*fashion.train_set, 60_000)


def with_truncated(real: Path, folder: Path, name: str) -> str:
    """Copies the real files, one of them cut in half; returns the half's MD5."""
    for each in files.FASHION_MNIST_MD5:
        (folder / each).write_bytes((real / each).read_bytes())
    half = (real / name).read_bytes()
    half = half[: len(half) // 2]
    (folder / name).write_bytes(half)
    return hashlib.md5(half).hexdigest()


@pytest.mark.parametrize("name", files.FASHION_MNIST_MD5)
def test_a_truncated_file_is_named_with_both_sums(
    fashion_mnist: Path, tmp_path: Path, name: str
) -> None:
    found = with_truncated(fashion_mnist, tmp_path, name)
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


def test_missing_files_are_downloaded_and_verified(
    fashion_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    data = FashionMNIST(folder)
    with served(fashion_mnist) as address:
        monkeypatch.setattr(files, "FASHION_MNIST_URL", address)
        data.prepare_data()
    assert contents(folder) == sorted(files.FASHION_MNIST_MD5)
    data.setup()
    assert len(data.train_set[1]) == 55_000
    monkeypatch.setattr(files, "FASHION_MNIST_URL", UNREACHABLE)
    data.prepare_data()  # nothing is missing any more


def test_a_corrupt_download_leaves_nothing_behind(
    fashion_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served").mkdir()
    name = "train-images-idx3-ubyte.gz"
    found = with_truncated(fashion_mnist, tmp_path / "served", name)
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
