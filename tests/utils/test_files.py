"""Atomic writes and checkpoints: what stays of a failure, and what is never executed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_wgsef.utils.files import atomic_write, read_checkpoint
from tests.helpers.malicious_files import Malicious


def test_a_failure_in_the_block_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()

    def fails() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("second")
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_is_read_on_the_cpu(tmp_path: Path) -> None:
    torch.save({"weight": torch.arange(3.0), "epoch": 2}, tmp_path / "last.ckpt")
    content = read_checkpoint(tmp_path / "last.ckpt")
    assert content["weight"].tolist() == [0, 1, 2]
    assert content["epoch"] == 2


def test_code_in_a_checkpoint_is_named_and_not_executed(tmp_path: Path) -> None:
    path = tmp_path / "bad.ckpt"
    torch.save({"callbacks": Malicious(tmp_path / "harm")}, path)
    with pytest.raises(
        ValueError, match=r"more than numbers and text: to read its .*mkdir"
    ) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04"])
def test_a_file_of_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"other\.ckpt is truncated or no checkpoint"):
        read_checkpoint(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no file"):
        read_checkpoint(tmp_path)
