"""What every grouping finds in well-known architectures, as a table.

python -m tests.benchmarks.tables.groupings

The networks are those of `tests/helpers/networks/real.py`, small, and ViT-B/16 and ResNet50 in
full size, with random weights.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import nn

from lightning_wgsef import Groups
from lightning_wgsef.groupings.registry import find_groups
from lightning_wgsef.groupings.removability import zero_invariance
from tests.helpers.networks.real import NETWORKS, Example, real_network

GROUPINGS = ("filter", "channel", "structure", "head", "hidden", "layer", "2:4")
HEADER = ("network", "grouping", "groups", "sets", "left out", "zero-invariant sets", "seconds")
FILE = Path(__file__).parents[1] / "results" / "groupings.md"
INTRODUCTION = """# Groupings of well-known architectures

Made by `python -m tests.benchmarks.tables.groupings`. A set is what competes for one budget: a
layer, or several whose channels are tied. Left out are layers that cannot be grouped and those
that are left out by rule, such as the classifier's outputs. Zero-invariant are sets whose zero
groups can be taken out without changing the outputs; single weights do not claim to be. Seconds are
those to build the groups on one thread. There is no row where a network has nothing of the kind. A
row with an error has no numbers.
"""


def networks() -> Iterator[tuple[str, nn.Module, Example]]:
    """Name, network and example input."""
    for name in NETWORKS:
        yield name, *real_network(name)
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    for name, kind in (("ViT-B/16, full size", "ViT"), ("ResNet50, full size", "ResNet")):
        config = getattr(transformers, f"{kind}Config")()
        yield name, getattr(transformers, f"{kind}ForImageClassification")(config), image


def row(name: str, network: nn.Module, example: Example, grouping: str) -> list[str]:
    """What the grouping finds, without what is left out by rule; empty for nothing at all."""
    try:
        start = time.perf_counter()
        found = find_groups(network, grouping, example)
        seconds = time.perf_counter() - start
    except ValueError as error:
        return [name, grouping, *["-"] * 4, f"error: {error}"]
    kept = Groups([layer for layer in found.layers if not layer.reserved])
    left_out = len(found.left_out) + len(found.layers) - len(kept.layers)
    if not kept.layers and not left_out:
        return []
    counts = [str(len(kept)), str(len(kept.layers)), str(left_out)]
    return [name, grouping, *counts, invariant(network, kept, example), f"{seconds:.2f}"]


def invariant(network: nn.Module, groups: Groups, example: Example) -> str:
    """How many sets are zero-invariant, of how many."""
    try:
        causes = zero_invariance(network, groups, example)
    except ValueError as error:
        return f"error: {error}"
    if not causes:
        return "-"
    return f"{sum(not cause for cause in causes.values())} of {len(groups.layers)}"


def line(cells: list[str]) -> str:
    """A row of the table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    """Print the table and write it."""
    torch.set_num_threads(1)
    lines = [line(list(HEADER)), line(["---"] * len(HEADER))]
    print("\n".join(lines))
    for name, network, example in networks():
        for grouping in GROUPINGS:
            if cells := row(name, network, example, grouping):
                lines.append(line(cells))
                print(lines[-1], flush=True)
    FILE.write_text("\n".join([INTRODUCTION, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
