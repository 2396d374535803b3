"""Runs that are compiled, rounded, spread over processes, started and logged in every way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wgsef import Constant, WGSEFCallback
from tests.helpers.groups import batches, dense_network
from tests.helpers.plain_loops import (
    LAM,
    Dense,
    K,
    alive,
    assert_same,
    data,
    fit,
    loss_of,
    sgd,
    single,
    slow_loop,
)
from tests.helpers.trainers import NAMESPACES, loader, make_module, make_trainer, namespace
from tests.helpers.trainers import alive as still_alive


class Compiled(Dense):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.automatic_optimization = what != "optimizer"
        self.compiled: list[Any] = []
        if what == "network":  # in a list: no second name for the parameters
            self.compiled = [torch.compile(self.net, backend="eager")]
        elif what == "module":
            self.net = torch.compile(self.net, backend="eager")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        net = self.compiled[0] if self.what == "network" else self.net
        loss = loss_of(net, batch)
        if self.what == "optimizer":
            optimizer = self.optimizers(use_pl_optimizer=False)
            self.compiled = self.compiled or [torch.compile(optimizer.step, backend="eager")]
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.compiled[0]()
        return loss


# torch itself meets these while it compiles an optimizer.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")
@pytest.mark.parametrize("what", ["network", "module", "optimizer"])
def test_compiled_network_module_and_optimizer(what: str) -> None:
    model = Compiled(what)
    schedule, _ = fit(model, 8)
    assert len(schedule.rates) == 8
    net = model.net._orig_mod if what == "module" else model.net
    assert_same(net, slow_loop(single(8)))


def test_bfloat16_shrinkage_is_not_lost() -> None:
    """Every step shrinks by less than half a unit in the last place of a bfloat16 weight."""

    class Still(Dense):
        def __init__(self) -> None:
            super().__init__(torch.float32)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net.parameters(), lr=1e-3)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0 * super().training_step(batch, batch_idx)  # only the penalty moves weights

    model = Still()
    before = model.net[2].weight.detach().bfloat16().double()
    callback = WGSEFCallback(
        k=5, lam=Constant(1.0), freeze=None, include="net.2"
    )  # all fit: a pure ridge
    trainer = make_trainer([callback], max_epochs=1, precision="bf16-true")
    trainer.fit(model, data(150, torch.float32))
    after = model.net[2].weight.detach()
    assert after.dtype == torch.bfloat16
    assert callback.regularizer.pruners[0].taken == 150
    half_a_unit = torch.finfo(torch.bfloat16).eps / 4
    assert half_a_unit > 1e-3  # each step alone is rounded away
    factor = after.double().norm() / before.norm()
    # What waits is less than four units in the last place; rounding is unbiased.
    assert factor.item() == pytest.approx((1 / 1.001) ** 150, rel=4 * torch.finfo(after.dtype).eps)


class Joint(Dense):
    """Every process reads its half of each batch, and writes what it has in the end to a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def train_dataloader(self) -> DataLoader:
        inputs, targets = (torch.cat(parts) for parts in zip(*batches(4), strict=True))
        mine = slice(self.global_rank, None, self.trainer.world_size)
        part = TensorDataset(inputs[mine], targets[mine])
        return DataLoader(part, batch_size=16 // self.trainer.world_size)

    def on_train_end(self) -> None:
        (callback,) = (c for c in self.trainer.callbacks if isinstance(c, WGSEFCallback))
        (part,) = callback.regularizer.pruners
        state = {"net": self.net.state_dict(), "taken": part.taken, "masks": part.masks}
        torch.save(state, self.folder / f"{self.global_rank}.pt")


def joint_loop() -> nn.Sequential:
    """Five proximal steps, the projection onto K columns, and two steps with that mask."""
    net = dense_network()
    optimizer = sgd(net)
    masks: dict[int, Tensor] = {}

    @torch.no_grad()
    def mask(net: nn.Sequential) -> None:
        for layer in (2, 3):
            weight = net[layer].weight
            if layer not in masks:
                norms = weight.norm(dim=0)
                masks[layer] = torch.zeros_like(norms).index_fill(0, norms.topk(K).indices, 1)
                optimizer.state[weight]["momentum_buffer"].mul_(masks[layer])
            weight.mul_(masks[layer])

    steps = single(4) + single(4)
    slow_loop(steps[:5], net, optimizer)
    return slow_loop(steps[5:], net, optimizer, mask)


@pytest.mark.sweep
def test_ddp_spawn_does_what_one_process_does(tmp_path: Path) -> None:
    """Two epochs under ddp_spawn: the same weights on both, those of the joint batches."""

    def train(folder: Path, **arguments: Any) -> nn.Sequential:
        folder.mkdir()
        model = Joint(folder)
        callback = WGSEFCallback(k=K, lam=Constant(LAM), freeze=6)
        trainer = make_trainer([callback], use_distributed_sampler=False, **arguments)
        trainer.fit(model)
        return model.net

    net = train(tmp_path / "two", strategy="ddp_spawn", devices=2)
    first, second = (
        torch.load(tmp_path / "two" / f"{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert first["taken"] == second["taken"] == 6
    for name, value in net.state_dict().items():
        assert torch.equal(value, first["net"][name]), name  # it came back from the process
        assert torch.equal(value, second["net"][name]), name
    for name, mask in first["masks"].items():
        assert torch.equal(mask, second["masks"][name]), name
    assert [len(columns) for columns in alive(net)] == [K, K]
    assert_same(net, train(tmp_path / "one"))
    assert_same(net, joint_loop())


CLI = """
model: {}
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
"""
AS_LIST = """
    - class_path: lightning_wgsef.WGSEFCallback
      init_args: {k: 0.25, grouping: channel, include: [conv2, fc]}
"""
SINGLE = """
    class_path: lightning_wgsef.WGSEFCallback
    init_args: {k: 0.25, grouping: channel, include: [conv2, fc]}
"""


# Lightning calls the parser of its command line in a way that is deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NAMESPACES)
@pytest.mark.parametrize("callbacks", [AS_LIST, SINGLE], ids=["list", "single"])
def test_callback_from_a_configuration_file(
    name: str, callbacks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class WithData(type(make_module(name))):
        def train_dataloader(self) -> Any:
            return loader()

    (tmp_path / "config.yaml").write_text(CLI + callbacks)
    line = ["program", "fit", "--config", str(tmp_path / "config.yaml")]
    monkeypatch.setattr("sys.argv", line)
    command = namespace(f"{name}.cli").LightningCLI(WithData, save_config_callback=None)
    (callback,) = (c for c in command.trainer.callbacks if isinstance(c, WGSEFCallback))
    assert still_alive(command.model) == {"conv2": 2, "fc": 3}
    assert callback.regularizer.pruners[0].taken == 20


class Validated(Dense):
    """The weights that validation sees before training and after every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.net[2].weight.detach().clone())

    def val_dataloader(self) -> Any:
        return data(2)


@pytest.mark.filterwarnings("ignore:.*barebones")
@pytest.mark.parametrize(
    ("arguments", "steps", "validations"),
    [
        ({"logger": False, "num_sanity_val_steps": 2}, 6, 4),
        ({"fast_dev_run": 3}, 3, 2),
        ({"barebones": True}, 6, 2),
    ],
    ids=["sanity check", "fast_dev_run", "barebones"],
)
def test_same_weights_whatever_is_logged(arguments: dict, steps: int, validations: int) -> None:
    """The same weights, whatever else the Trainer does or leaves out."""
    if "barebones" in arguments:
        off = ("enable_checkpointing", "logger", "enable_progress_bar", "enable_model_summary")
        arguments = {**arguments, **dict.fromkeys(off)}
    model = Validated()
    schedule, _ = fit(model, 6, **arguments)
    twin = slow_loop(single(steps))
    assert len(schedule.rates) == steps
    assert_same(model.net, twin)
    assert len(model.seen) == validations
    if "num_sanity_val_steps" in arguments:
        assert torch.equal(model.seen[0], Dense().net[2].weight)
    torch.testing.assert_close(model.seen[-1], twin[2].weight.detach(), rtol=1e-9, atol=1e-12)
