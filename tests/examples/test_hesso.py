"""HESSO of OTO in the benchmark: resumed, on its budget, removed as OTO itself would remove it."""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.benchmark import run as protocol
from examples.benchmark.callbacks import Checkpoint
from examples.benchmark.method_api import Pruning, Situation, counted
from examples.benchmark.methods import METHODS
from examples.benchmark.registry import DATA, NETWORKS
from examples.benchmark.suite import Run, Task, read_suite
from examples.models.lenet import SmallConvNet
from examples.models.resnet import CifarResNet
from lightning_wgsef import group_parameters, slim
from tests.helpers.benchmark_runs import WRITE, stopping

needs_oto = pytest.mark.skipif(
    importlib.util.find_spec("only_train_once") is None,
    reason="needs only_train_once: 'make oto-environment', then .venv-oto/bin/python -m pytest",
)
TASK = Task(
    name="digits", network="small-conv", data="digits", k=0.25, epochs=4, batch_size=64, lr=0.05
)
EXAMPLE = torch.zeros(2, 1, 8, 8)


@pytest.fixture(autouse=True)
def as_before() -> Any:
    yield
    torch.set_flush_denormal(False)


def test_without_the_package_suites_are_read_and_runs_say_what_they_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "only_train_once", None)
    monkeypatch.delitem(sys.modules, "examples.benchmark.baselines.hesso", raising=False)
    path = tmp_path / "small.yaml"
    path.write_text(
        "tasks: {a: {network: lenet5, data: digits, k: 1, epochs: 2}}\nmethods: [HESSO]"
    )
    suite = read_suite(str(path), {"network": NETWORKS, "data": DATA, "methods": METHODS})
    assert suite.methods == ("HESSO",)
    with pytest.raises(ModuleNotFoundError, match=r"HESSO needs .*make oto-environment"):
        METHODS["HESSO"].make(Situation(TASK, SmallConvNet(), EXAMPLE), 0.1)


@needs_oto
def test_it_keeps_the_protocol_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(replace(TASK, batch_size=60), "HESSO", 0.0, seed=3, trial=False)
    networks: list[nn.Module] = []

    def slim_(network: nn.Module, example: Tensor) -> nn.Module:
        networks.append(network)
        return slim(network, example)

    def execute() -> dict[str, Any]:
        return protocol.execute(run, tmp_path, tmp_path / "work", "cpu")

    monkeypatch.setattr(protocol, "slim", slim_)
    whole = execute()
    for epoch in (1, 2, 3):
        assert sum(alive for alive, _ in whole["alive"][epoch].values()) == whole["budget"] == 28
    assert sum(alive for alive, _ in whole["alive"][0].values()) > 28
    assert whole["slim_test_accuracy"] == pytest.approx(whole["test_accuracy"], abs=0.3)

    for epoch in (0, 2):  # in the middle of a round, and when all are over
        monkeypatch.setattr(Checkpoint, "on_train_epoch_end", stopping(epoch))
        with pytest.raises(RuntimeError, match="stop"):
            execute()
        (state,) = torch.load(tmp_path / "work" / "last.ckpt", weights_only=False)[
            "optimizer_states"
        ]
        assert any(state["active_redundant_idxes"].values()) == (epoch == 0)
        assert any(state["pruned_idxes"].values())
    monkeypatch.setattr(Checkpoint, "on_train_epoch_end", WRITE)
    resumed = execute()
    for key in ("validation", "loss", "alive", "test_accuracy", "before_freeze", "after_freeze"):
        assert resumed[key] == whole[key], key
    first, second = networks
    torch.testing.assert_close(second.state_dict(), first.state_dict(), rtol=0, atol=0)


def prepared(network: nn.Module, start: float = 0.1, steps: int = 40, **task: Any) -> Any:
    """HESSO for a network, after the optimizer of the task, and what it is in the protocol."""
    from examples.benchmark.baselines.hesso import hesso

    own = replace(TASK, weight_decay=1e-2, lr=0.1, **task)
    pruning = hesso(Situation(own, network, EXAMPLE), start)
    base = protocol.plain_optimizer(network, Run(own, "HESSO", start, 0, False), own.lr)
    return pruning, pruning.wrap(base, network, steps)


def small(weak: str = "") -> SmallConvNet:
    """24 channels, of which 6 stay; those of ``weak`` are the first that go."""
    torch.manual_seed(0)
    network = SmallConvNet((4, 8, 12))
    with torch.no_grad():
        for name in ("conv{}.weight", "norm{}.weight", "norm{}.bias") if weak else ():
            network.get_parameter(name.format(weak)).mul_(1e-6)
    return network


