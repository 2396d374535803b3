"""Processes that start at once: where the system can fork, a server imports what they need."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing

METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
if METHOD == "forkserver":
    # torch and Lightning take seconds, which every process of its own would spend again.
    multiprocessing.get_context(METHOD).set_forkserver_preload(
        ["tests.scripts.crash", "tests.scripts.fsdp2_lightning", "tests.scripts.fsdp2_plain"]
    )


def start(work: Callable[..., None], arguments: tuple[Any, ...], count: int = 1) -> Any:
    """Start ``work(rank, *arguments)`` in processes; ``join()`` of the result waits, or raises."""
    return torch.multiprocessing.start_processes(
        work, arguments, nprocs=count, join=False, start_method=METHOD
    )


def run(work: Callable[..., None], arguments: tuple[Any, ...], count: int) -> None:
    """Run ``work(rank, *arguments)`` in processes to the end; an error in one of them is raised."""
    context = start(work, arguments, count)
    while not context.join():
        pass
