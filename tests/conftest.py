"""What tests of all folders need: marks of what a machine may lack, and folders of real data."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# Where `make` puts the files, and beside the checkout.
DATA = (ROOT / "data", ROOT.parent / "shared" / "data")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("sweep") and "SWEEP" not in os.environ:
        pytest.skip("long, or one of many alike: make sweep")
    if item.get_closest_marker("processes") and sys.platform == "win32":
        pytest.skip("its processes meet in a way that Windows does not know")


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The folder of the four files of Fashion-MNIST; tests of it are skipped without them."""
    folders = [folder / "fashion-mnist" for folder in DATA]
    found = [folder for folder in folders if folder.is_dir()]
    if not found:
        pytest.skip(f"the four Fashion-MNIST files are not in {' or '.join(map(str, folders))}")
    return found[0]
