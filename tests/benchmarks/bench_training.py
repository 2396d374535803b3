"""What share of a training step the proximal step adds."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from examples.models.resnet import CifarResNet, ResNet18
from lightning_wgsef import WGSEF, Homotopy
from tests.benchmarks.measure import Rounds
from tests.benchmarks.networks import ViT, vgg16

BATCH = 128
BLOCKS = 1
CASES = {
    "ResNet18": (ResNet18, 32, 4),
    "VGG16": (vgg16, 32, 4),
    f"ViT-B/16, {BLOCKS} of its 12 blocks": (lambda: ViT(BLOCKS), 224, 3),
}


@pytest.mark.parametrize("network", CASES)
def test_share(benchmark: Any, network: str) -> None:
    make, pixels, rounds = CASES[network]
    torch.manual_seed(0)
    model = make()
    images, labels = torch.randn(BATCH, 3, pixels, pixels), torch.randint(10, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    regularizers = {}
    for kind in ("filter", "channel"):
        regularizer = WGSEF(
            model, k=0.25, lam=Homotopy(), grouping=kind, total_steps=10_000
        ).attach(optimizer)
        regularizer.detach()  # its steps are taken by hand
        regularizers[kind] = regularizer

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    train()  # a warm-up, and the proximal step asks for gradients
    actions = {
        kind: lambda regularizer=regularizer: regularizer.step(optimizer)
        for kind, regularizer in regularizers.items()
    }
    measured = Rounds(benchmark, {"training": train, **actions}, rounds=rounds, warmup=0)
    for kind in actions:
        measured.row(
            kind,
            "training",
            target=0.05,
            case="share of a training step",
            name=f"{network}, {kind}",
            what=f"WGSEF.step with the homotopy, {pixels}x{pixels} images",
            floor=f"forward, backward, SGD step at batch {BATCH}",
            note=(
                "All 12 blocks of ViT-B do not fit in the time of one run. Both sides grow with "
                "the number of blocks: one has nearly the share of twelve."
            )
            if network.startswith("ViT")
            else "",
        )


def test_share_of_one_budget_of_operations(benchmark: Any) -> None:
    """What is added where importances are measured and the slim network is counted every step."""
    torch.manual_seed(0)
    model = CifarResNet(20)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    options = {"grouping": "structure", "example_input": images[:2], "scope": "global"}
    regularizers = {}
    for weights in ("layer_norm", "taylor"):
        regularizer = WGSEF(
            model, k=0.5, costs="flops", weights=weights, total_steps=10_000, **options
        ).attach(optimizer)
        regularizer.detach()  # its steps are taken by hand
        regularizers[weights] = regularizer

    def train() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    def prune(regularizer: WGSEF) -> None:
        regularizer.before_step(optimizer)
        regularizer.step(optimizer)

    train()  # a warm-up, and the proximal step asks for gradients
    actions = {name: partial(prune, own) for name, own in regularizers.items()}
    measured = Rounds(benchmark, {"training": train, **actions}, rounds=7, warmup=1)
    for name in actions:
        measured.row(
            name,
            "training",
            target=0.02,
            case="share of a training step",
            name=f"ResNet20, one budget of FLOPs, {name}",
            what="WGSEF.step with the homotopy, costs='flops', scope='global'",
            floor=f"forward, backward, SGD step at batch {BATCH}",
        )
