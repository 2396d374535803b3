"""FSDP2 through Lightning, with sharded and full checkpoints."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_wgsef import load_slim
from tests.helpers import processes
from tests.scripts.fsdp2_lightning import (
    SAVED,
    Module,
    Shares,
    make_callback,
    make_trainer,
    outcome,
    work,
)
from tests.scripts.fsdp2_plain import Network, batch

pytestmark = pytest.mark.processes


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run(folder: Path, count: int, tasks: list[dict[str, Any]]) -> dict[str, list[Any]]:
    arguments = (count, free_ports(len(tasks)), str(folder), tasks)
    processes.run(work, arguments, count)
    ends = [task["end"] for task in tasks]
    return {
        end: [torch.load(folder / f"{end}.{rank}", weights_only=True) for rank in range(count)]
        for end in ends
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lightning")


@pytest.fixture(scope="module")
def on_two(folder: Path) -> dict[str, list[Any]]:
    """Two processes: uninterrupted, and from its checkpoints; in pieces, and as one file."""
    tasks = []
    for name, pieces in (("pieces", True), ("one", False)):
        tasks.append({"pieces": pieces, "start": None, "end": name})
        for step in SAVED:
            start = f"{folder}/{name}/step={step}.ckpt"
            tasks.append({"pieces": pieces, "start": start, "end": f"{name}.{step}"})
    return run(folder, 2, tasks)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    return fit()


def fit(start: str | None = None) -> dict[str, Any]:
    module, callback = Module(sharded=False), make_callback()
    trainer = make_trainer([callback], enable_checkpointing=False)
    trainer.fit(module, Shares(0, 1), Shares(0, 1), ckpt_path=start)
    return outcome(module, callback)


def assert_like(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["frozen"]
    assert wanted["frozen"]
    assert {name: int(mask.sum()) for name, mask in found["masks"].items()} == {
        "network.conv1": 2,
        "network.conv2": 2,
        "network.fc1": 2,
    }
    for name, mask in wanted["masks"].items():
        assert torch.equal(found["masks"][name], mask)
    for kind in ("weights", "moments"):
        for name, value in wanted[kind].items():
            torch.testing.assert_close(found[kind][name], value, rtol=1e-9, atol=1e-12)
    for name, value in wanted["weights"].items():
        assert torch.equal(found["weights"][name] == 0, value == 0)


@pytest.mark.parametrize("name", ["pieces", "one"])
def test_two_processes_end_like_one(on_two: Any, alone: Any, name: str) -> None:
    for rank in range(2):
        assert_like(on_two[name][rank], alone)


@pytest.mark.parametrize("step", SAVED)
@pytest.mark.parametrize("name", ["pieces", "one"])
def test_resumed_runs_are_bit_identical(on_two: Any, name: str, step: int) -> None:
    for rank in range(2):
        found, wanted = on_two[f"{name}.{step}"][rank], on_two[name][rank]
        for kind in ("weights", "moments", "masks"):
            for key, value in wanted[kind].items():
                assert torch.equal(found[kind][key], value), key


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need")
@pytest.mark.parametrize("step", SAVED)
def test_one_file_resumed_without_sharding(
    folder: Path, on_two: Any, alone: Any, step: int
) -> None:
    assert_like(fit(f"{folder}/one/step={step}.ckpt"), alone)


def test_resumed_on_three_processes(folder: Path, on_two: Any, alone: Any) -> None:
    tasks = [
        {"pieces": True, "start": f"{folder}/pieces/step={step}.ckpt", "end": f"three.{step}"}
        for step in SAVED
    ]
    found = run(folder, 3, tasks)
    for step in SAVED:
        for rank in range(3):
            assert_like(found[f"three.{step}"][rank], alone)


def test_the_slim_network_is_written(folder: Path, on_two: Any) -> None:
    network = Network()
    network.load_state_dict(on_two["pieces"][0]["weights"])
    slim: Any = load_slim(folder / "pieces.safetensors", lambda: Module(sharded=False))
    assert slim.network.fc1.out_features == 2
    torch.testing.assert_close(slim(batch(0)[0]), network(batch(0)[0]))
