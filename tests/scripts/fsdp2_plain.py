"""Trainings whose weights FSDP2 shards over processes, and the same in one process."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_wgsef import WGSEF, Constant, CubicRamp, HalfSpace, Homotopy
from lightning_wgsef.network.sharding import unsharded_copy

STEPS = 18
FREEZE = 12  # after this step
HALF = 8  # of the steps: where a training is cut in two
BATCH = 12  # which two, three and four processes share evenly
EXAMPLE = torch.zeros(1, 3, 6, 6, dtype=torch.float64)


Share = tuple[int, int]
"""Which part of every batch a process takes, and of how many."""


class Network(nn.Module):
    """Sizes that two processes share evenly, and others that two or four do not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(1, 8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.fc1 = nn.Linear(6, 12)
        self.fc2 = nn.Linear(12, 3)
        self.double()

    def forward(self, images: Tensor) -> Tensor:
        images = torch.relu(self.norm(self.conv1(images)))
        images = torch.relu(self.conv2(images)).mean((2, 3))
        return self.fc2(torch.relu(self.fc1(images)))


HOMOTOPY = {"lam": Homotopy(length=FREEZE)}
# Weights of a channel.
COSTS = {
    "conv2": torch.full((8,), 54.0),
    "fc1": torch.full((6,), 12.0),
    "fc2": torch.full((12,), 3.0),
}
# What the regularizer is given, and how many sums over processes a step may take.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "rows": ({"grouping": "filter", **HOMOTOPY}, 1),
    "columns": ({"grouping": "channel", **HOMOTOPY}, 1),
    "single weights": ({"grouping": "element", **HOMOTOPY}, 1),
    "tiles": ({"grouping": "block:2x3", **HOMOTOPY}, 1),
    "2 of 4": ({"grouping": "2:4", **HOMOTOPY}, 1),
    "coupled": ({"grouping": "structure", "example_input": EXAMPLE, **HOMOTOPY}, 1),
    "hidden": ({"grouping": "hidden", **HOMOTOPY}, 1),
    "global": ({"k": 150, "scope": "global", "costs": COSTS, **HOMOTOPY}, 1),
    "layer_norm": ({"weights": "layer_norm", **HOMOTOPY}, 1),
    "metric": ({"metric": "auto", **HOMOTOPY}, 1),
    "constant": ({"lam": Constant(3.0), "freeze": FREEZE, "grouping": "filter"}, 1),
    "ramp": ({"k": CubicRamp(2, length=6), "lam": Constant(3.0), "freeze": FREEZE}, 1),
    # The sums of the metric, or of the half space, come on top of the norms.
    "group metric": ({"metric": "group", **HOMOTOPY}, 2),
    "metric, constant": ({"metric": "auto", "lam": Constant(0.1), "freeze": FREEZE}, 12),
    "half space": (
        {"lam": Constant(1.0), "half_space": HalfSpace(0.0, start=5), "freeze": FREEZE},
        3,
    ),
}


