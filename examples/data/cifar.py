"""The binary versions of CIFAR-10 and CIFAR-100 on disk: fetch, verify, parse."""

from __future__ import annotations

import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.data.downloads import download, read_verified, written_whole

SHAPE = (3, 32, 32)


@dataclass(frozen=True)
class BinaryFile:
    """One of the unpacked files.

    Attributes:
        records: how many images it holds.
        md5: the published sum; "" where none is known.
    """

    records: int
    md5: str = ""


@dataclass(frozen=True)
class Version:
    """What is published, and how it is laid out.

    Attributes:
        name: of the data set.
        url: of the archive.
        archive_md5: its published sum.
        folder: in the archive, the folder of the files.
        files: by name; the last one is for testing.
        labels: the number of classes for each label byte of a record; the last one is what a
            classifier learns.
    """

    name: str
    url: str
    archive_md5: str
    folder: str
    files: dict[str, BinaryFile]
    labels: tuple[int, ...]

    @property
    def record_size(self) -> int:
        """Bytes of an image with its labels."""
        return len(self.labels) + int(np.prod(SHAPE))


CIFAR10 = Version(
    name="CIFAR-10",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
    folder="cifar-10-batches-bin",
    files={
        "data_batch_1.bin": BinaryFile(10_000, "5dd7e06a14cb22eb9f671a540d1b7c25"),
        "data_batch_2.bin": BinaryFile(10_000, "5ea93a67294ea407fff1d09f752e9692"),
        "data_batch_3.bin": BinaryFile(10_000, "942cd6a4bcdd0dd3c604fbe906cb4421"),
        "data_batch_4.bin": BinaryFile(10_000, "ae636b3ba5c66a11e91e8cb52e771fcb"),
        "data_batch_5.bin": BinaryFile(10_000, "53f37980c15c3d472c316c40844f3f0d"),
        "test_batch.bin": BinaryFile(10_000, "803d5f7f4d78ea53de84dbe85f74fb6d"),
    },
    labels=(10,),
)
CIFAR100 = Version(
    name="CIFAR-100",
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    archive_md5="03b5dce01913d631647c71ecec9e9cb8",
    folder="cifar-100-binary",
    files={"train.bin": BinaryFile(50_000), "test.bin": BinaryFile(10_000)},
    labels=(20, 100),
)


def fetch(version: Version, folder: Path) -> None:
    """Downloads and unpacks the archive unless its files are under ``folder``."""
    binaries = folder / version.folder
    missing = [name for name in version.files if not (binaries / name).exists()]
    if not missing:
        return
    archive = folder / version.url.rpartition("/")[2]
    advice = (
        f"By hand: unpack {archive.name} in {folder.resolve()}; missing there: "
        f"{', '.join(f'{version.folder}/{name}' for name in missing)}."
    )
    download(version.url, archive, version.archive_md5, advice=advice)
    with tarfile.open(archive) as tar:
        for name in missing:
            with written_whole(binaries / name) as part, part.open("wb") as file:
                member = tar.extractfile(f"{version.folder}/{name}")
                assert member is not None, f"{name} in {archive} is not a file"
                shutil.copyfileobj(member, file)
    archive.unlink()


def parse(version: Version, data: bytes, name: str) -> tuple[Tensor, Tensor]:
    """Parses records of label bytes and 3,072 pixel bytes (channel, row, column).

    Args:
        version: Says what the label bytes are.
        data: The file's bytes.
        name: The file's name, for the error.

    Returns:
        Images (n, 3, 32, 32) and labels (n,), unsigned bytes.

    Raises:
        ValueError: the length is not a multiple of a record, or a label is out of range.
    """
    size, known = version.record_size, len(version.labels)
    if not data or len(data) % size:
        raise ValueError(
            f"{name}: {len(data):,} bytes are not whole records of {size:,} bytes; it is truncated "
            f"or not the binary version of {version.name}"
        )
    records = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(-1, size).copy())
    for number, classes in enumerate(version.labels):
        largest = int(records[:, number].max())
        if largest >= classes:
            raise ValueError(
                f"{name}: label {largest} found in byte {number} of a record, there labels of "
                f"{version.name} are 0 to {classes - 1}"
            )
    return records[:, known:].reshape(-1, *SHAPE), records[:, known - 1].clone()


def read(
    version: Version, folder: Path, name: str, *, verify: bool = True
) -> tuple[Tensor, Tensor]:
    """Reads one of the files under ``folder``.

    Args:
        version: Which data set it is.
        folder: Where the archive is unpacked.
        name: The file's name.
        verify: Only if it is the official one? Where no sum of the file is published, its size and
            the range of its labels are all that can be checked.

    Returns:
        Images (n, 3, 32, 32) and labels (n,), unsigned bytes.

    Raises:
        ValueError: it is another file.
    """
    path, expected = folder / version.folder / name, version.files[name]
    data = read_verified(path, expected.md5) if verify and expected.md5 else path.read_bytes()
    size = expected.records * version.record_size
    if len(data) != size:
        raise ValueError(
            f"{path} must have {size:,} bytes, {expected.records:,} records of "
            f"{version.record_size:,}; it has {len(data):,}: it is truncated or another file. "
            f"Delete it and run again to download it, or put the original in its place."
        )
    return parse(version, data, str(path))
