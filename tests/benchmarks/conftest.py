"""`make bench`: marks, what the machine is, and what was not run and why."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

PACKAGES = (
    "lightning-wgsef",
    "numpy",
    "pytest-benchmark",
    "pytorch-lightning",
    "torch",
    "torchao",
)
LARGE_NEEDS = 12 * 2**30
_not_run: list[dict[str, str]] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    _give_memory_back()
    free = memory("MemAvailable")
    if item.get_closest_marker("large") and free < LARGE_NEEDS:
        pytest.skip(f"10^8 numbers need 12 GiB of free memory, {free / 2**30:.1f} are")


def pytest_runtest_teardown(item: pytest.Item) -> None:
    _give_memory_back()


def _give_memory_back() -> None:
    """What earlier tests used, to the system; malloc is told to keep it (see the Makefile)."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.passed:
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
    last = reason.strip().splitlines()[-1] if reason.strip() else ""
    name = report.nodeid.partition("benchmarks/")[2]
    _not_run.append(
        {"name": name, "outcome": report.outcome, "reason": last.removeprefix("Skipped: ")}
    )


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, str]:
    """Instead of the plugin's own, which calls git."""
    return {"project": "lightning-wgsef"}


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    cpu = output_json["machine_info"].get("cpu", {}).get("brand_raw", platform.processor())
    output_json["made_on"] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory("MemTotal") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")},
        "versions": {"python": platform.python_version(), **dict(_versions())},
    }
    output_json["not_run"] = _not_run


def _versions() -> Iterator[tuple[str, str]]:
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            yield name, "not installed"


def memory(field: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
