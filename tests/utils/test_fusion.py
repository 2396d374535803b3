"""Arithmetic that is compiled where that pays: the same bits as operation by operation."""

import logging
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_wgsef import WGSEF, Constant, Homotopy, WGSEFCallback, prox_multipliers
from lightning_wgsef.penalties.solvers import sorting_network
from lightning_wgsef.training import group_preconditioner
from lightning_wgsef.utils import fusion

KERNELS = ("_TOTALS", "_SQUARES", "_TANGENTS", "_SCALING")
BACKENDS = [pytest.param("inductor", marks=pytest.mark.sweep), "eager"]


@pytest.fixture
def kernels(monkeypatch):
    """Everything is compiled from here on, and by nothing that was compiled before."""

    def switch(backend):
        torch._dynamo.reset()
        fused = fusion.Fused(sorting_network._multipliers, "n:m")
        monkeypatch.setattr(sorting_network, "_FUSED", fused)
        projected = fusion.Fused(sorting_network._projection, "n:m at its end")
        monkeypatch.setattr(sorting_network, "_PROJECTED", projected)
        monkeypatch.setattr(fusion, "LEAST", 0)
        monkeypatch.setattr(fusion, "CALL", 0)
        monkeypatch.setattr(group_preconditioner, "CALL", 0)
        for name in KERNELS:
            function = getattr(group_preconditioner, name).function
            monkeypatch.setattr(group_preconditioner, name, fusion.Kernel(function, name))
        if backend:
            monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
        return fused

    return switch


