"""strategy="ddp" as scripts use it, with Adam and with an optimizer that shards its state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts.fsdp2_lightning import Module, Shares, make_callback, make_trainer

SCRIPT = Path(__file__).parents[1] / "scripts" / "ddp.py"


def run(folder: Path, optimizer: str, end: str, *start: str) -> list[Any]:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), optimizer, end, *start]
    root = str(SCRIPT.parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{end}.{rank}", weights_only=True) for rank in range(2)]


def alone() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    module, callback = Module(sharded=False), make_callback()
    trainer = make_trainer([callback], enable_checkpointing=False)
    trainer.fit(module, Shares(0, 1), Shares(0, 1))
    return module.network.state_dict(), callback.regularizer.masks


@pytest.mark.parametrize("optimizer", ["adam", "zero"])
def test_script_on_two_processes_does_what_one_does(tmp_path: Path, optimizer: str) -> None:
    ranks = run(tmp_path, optimizer, "whole")
    weights, masks = alone()
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
    (written,) = (tmp_path / "logs" / "whole").glob("events*")  # by one of them
    assert b"_hparams_/session_start_info" in written.read_bytes()
    if optimizer == "zero":  # its state has to be gathered; saved after the freeze
        step = 15
        path = str(tmp_path / f"whole.step={step}.ckpt")
        for rank in run(tmp_path, optimizer, f"from{step}", path):
            for name, weight in ranks[0]["weights"].items():
                assert torch.equal(rank["weights"][name], weight), name
