"""A run that is killed and goes on ends with the weights of one that was not.

CRASHES=20 kills more often than CI has time for.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import processes
from tests.scripts.crash import train

pytestmark = pytest.mark.processes
CRASHES = int(os.environ.get("CRASHES", "2"))
STEPS = 60


def start(folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    return processes.start(train, (folder,))


def finish(folder: Path) -> dict[str, torch.Tensor]:
    assert start(folder).join(timeout=120)
    return torch.load(folder / "final.pt", weights_only=True)


def kill_at(folder: Path, step: int) -> int:
    """Kill a training once it has taken this step; returns the last step that it noted."""
    note = folder / "step"
    note.unlink(missing_ok=True)
    (process,) = start(folder).processes
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if note.exists() and (text := note.read_text()) and int(text) >= step:
            break
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode < 0  # by a signal
    assert not (folder / "final.pt").exists()
    return int(note.read_text() or 0)


def test_killed_runs_end_like_the_one_that_was_not(tmp_path: Path) -> None:
    """Before the freeze, which is at half of the steps, and after it."""
    expected = finish(tmp_path / "whole")
    moments = random.Random(0)
    for number in range(CRASHES):
        half = STEPS // 2 * (number % 2)
        first = half + moments.randrange(5, STEPS // 2 - 12)
        folder = tmp_path / str(number)
        noted = kill_at(folder, first)
        assert first <= noted < STEPS
        weights = finish(folder)
        assert all(torch.equal(weights[name], value) for name, value in expected.items())
        zero = {name: int((value == 0).sum()) for name, value in weights.items()}
        assert zero["conv2.weight"] == 6 * 12 * 9  # 2 of 8 channels stay
        assert zero["fc.weight"] == 9 * 10  # 3 of 12