def awkward_norms(count, dtype=torch.float32):
    """Zeros, dead segments, ties, subnormals, and fifty orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(count, generator=generator).abs()
    norms[torch.rand(count, generator=generator) < 0.3] = 0
    norms[:1600] = torch.randint(0, 3, (1600,), generator=generator).float()
    norms[1600:3200] *= 1e-42
    norms[3200:4800] *= 10.0 ** torch.randint(-25, 25, (1600,), generator=generator)
    norms[4800:4848] = 0
    return torch.cat([torch.ones(1, dtype=dtype), norms.to(dtype)])[1:]  # at an odd place in memory


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("width", "k", "step", "dtype"),
    [
        (4, 2, 0.05, torch.float32),
        (4, 3.3, 0.9, torch.float32),  # between two budgets, and in float64
        (3, 1.5, 0.05, torch.float32),  # no power of two
        (1, 0.5, 0.05, torch.float32),
        (8, 4, 0.05, torch.float64),
        (4, 2, 1.0, torch.float32),  # the projection
        (3, 1.5, 1.0, torch.float64),
    ],
)
def test_a_kernel_gives_the_same_bits(kernels, backend, width, k, step, dtype):
    norms = awkward_norms(max(width, 2) * 2**12, dtype)
    options = {"segments": width, "debias": 1.0, "anchored": True}
    want = prox_multipliers(norms, step, k, **options)
    fused = kernels(backend)
    got = prox_multipliers(norms, step, k, **options)
    kernel = (sorting_network._PROJECTED if step == 1 else fused)._kernel
    assert kernel._compiled is not None
    assert not kernel._fails
    assert torch.equal(got, want)
    exact = prox_multipliers(
        norms.double(), step, k, **options, weights=torch.ones_like(norms.double())
    )
    ordinary = torch.ones_like(norms, dtype=torch.bool)
    ordinary[1600:3200] = False  # subnormal numbers have few digits
    torch.testing.assert_close(got.double()[ordinary], exact[ordinary], rtol=0, atol=2e-6)


def trained(steps=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = WGSEF(model, lam=Homotopy(1e-2), grouping="2:4", total_steps=100)
    regularizer.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 128)).square().mean().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_training_compiles_what_is_large_and_says_so(kernels, caplog):
    want = trained()  # small: nothing is compiled
    assert sorting_network._FUSED._kernel._compiled is None
    fused = kernels("eager")
    with caplog.at_level(logging.INFO, "lightning_wgsef"):
        assert torch.equal(trained(), want)
    assert fused._kernel._compiled is not None
    assert [record.message for record in caplog.records if "compiled in" in record.message]
    assert len(caplog.records) == 1  # once, for two layers of different sizes


def test_where_nothing_can_be_compiled_the_steps_are_the_same(kernels, monkeypatch, caplog):
    want = trained()
    fused = kernels(None)
    with torch._dynamo.config.patch(disable=True):
        assert torch.equal(trained(), want)
    assert fused._kernel._compiled is None

    def no_compiler(function, **_):
        def compiled(*_):
            raise RuntimeError("no compiler")

        return compiled

    monkeypatch.setattr(torch, "compile", no_compiler)
    with caplog.at_level(logging.INFO, "lightning_wgsef"):
        assert torch.equal(trained(), want)
    assert fused._kernel._fails
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_inside_of_what_is_compiled_nothing_is_compiled_again(kernels):
    norms = torch.rand(4 * 2**12)
    fused = kernels(None)
    others = torch.ones(2, 3), torch.tensor([0.1, 1.0, 1.1, 1.0, 1e-37]), 2

    def step(norms):
        return fused(norms, *others, work=2**40)

    compiled = torch.compile(step, backend="eager")(norms.view(-1, 4))
    monkeyed = fusion.Fused(sorting_network._multipliers, "n:m")
    alone = monkeyed(
        norms.view(-1, 4), torch.ones(2, 3), torch.tensor([0.1, 1.0, 1.1, 1.0, 1e-37]), 2, work=-1
    )
    assert torch.equal(compiled, alone)
    assert fused._kernel._compiled is None


def trained_in_metric(grouping, lam, debias=0.0, metric="auto", steps=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten())
    model = model.append(nn.Linear(96, 3)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=0.1)
    regularizer = WGSEF(model, 0.4, lam, grouping, metric=metric, debias=debias, total_steps=9)
    regularizer.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 2, 6, 6).double()).square().mean().backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize(
    ("backend", "grouping"),
    [
        pytest.param("inductor", "filter", marks=pytest.mark.sweep),
        pytest.param("inductor", "channel", marks=pytest.mark.sweep),
        ("eager", "channel"),
    ],
)
def test_kernels_of_a_metric_step_as_operation_by_operation(kernels, backend, grouping):
    """Sums come in another order: the same to the last digits, and to the bit when run again."""
    cases = [(Constant(0.3), 0.0), (Constant(0.3), 0.5), (Homotopy(length=6), 1.0)]
    cases += [(Constant(0.3), 0.5, "group")]
    want = [trained_in_metric(grouping, *case) for case in cases]
    kernels(backend)
    got = [trained_in_metric(grouping, *case) for case in cases]
    for name in KERNELS:
        kernel = getattr(group_preconditioner, name)
        assert kernel._compiled is not None
        assert not kernel._fails
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)
    assert torch.equal(trained_in_metric(grouping, *cases[1]), got[1])


def test_a_metric_that_cannot_be_compiled_steps_operation_by_operation(kernels, monkeypatch):
    want = trained_in_metric("filter", Constant(0.3))
    kernels(None)

    def no_compiler(function, **_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", no_compiler)
    assert torch.equal(trained_in_metric("filter", Constant(0.3)), want)
    assert group_preconditioner._TANGENTS._fails  # the first; others are not tried


class Regression(pl.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64))

    def training_step(self, batch):
        return self.network(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fitted(folder, ckpt_path=None, **arguments):
    """Train, with a checkpoint after every epoch of four steps."""
    data = DataLoader(TensorDataset(torch.linspace(-1, 1, 64).view(8, 8)), batch_size=2)
    model, callback = Regression(), WGSEFCallback(**arguments)
    saving = pl.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=4, save_top_k=-1, enable_version_counter=False
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=3, callbacks=[callback, saving], **quiet)
    trainer.fit(model, data, ckpt_path=ckpt_path)
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "arguments",
    [
        {"grouping": "2:4", "lam": Homotopy(1e-2)},
        {"grouping": "2:4"},  # a ramp of six steps: all of them are projections
        {"grouping": "channel", "k": 0.5, "lam": Constant(0.3), "metric": "auto"},
    ],
    ids=["2:4", "2:4 by projections", "metric"],
)
def test_a_resumed_run_with_kernels_has_the_same_bits(kernels, tmp_path, arguments):
    fused = kernels("inductor")
    whole = fitted(tmp_path, **arguments)
    used = group_preconditioner._TANGENTS
    if arguments["grouping"] == "2:4":
        used = (fused if "lam" in arguments else sorting_network._PROJECTED)._kernel
    if used._fails:
        pytest.skip("no compiler")
    assert used._compiled is not None
    assert torch.equal(fitted(tmp_path, tmp_path / "step=4.ckpt", **arguments), whole)
