"""Data set files on disk: fetch what is missing, verify it, parse Fashion-MNIST into byte tensors.

A file counts only when its MD5 is the published one. A download goes to a temporary name and gets
its real name once it is verified, so that an interrupted run leaves no half file behind.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import struct
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


def read_verified(path: Path, md5: str) -> bytes:
    """Returns the bytes of a file whose MD5 is the given one.

    Raises:
        ValueError: the MD5 is another one; the message names the file, both sums and the remedy.
    """
    data = path.read_bytes()
    found = hashlib.md5(data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} is not the published file: expected MD5 {md5}, found {found} "
            f"({len(data):,} bytes). It is truncated, damaged or another file: delete it and run "
            "again to download it, or put the original in its place."
        )
    return data


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path``, renamed to ``path`` only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _md5_of(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, path: Path, md5: str, *, advice: str) -> None:
    """Downloads ``url`` to ``path``; the file appears there only if its MD5 is the given one.

    Args:
        url: Where the file is published.
        path: Where it goes; missing folders are made.
        md5: The published sum.
        advice: What to do by hand when the download fails: which file belongs where.

    Raises:
        RuntimeError: the address cannot be reached, or the connection broke.
        ValueError: what came is not the published file. Nothing is kept.
    """
    try:
        with urllib.request.urlopen(url, timeout=30) as reply, written_whole(path) as part:
            with part.open("wb") as file:
                shutil.copyfileobj(reply, file)
            if (found := _md5_of(part)) != md5:
                raise ValueError(
                    f"{url} did not deliver the published file: expected MD5 {md5}, found {found} "
                    f"({part.stat().st_size:,} bytes). Nothing was kept. {advice}"
                )
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(f"Cannot download {url} to {path} ({error}). {advice}") from error


def fetch_fashion_mnist(folder: Path) -> None:
    """Downloads those of the four Fashion-MNIST files that are not in ``folder``."""
    missing = [name for name in FASHION_MNIST_MD5 if not (folder / name).exists()]
    advice = f"By hand: put {', '.join(missing)} into {folder.resolve()}."
    for name in missing:
        download(FASHION_MNIST_URL + name, folder / name, FASHION_MNIST_MD5[name], advice=advice)


def parse_idx(data: bytes, name: str) -> Tensor:
    """Parses the IDX format: two zero bytes, type, number of axes, sizes (big-endian), values.

    Args:
        data: The unpacked bytes.
        name: The file's name, for the error.

    Returns:
        An unsigned byte tensor of the shape that the header tells.

    Raises:
        ValueError: this is not IDX of unsigned bytes, or its length contradicts its header.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9]), "two numbers")
        tensor([7, 9], dtype=torch.uint8)
    """
    axes = data[3] if len(data) >= 4 else 0
    start = 4 + 4 * axes
    if data[:3] != b"\0\0\x08" or len(data) < start:
        raise ValueError(f"{name}: not an IDX file of unsigned bytes (it starts {data[:4]!r})")
    shape = struct.unpack(f">{axes}I", data[4:start])
    values = np.frombuffer(data, np.uint8, offset=start)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{name}: shape {shape} announced, {values.size:,} values found")
    return torch.from_numpy(values.reshape(shape).copy())


def read_fashion_mnist(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Reads the part ``"train"`` or ``"t10k"``: images (n, 1, 28, 28) and labels (n,), bytes."""
    images, labels = (
        parse_idx(gzip.decompress(read_verified(folder / name, FASHION_MNIST_MD5[name])), name)
        for name in (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz")
    )
    return images.unsqueeze(1), labels