def train(network: nn.Module, optimizer: Any, rates: list[float], seed: int = 0) -> None:
    """One step for every learning rate."""
    generator = torch.Generator().manual_seed(seed)
    for rate in rates:
        images = torch.randn(16, 1, 8, 8, generator=generator)
        labels = torch.randint(10, (16,), generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = rate

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(network(images), labels)
            loss.backward()
            return loss

        optimizer.step(closure)


def alive(pruning: Pruning, network: nn.Module) -> dict[str, int]:
    assert pruning.groups is not None
    groups = group_parameters(network, **pruning.groups)
    return {name: count for name, (count, _) in counted(groups, pruning.groups)(network).items()}


@needs_oto
def test_before_it_prunes_it_is_the_optimizer_of_the_task() -> None:
    network, twin = small(), small()
    _, optimizer = prepared(network, start=0.5)
    assert network.training
    rates = [0.1, 0.05, 0.0, 0.02]
    train(network, optimizer, rates)
    train(twin, torch.optim.SGD(twin.parameters(), 9.0, momentum=0.9, weight_decay=1e-2), rates)
    torch.testing.assert_close(network.state_dict(), twin.state_dict())


@needs_oto
@pytest.mark.parametrize(("start", "steps"), [(0.0, 40), (0.1, 41), (0.25, 7), (0.25, 100)])
def test_it_is_sparse_after_the_last_step_of_the_first_half(start: float, steps: int) -> None:
    network = small()
    pruning, optimizer = prepared(network, start, steps)
    assert optimizer.pruning_period_duration >= 3, "shorter rounds would not shrink, but cut"
    half = int(0.5 * steps + 0.5)
    train(network, optimizer, [0.01] * (half - 1))
    assert sum(alive(pruning, network).values()) > 6
    train(network, optimizer, [0.01])
    found = alive(pruning, network)
    assert sum(found.values()) == 6
    train(network, optimizer, [0.1] * 3)
    assert alive(pruning, network) == found


@needs_oto
def test_what_it_leaves_too_much_is_cut() -> None:
    """All channels of one layer are the weakest; HESSO spares one of them."""
    network = small(weak="2")
    pruning, optimizer = prepared(network)
    train(network, optimizer, [1e-4] * 19)
    weak = optimizer.important_idxes["conv3.weight"][-1]
    with torch.no_grad():
        for parameter in (network.conv3.weight, network.norm3.weight, network.norm3.bias):
            parameter[weak] *= 1e-6
    train(network, optimizer, [1e-4])
    assert optimizer.target_num_redundant_groups == optimizer.redundant - 1 == 17
    found = alive(pruning, network)
    assert found["conv2"] == 1
    assert sum(found.values()) == 6
    assert not network.conv3.weight[weak].any()
    train(network, optimizer, [1e-2] * 3)
    assert alive(pruning, network) == found


@needs_oto
@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("at", [5, 16, 20, 22])
def test_its_state_is_all_it_needs(tmp_path: Path, kind: str, at: int) -> None:
    """Before the first round, within a round, right after the cut, and later."""
    network, again = small(weak="2"), small()
    _, optimizer = prepared(network, optimizer=kind)
    train(network, optimizer, [1e-3] * at)
    torch.save([network.state_dict(), optimizer.state_dict()], tmp_path / "state")
    train(network, optimizer, [1e-3] * 5, seed=1)
    _, resumed = prepared(again, optimizer=kind)
    weights, state = torch.load(tmp_path / "state", weights_only=False)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    train(again, resumed, [1e-3] * 5, seed=1)
    torch.testing.assert_close(again.state_dict(), network.state_dict(), rtol=0, atol=0)


@needs_oto
def test_other_memory_formats_train_alike() -> None:
    network, twin = small(), small().to(memory_format=torch.channels_last)
    for each in (network, twin):
        train(each, prepared(each)[1], [0.01] * 22)
    torch.testing.assert_close(twin.state_dict(), network.state_dict())


@needs_oto
def test_oto_would_remove_the_same(tmp_path: Path) -> None:
    from only_train_once import OTO

    network = small()
    train(network, prepared(network)[1], [0.05] * 25)
    network.eval()
    ours = slim(network, EXAMPLE)
    oto = OTO(copy.deepcopy(network), EXAMPLE)
    oto.construct_subnet(out_dir=str(tmp_path))
    theirs = torch.load(oto.compressed_model_path, weights_only=False)
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert shapes == {name: value.shape for name, value in ours.state_dict().items()}
    assert shapes["conv3.weight"].numel() < network.conv3.weight.numel()
    images = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(theirs(images), ours(images))


@needs_oto
def test_excluded_layers_stay_and_other_groups_are_refused() -> None:
    network = small()
    pruning, optimizer = prepared(network, exclude="conv2")
    train(network, optimizer, [0.01] * 20)
    found = alive(pruning, network)
    assert set(found) == {"conv1", "conv3"}
    assert sum(found.values()) == 4
    assert bool(network.conv2.weight.flatten(1).any(1).all())
    other = re.escape("OTO finds no such groups: [(4, ('conv2.weight', (1,)))")
    with pytest.raises(ValueError, match=other):
        prepared(small(), structure="channel")


@needs_oto
def test_groups_come_in_one_order() -> None:
    """Theirs depends on where objects lie in memory."""
    networks = [CifarResNet(8, channels=1, width=4) for _ in range(5)]
    orders = [[x["p_names"] for x in prepared(each)[1].param_groups] for each in networks]
    assert orders == [sorted(map(sorted, orders[0]))] * 5
    assert orders[0][0] == ["blocks.0.conv1.weight", "blocks.0.norm1.bias", "blocks.0.norm1.weight"]