class Collectives(TorchDispatchMode):
    """Number of collectives while it is on.

    torch's `CommDebugMode` counts the same, and notes every other operation, too: two fifths of the
    time of these trainings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor runs it on plain tensors, and is seen doing so
        if function.namespace in ("c10d", "_c10d_functional"):
            self.count += "wait" not in function.name()
        return function(*args, **(kwargs or {}))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(BATCH, 3, 6, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 3, (BATCH,), generator=generator)


def whole(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def train(
    network: nn.Module,
    arguments: dict[str, Any],
    steps: range = range(STEPS),
    state: dict[str, Any] | None = None,
    share: Share = (0, 1),
) -> dict[str, Any]:
    """What comes of training on a share of every batch; the same on all processes."""
    number, count = share
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    budget = {} if arguments.get("grouping") == "2:4" else {"k": 2}
    regularizer = WGSEF(network, **{**budget, **arguments}).attach(optimizer)
    if state is not None:
        regularizer.load_state_dict(state)
    sums = []
    for step in steps:
        images, labels = (part.chunk(count)[number] for part in batch(step))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        with Collectives() as collectives:
            optimizer.step()
        sums.append(collectives.count)
    if torch.distributed.is_initialized():  # what happens to a copy leaves the network alone
        for value in unsharded_copy(network).parameters():
            value.data.zero_()
    return {
        "weights": {name: whole(value) for name, value in network.named_parameters()},
        "moments": {
            name: whole(optimizer.state[value]["exp_avg"])
            for name, value in network.named_parameters()
        },
        "masks": regularizer.masks,
        "frozen": regularizer.frozen,
        "sums": sums,
        "state": regularizer.state_dict(),
        "metrics": {key: float(value) for key, value in regularizer.metrics().items()},
        "printed": str(regularizer.groups),
    }


def rows(network: nn.Module, count: int) -> Share:
    mesh = init_device_mesh("cpu", (count,))
    fully_shard(network.fc1, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return mesh.get_local_rank(), count


def columns(network: nn.Module, count: int) -> Share:
    def place(parameter: nn.Parameter) -> Shard:
        by_columns = parameter.dim() > 1 and parameter.shape[1] % count == 0
        return Shard(1 if by_columns else 0)

    mesh = init_device_mesh("cpu", (count,))
    fully_shard(network, mesh=mesh, shard_placement_fn=place)
    return mesh.get_local_rank(), count


def hybrid(network: nn.Module, count: int) -> Share:
    mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("copies", "shards"))
    fully_shard(network, mesh=mesh)
    return torch.distributed.get_rank(), count


def tensor_parallel(network: nn.Module, count: int) -> Share:
    """Dense layers are shared by columns and rows, and what everyone holds is sharded again."""
    mesh = init_device_mesh("cpu", (2, count // 2), mesh_dim_names=("data", "tensor"))
    plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    parallelize_module(network, mesh["tensor"], plan)
    fully_shard(network, mesh=mesh["data"])
    return mesh["data"].get_local_rank(), 2


def ignored(network: nn.Module, count: int) -> Share:
    """One layer is left alone: every process holds it, with the mean of all gradients."""
    kept = network.fc1.weight
    mesh = init_device_mesh("cpu", (count,))
    fully_shard(network, mesh=mesh, ignored_params={kept})

    def average(parameter: Tensor) -> None:
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad.div_(count)

    kept.register_post_accumulate_grad_hook(average)
    return mesh.get_local_rank(), count


PLACEMENTS = {
    "rows": rows,
    "columns": columns,
    "hybrid": hybrid,
    "tensor parallel": tensor_parallel,
    "ignored": ignored,
}


def leave(meeting: Path, rank: int, count: int) -> NoReturn:
    """End this process at once when all have come this far: who leaves early takes others along.

    Groups and interpreter are not taken down: a process has aborted there, with all its work done.
    """
    meeting.with_name(f"{meeting.name}.left.{rank}").touch()
    while len(list(meeting.parent.glob(f"{meeting.name}.left.*"))) < count:
        time.sleep(0.01)
    os._exit(0)


def work(rank: int, count: int, tasks: list[tuple[str, str]], folder: str) -> None:
    """Everything that one group of processes is asked for: pairs of placement and case."""
    torch.set_num_threads(1)
    meeting = Path(folder) / "meeting"
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=count)
    for number, (placement, case) in enumerate(tasks):
        network = Network()
        share = PLACEMENTS[placement](network, count)
        found = train(network, CASES[case][0], share=share)
        torch.save(found, Path(folder) / f"{number}.{rank}")
    leave(meeting, rank, count)


def resumed(rank: int, count: int, case: str, folder: str) -> None:
    """Go on with the second half of a training of which ``folder`` has the first."""
    torch.set_num_threads(1)
    meeting = Path(folder) / f"meeting{count}"
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=count)
    first = torch.load(Path(folder) / "first", weights_only=True)
    network = Network()
    network.load_state_dict(first["weights"])
    share = rows(network, count)
    found = train(network, CASES[case][0], range(HALF, STEPS), first["state"], share)
    torch.save(found, Path(folder) / f"second.{count}.{rank}")
    leave(meeting, rank, count)
