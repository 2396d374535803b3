"""Run as a script: how much memory a step on single weights takes, in multiples of the vector."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from lightning_wgsef import prox_multipliers
from tests.benchmarks.bench_elements import elements, vector
from tests.benchmarks.steps import HOMOTOPY, VARIANTS, groups_step


def status(field: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def function_step(values: torch.Tensor) -> None:
    """The step without `Groups`."""
    values.mul_(prox_multipliers(values.abs(), k=len(values) // 10, **VARIANTS[HOMOTOPY]))


def main(kind: str, size: int) -> None:
    """Print the extra memory that ``kind`` (see ``WEIGHED``) takes at ``size`` numbers."""
    warm = vector(10**6)  # libraries and threads take their memory now
    function_step(warm)
    groups_step(elements(warm), HOMOTOPY)()
    values = vector(size)
    action = {
        "function": lambda: function_step(values),
        "groups": lambda: elements(values),
        "kept": lambda: elements(values),
    }.get(kind) or groups_step(elements(values), HOMOTOPY)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is that of now
    before = status("VmRSS")
    kept = action()
    after = status("VmRSS" if kind == "kept" else "VmHWM")
    del kept
    print(json.dumps({"vectors": (after - before) / (values.numel() * values.element_size())}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
