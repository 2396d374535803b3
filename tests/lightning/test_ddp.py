"""strategy="ddp" as scripts use it, with Adam and with an optimizer that shards its state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts.ddp import TRAININGS
from tests.scripts.fsdp2_lightning import Module, Shares, make_callback, make_trainer

pytestmark = pytest.mark.processes
SCRIPT = Path(__file__).parents[1] / "scripts" / "ddp.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the script leaves."""
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def outcomes(folder: Path, end: str) -> list[Any]:
    return [torch.load(folder / f"{end}.{rank}", weights_only=True) for rank in range(2)]


def alone(penalty: str | None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    module, callback = Module(sharded=False), make_callback(weights=penalty)
    trainer = make_trainer([callback], enable_checkpointing=False)
    trainer.fit(module, Shares(0, 1), Shares(0, 1))
    return module.network.state_dict(), callback.regularizer.masks


@pytest.mark.parametrize("end", ["adam", "zero"])
def test_two_processes_of_a_script_do_what_one_does(folder: Path, end: str) -> None:
    ranks = outcomes(folder, end)
    weights, masks = alone(TRAININGS[end][1])
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {
        "network.conv1": 2,
        "network.conv2": 2,
        "network.fc1": 2,
    }
    for rank in ranks:
        for name, weight in weights.items():
            assert torch.equal(rank["weights"][name], ranks[0]["weights"][name]), name
            torch.testing.assert_close(rank["weights"][name], weight, rtol=1e-9, atol=1e-12)
            assert torch.equal(rank["weights"][name] == 0, weight == 0), name
        for name, mask in masks.items():
            assert torch.equal(rank["masks"][name], mask), name
    (written,) = (folder / "logs" / end).glob("events*")  # by one of them
    assert b"_hparams_/session_start_info" in written.read_bytes()


def test_sharded_state_of_an_optimizer_is_gathered_and_resumed(folder: Path) -> None:
    wanted = outcomes(folder, "zero")[0]["weights"]
    for rank in outcomes(folder, "zero resumed"):
        for name, weight in wanted.items():
            assert torch.equal(rank["weights"][name], weight), name
