"""What the tests of the examples have in common."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

# The benchmark compares a method of torchao, which `pip install .[dev]` brings.
collect_ignore_glob = [] if find_spec("torchao") else ["test_benchmark*.py", "test_hesso.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The coverage of the package is that of its own tests: whole trainings are faster without."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("no_cover")
