"""torch.compile around everything that can be compiled: the same steps, names and checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lightning_wgsef import WGSEF, Homotopy, WGSEFCallback, slim
from lightning_wgsef.network.layers import canonical_name
from tests.helpers.groups import batches, dense_network
from tests.helpers.plain_loops import Dense, K, Recorded, alive, assert_same, data, loss_of, sgd
from tests.helpers.trainers import make_trainer

pytestmark = [
    # torch itself meets these while it compiles an optimizer.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++")),
    reason="inductor needs a C++ compiler, and none of g++, clang++ and c++ is installed",
)
EXACT = ("eager", "aot_eager")
HOW = ("module", "inner", "inner in place", "step", "step inside optimizer_step")
# A step with a closure is slow to compile: one backend is enough.
RUNS = [
    pytest.param(
        how,
        backend,
        marks=[needs_compiler] * (backend == "inductor")
        + [pytest.mark.sweep] * (how != "inner" and backend != "eager"),
    )
    for backend in (*EXACT, "inductor")
    for how in HOW
    if how != "step" or backend == "eager"
]
STEPS, FREEZE = 8, 6
# Inductor adds numbers in another order.
ROUNDING = 1e-10


class Network(nn.Sequential):
    """The dense network with a forward of its own: torch leaves those of torch.nn uncompiled."""

    def __init__(self) -> None:
        super().__init__(*dense_network())

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs)


class Compiled(Dense):
    """Compiled in one of the ways of `HOW`; "" leaves it as it is."""

    def __init__(self, how: str, backend: str) -> None:
        super().__init__()
        self.net = Network()
        self.how, self.backend = how, backend
        self.compiled: list[Any] = []
        if how == "inner":
            self.net = torch.compile(self.net, backend=backend)
        elif how == "inner in place":
            self.net.compile(backend=backend)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = sgd(self.net)
        if self.how == "step":
            optimizer.step = torch.compile(optimizer.step, backend=self.backend)
        return optimizer

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any
    ) -> None:
        if self.how != "step inside optimizer_step":
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            return
        if not self.compiled:
            self.compiled.append(torch.compile(optimizer.optimizer.step, backend=self.backend))
        optimizer_closure()
        self.compiled[0]()


def trained(
    how: str, backend: str, folder: Path, checkpoint: Path | None = None
) -> tuple[Compiled, WGSEFCallback, Recorded, Any]:
    """Two epochs with a checkpoint between them, or the second one from a checkpoint."""
    torch._dynamo.reset()
    counters.clear()
    model = Compiled(how, backend)
    schedule = Recorded(first=0 if checkpoint is None else STEPS // 2)
    callback = WGSEFCallback(k=K, lam=schedule, freeze=FREEZE)
    saver = ModelCheckpoint(folder, every_n_train_steps=STEPS // 2, save_top_k=-1)
    trainer = make_trainer([callback, saver], enable_checkpointing=True)
    given = torch.compile(model, backend=backend) if how == "module" else model
    trainer.fit(given, data(STEPS // 2), ckpt_path=checkpoint, weights_only=True)
    assert (counters["stats"]["unique_graphs"] > 0) == (how != "")
    return model, callback, schedule, trainer


def network(model: Compiled) -> nn.Module:
    return getattr(model.net, "_orig_mod", model.net)


def renamed(path: Path, names: list[str]) -> Path:
    """A copy of a checkpoint whose weights have other names: torch keeps those of its wrapper."""
    content = torch.load(path, weights_only=True)
    own = {canonical_name(name): name for name in names}
    weights = content["state_dict"]
    content["state_dict"] = {own[canonical_name(name)]: x for name, x in weights.items()}
    torch.save(content, path.with_suffix(".renamed.ckpt"))
    return path.with_suffix(".renamed.ckpt")


def tolerance(backend: str) -> float:
    return 0.0 if backend in EXACT else ROUNDING


@pytest.mark.parametrize(("how", "backend"), RUNS)
def test_compiled_run_is_the_plain_run(how: str, backend: str, tmp_path: Path) -> None:
    plain, _, _, _ = trained("", backend, tmp_path / "plain")
    model, callback, schedule, trainer = trained(how, backend, tmp_path / "compiled")
    assert len(schedule.rates) == FREEZE - 1  # then the projection, then the mask
    assert callback.regularizer.pruners[0].taken == FREEZE
    assert_same(network(model), network(plain), tolerance(backend))
    assert [len(columns) for columns in alive(network(model))] == [K, K]

    logged = {name for name in trainer.logged_metrics if name.startswith("wgsef/net")}
    keys = ("group_sparsity", "value", "gap")
    assert logged == {f"wgsef/{layer}/{key}" for layer in ("net.2", "net.3") for key in keys}
    (middle,) = (tmp_path / "compiled").glob("*step=4.ckpt")
    state = torch.load(middle, weights_only=True)["callbacks"]["WGSEFCallback"]
    assert state["attachments"][0]["layers"] == {"net.2": 5, "net.3": 6}
    assert "_orig_mod" not in repr(state)
    # torch.compile names the weights of what it wraps; Lightning loads all others as they are.
    names = list(plain.state_dict())
    assert (list(model.state_dict()) == names) == (how != "inner")
    if backend == "aot_eager":
        return  # between the other two
    (dense,) = (tmp_path / "plain").glob("*step=4.ckpt")
    given = renamed(dense, list(model.state_dict())) if how == "inner" else dense
    resumed, _, rest, _ = trained(how, backend, tmp_path / "rest", given)
    assert len(rest.rates) == FREEZE - 1 - STEPS // 2
    assert_same(network(resumed), network(plain), tolerance(backend))
    given = renamed(middle, names) if how == "inner" else middle
    resumed, _, rest, _ = trained("", backend, tmp_path / "rest", given)
    assert len(rest.rates) == FREEZE - 1 - STEPS // 2
    assert_same(network(resumed), network(plain), tolerance(backend))


@pytest.mark.parametrize(
    ("attached", "backend"),
    [
        ("before", "eager"),
        ("after", "aot_eager"),
        pytest.param("after", "inductor", marks=needs_compiler),
    ],
)
def test_compiled_function_of_a_plain_loop(attached: str, backend: str) -> None:
    """The hooks are found, whether they were there when the function was compiled or not."""

    def run(compiled: bool) -> nn.Sequential:
        torch._dynamo.reset()
        counters.clear()
        net, schedule = dense_network(), Recorded()
        optimizer = sgd(net)
        regularizer = WGSEF(net, k=K, lam=schedule, freeze=FREEZE)

        def update() -> None:
            optimizer.step()

        first, *rest = batches(STEPS)
        if attached == "before":
            regularizer.attach(optimizer)
        step = torch.compile(update, backend=backend) if compiled else update
        loss_of(net, first).backward()
        step()
        if attached == "after":
            regularizer.attach(optimizer)
        for batch in rest:
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            step()
        assert (counters["stats"]["unique_graphs"] > 0) == compiled
        late = attached == "after"  # the first step was not seen
        assert len(schedule.rates) == FREEZE - 1
        assert regularizer.pruners[0].taken == FREEZE
        assert STEPS - late >= FREEZE
        return net

    ours, twin = run(compiled=True), run(compiled=False)
    assert_same(ours, twin, tolerance(backend))
    assert [len(columns) for columns in alive(ours)] == [K, K]


@pytest.mark.filterwarnings("ignore:no proximal step was taken")
def test_planted_faults_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that a compiled step does not call, and one that is called twice."""
    plain, _, _, _ = trained("", "eager", tmp_path)
    run = WGSEF.step
    monkeypatch.setattr(WGSEF, "step", lambda self, opt: (run(self, opt), run(self, opt)))
    model, _, schedule, _ = trained("step inside optimizer_step", "eager", tmp_path)
    with pytest.raises(AssertionError):
        assert_same(network(model), network(plain), ROUNDING)
    monkeypatch.setattr(WGSEF, "step", lambda self, optimizer: None)
    with pytest.warns(UserWarning, match="before the mask was frozen"):
        model, _, schedule, _ = trained("step inside optimizer_step", "eager", tmp_path)
    assert schedule.rates == []
    assert alive(network(model)) != alive(network(plain))


@pytest.mark.parametrize("how", ["module", "inner", "inner in place"])
def test_slim_takes_a_compiled_network(how: str) -> None:
    """Its copy is as small as that of the plain network, and returns the same."""

    def pruned(how: str) -> nn.Module:
        torch._dynamo.reset()
        model = Compiled(how, "eager")
        make_trainer([WGSEFCallback(k=K, lam=Homotopy(length=5))], max_epochs=1).fit(
            torch.compile(model, backend="eager") if how == "module" else model, data(STEPS)
        )
        return torch.compile(model, backend="eager") if how == "module" else model

    inputs = batches(1)[0][0]
    model, plain = pruned(how), pruned("")
    small, expected = slim(model, inputs), slim(plain, inputs)
    sizes = {canonical_name(name): x.shape for name, x in small.state_dict().items()}
    assert sizes == {name: x.shape for name, x in expected.state_dict().items()}
    assert sizes["net.2.weight"][1] == K
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-9, atol=1e-12)
