"""On a GPU: nothing waits, how many kernels, a CUDA graph, and the ratios of structured groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from examples.models.resnet import ResNet18
from lightning_wgsef import WGSEF, Homotopy, prox_multipliers
from tests.benchmarks.measure import Rounds, add_row, once
from tests.benchmarks.networks import grouped, weights
from tests.benchmarks.steps import HOMOTOPY, VARIANTS, floor, groups_step

pytestmark = pytest.mark.gpu
CASE = "on a GPU"
FLOOR = "_foreach_norm and _foreach_mul_"


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def finished(action: Callable[[], Any]) -> Callable[[], None]:
    """``action`` with everything that it started on the GPU."""

    def run() -> None:
        action()
        torch.cuda.synchronize()

    return run


@pytest.mark.parametrize("lam", ["homotopy", "constant"])
@pytest.mark.parametrize("kind", ["filter", "channel", "element"])
def test_nothing_waits(benchmark: Any, kind: str, lam: str) -> None:
    model = ResNet18().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    schedule = Homotopy() if lam == "homotopy" else 0.1
    regularizer = WGSEF(model, k=0.25, lam=schedule, grouping=kind, total_steps=1000)
    regularizer.attach(optimizer).detach()
    images, labels = torch.randn(8, 3, 32, 32).cuda(), torch.randint(10, (8,)).cuda()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
    regularizer.step(optimizer)  # what is made once may wait
    torch.cuda.synchronize()

    def steps() -> None:
        with waiting_is_an_error():
            for _ in range(3):
                regularizer.step(optimizer)

    once(benchmark, steps)
    add_row(
        benchmark,
        value=0,
        target=0,
        case=CASE,
        name=f"ResNet18, {kind}",
        floor="-",
        what=f'waits in WGSEF.step, {lam} (sync debug mode "error")',
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["filter", "channel"])
def test_kernels(benchmark: Any, kind: str, variant: str) -> None:
    tensors = weights("ResNet18", "cuda")
    step, least = groups_step(grouped(tensors, kind), variant), floor(tensors)
    counts = {}
    for name, action in (("step", step), ("floor", least)):
        finished(action)()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            finished(action)()
        on_gpu = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        counts[name] = sum(not event.name.startswith("Mem") for event in on_gpu)
    once(benchmark, step)
    add_row(
        benchmark,
        value=counts["step"],
        case=CASE,
        name=f"ResNet18, {kind}",
        what=f"kernels of a step, {variant}",
        floor=f"- ({FLOOR}: {counts['floor']})",
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["filter", "channel"])
def test_graph(benchmark: Any, kind: str, variant: str) -> None:
    """A captured step, replayed, does what the step does; its size is a tensor, to be changed."""
    tensors = weights("ResNet18", "cuda")
    originals = [tensor.clone() for tensor in tensors]
    groups = grouped(tensors, kind)
    settings = dict(VARIANTS[variant])
    size = torch.full_like(groups.budgets, settings.pop("step"))

    def step() -> None:
        norms = groups.norms()
        factors = prox_multipliers(norms, size, groups.budgets, **settings, **groups.competition)
        groups.scale_(factors)

    def restore() -> None:
        torch._foreach_copy_(tensors, originals)
        torch.cuda.synchronize()

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    restore()
    finished(step)()
    wanted = [tensor.clone() for tensor in tensors]
    restore()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    restore()
    finished(graph.replay)()
    for tensor, value in zip(tensors, wanted, strict=True):
        torch.testing.assert_close(tensor, value)
    actions = {"replay": finished(graph.replay), "floor": finished(floor(tensors))}
    measured = Rounds(benchmark, actions, before=restore, rounds=51)
    measured.row(
        "replay",
        "floor",
        target=1.3,
        case=CASE,
        name=f"ResNet18, {kind}",
        what=f"a step replayed as a CUDA graph, {variant}",
        floor=FLOOR,
    )


@pytest.mark.parametrize("variant", [HOMOTOPY])
@pytest.mark.parametrize("kind", ["filter", "channel"])
@pytest.mark.parametrize("network", ["ResNet18", "VGG16", "ViT-B/16"])
def test_step(benchmark: Any, network: str, kind: str, variant: str) -> None:
    tensors = weights(network, "cuda")
    originals = [tensor.clone() for tensor in tensors]
    step = groups_step(grouped(tensors, kind), variant)

    def restore() -> None:
        torch._foreach_copy_(tensors, originals)
        torch.cuda.synchronize()

    actions = {"step": finished(step), "floor": finished(floor(tensors))}
    measured = Rounds(benchmark, actions, before=restore, rounds=51)
    measured.row(
        "step",
        "floor",
        target=1.3,
        case=CASE,
        name=f"{network}, {kind}",
        what=f"norms, multipliers, scaling: {variant}",
        floor=FLOOR,
    )
