"""The metric an optimizer steps in, against the steps that torch's optimizers really take."""

from __future__ import annotations

import importlib
import re

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from lightning_wgsef.training import preconditioners as preconditioners
from lightning_wgsef.training.preconditioners import preconditioner, register_preconditioner
from tests.helpers.groups import raises_naming

SHAPE = (5, 4)
STEPS = 8  # RAdam rectifies from its sixth step on
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6}
# In float32, torch's capturable steps lose digits of 1 - beta2^t, and RAdam's still more.
CAPTURED_TOLERANCE = {Adam: 3e-5, AdamW: 3e-5, NAdam: 3e-5, RAdam: 0.01}
# A large eps, so that it matters where it is added.
BASIC = {kind: {"eps": 0.1} for kind in (Adam, NAdam, RAdam, Adamax, Adagrad, RMSprop)}
BASIC[AdamW] = {"eps": 0.1, "weight_decay": 0.1}
DECOUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": True}
AMSGRAD = {"amsgrad": True, "betas": (0.5, 0.6)}  # forgets fast: the largest is not the latest
TENSORS = {"lr": torch.tensor(0.5), "betas": (torch.tensor(0.9), torch.tensor(0.99))}
EVERYWHERE = [{}, {"foreach": True}, {"foreach": False}, {"weight_decay": 0.1}, {"maximize": True}]
TENSOR_RATE = [{"lr": torch.tensor(0.5), "foreach": False}]
CAPTURABLE = [{"capturable": True, "foreach": foreach} for foreach in (False, True)]
CAPTURED_RATE = [{"lr": torch.tensor(0.5), **more} for more in CAPTURABLE]
FUSED = [{"fused": True}, {"fused": True, "weight_decay": 0.1}, {"fused": True, **TENSORS}]
AMSGRADS = [{**AMSGRAD, **more} for more in ({}, {"foreach": True}, {"fused": True}, *CAPTURABLE)]
TENSOR_BETAS = [{**TENSORS, "foreach": False}, *({**TENSORS, **more} for more in CAPTURABLE)]
ADAM = [*EVERYWHERE, *TENSOR_RATE, *CAPTURABLE, *CAPTURED_RATE, *FUSED, *AMSGRADS, *TENSOR_BETAS]
FAST = [{"betas": (0.8, beta)} for beta in (0.95, 0.6, 0.5, 0.0)]  # RAdam: the last never rectify
VARIANTS = {
    Adam: [*ADAM, *FAST],
    AdamW: ADAM,
    NAdam: [*EVERYWHERE, *TENSOR_RATE, *CAPTURABLE, *CAPTURED_RATE, DECOUPLED, *FAST],
    RAdam: [*EVERYWHERE, *TENSOR_RATE, *CAPTURABLE, *CAPTURED_RATE, DECOUPLED, *FAST],
    Adamax: [*EVERYWHERE, *TENSOR_RATE, *CAPTURABLE, *CAPTURED_RATE, *FAST],
    Adagrad: [
        *EVERYWHERE,
        *TENSOR_RATE,
        {"lr_decay": 0.3},
        {"lr_decay": 0.3, "foreach": True},
        {"lr_decay": 0.3, "fused": True},
        {"fused": True},
        {"initial_accumulator_value": 0.5},
    ],
    RMSprop: [
        *EVERYWHERE,
        *TENSOR_RATE,
        *CAPTURABLE,
        *CAPTURED_RATE,
        {"centered": True},
        {"alpha": 0.5},
        {"momentum": 0.7},
        {"momentum": 0.7, "centered": True, "foreach": True},
        *({"centered": True, **more} for more in CAPTURABLE),
    ],
}


def named(case):
    kind, options = case
    text = ",".join(f"{name}={value}" for name, value in options.items())
    return f"{kind.__name__}({re.sub(r'[^=,.0-9A-Za-z_]', '', text)})"


CASES = [(kind, options) for kind, variants in VARIANTS.items() for options in variants]
every_case = pytest.mark.parametrize("case", CASES, ids=named)


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request, monkeypatch):
    """The type of the parameter and, being the default, of numbers of steps.

    Torch refuses capturable on the CPU, where nothing is to be gained; it computes the same there.
    """
    for kind in (Adam, NAdam, RAdam, Adamax, RMSprop):
        module = importlib.import_module(kind.__module__)
        allow = lambda supports_xla=True: ["cpu"]  # noqa: E731
        monkeypatch.setattr(module, "_get_capturable_supported_devices", allow)
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def moved(value, where):
    """Tensors of another type or on another device, also in tuples; the rest as it is."""
    if isinstance(value, tuple):
        return tuple(moved(part, where) for part in value)
    return value.to(where) if isinstance(value, Tensor) else value


def made(case, dtype=torch.float32):
    kind, options = case
    options = {n: moved(value, dtype) for n, value in ({"lr": 0.5} | BASIC[kind] | options).items()}
    random = torch.Generator().manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(SHAPE, generator=random, dtype=dtype))
    return weights, kind([weights], **options), random


def stepped(case, dtype=torch.float32, steps=STEPS):
    """Take steps; yields after each the parameter and the momentum that were before it."""
    weights, optimizer, random = made(case, dtype)
    for _ in range(steps):
        before = weights.detach().clone()
        momentum = optimizer.state[weights].get("momentum_buffer", torch.zeros(())).clone()
        weights.grad = torch.randn(SHAPE, generator=random, dtype=dtype)
        weights.grad[0, 0] = 0  # its state stays zero
        optimizer.step()
        yield weights, optimizer, before, momentum


def expected_change(kind, weights, optimizer, before, momentum, metric):
    """-lr m / D, with m by the papers' and torch's own words from the first moment."""
    (group,), state = optimizer.param_groups, optimizer.state[weights]
    lr, t, decay = float(group["lr"]), float(state["step"]), group["weight_decay"]
    decoupled = group.get("decoupled_weight_decay", False)
    gradient = -weights.grad if group["maximize"] else weights.grad
    gradient = gradient if decoupled else gradient + decay * before
    if kind is Adagrad:
        direction = gradient
    elif kind is RMSprop:
        direction = gradient + group["momentum"] * momentum * metric
    elif kind is NAdam:
        beta, decays = group["betas"][0], group["momentum_decay"]
        now, after = (beta * (1 - 0.5 * 0.96 ** (s * decays)) for s in (t, t + 1))
        product = float(state["mu_product"])
        direction = gradient * (1 - now) / (1 - product)
        direction = direction + state["exp_avg"] * after / (1 - product * after)
    else:
        direction = state["exp_avg"] / (1 - float(group["betas"][0]) ** t)
    return -lr * (direction / metric + (decay * before if decoupled else 0))


def metric_of(weights, optimizer):
    (group,) = optimizer.param_groups
    return preconditioner(optimizer)(optimizer.state[weights], group)


@every_case
def test_every_step_is_the_direction_over_the_metric(case, dtype):
    captured = case[1].get("capturable", False) and dtype == torch.float32
    allowed = CAPTURED_TOLERANCE.get(case[0], 1e-6) if captured else TOLERANCE[dtype]
    for weights, optimizer, before, momentum in stepped(case, dtype):
        metric = metric_of(weights, optimizer)
        assert metric.shape == SHAPE
        assert metric.dtype == dtype
        assert bool((metric > 0).all())
        state = optimizer.state[weights].values()
        assert metric.data_ptr() not in [value.data_ptr() for value in state]  # may be changed
        change = weights.detach() - before
        expected = expected_change(case[0], weights, optimizer, before, momentum, metric)
        error = (change - expected).abs().max()
        rounding = torch.finfo(dtype).eps * weights.detach().abs().max()
        assert float(error) <= allowed * float(expected.abs().max()) + float(rounding)


@every_case
def test_slices_of_the_state_give_slices_of_the_metric(case, dtype):
    *_, (weights, optimizer, _, _) = stepped(case, dtype, steps=7)
    state, (group,) = optimizer.state[weights], optimizer.param_groups
    metric = metric_of(weights, optimizer)
    for part in ((slice(1, 3),), (slice(None), slice(0, 4, 2)), (torch.tensor([4, 0]),)):
        sliced = {n: v[part] if v.shape == weights.shape else v for n, v in state.items()}
        assert torch.equal(preconditioner(optimizer)(sliced, group), metric[part])


@every_case
def test_numbers_on_an_accelerator_stay_there(case, dtype, monkeypatch):
    """On the meta device nothing can be read; and the arithmetic of tensors gives the same."""
    *_, (weights, optimizer, _, _) = stepped(case, dtype)
    both = optimizer.state[weights], optimizer.param_groups[0]
    both = ({n: moved(v, "meta") for n, v in settings.items()} for settings in both)
    found = preconditioner(optimizer)(*both)
    assert (found.device.type, found.shape, found.dtype) == ("meta", SHAPE, dtype)
    for weights, optimizer, _, _ in stepped(case, dtype):
        monkeypatch.setattr(preconditioners, "_readable", lambda tensor: True)
        by_numbers = metric_of(weights, optimizer)
        monkeypatch.setattr(preconditioners, "_readable", lambda tensor: False)
        torch.testing.assert_close(metric_of(weights, optimizer), by_numbers, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", BASIC)
def test_low_precision_is_computed_in_float32(kind):
    *_, (weights, optimizer, _, _) = stepped((kind, {}), torch.bfloat16)
    state, (group,) = optimizer.state[weights], optimizer.param_groups
    wide = {n: v.float() for n, v in state.items()}
    metric = metric_of(weights, optimizer)
    assert metric.dtype == torch.float32
    assert torch.equal(metric, preconditioner(optimizer)(wide, group))


@pytest.mark.parametrize("kind", BASIC)
@pytest.mark.parametrize("step", [0, 7, torch.tensor(0.0), torch.tensor(7.0)])
def test_the_metric_of_empty_state_is_positive(kind, step, monkeypatch):
    """Cleared moments; and a first step that a grad scaler skipped, on an accelerator."""
    monkeypatch.setattr(preconditioners, "_readable", lambda tensor: False)
    *_, (weights, optimizer, _, _) = stepped((kind, {}))
    zeros = {n: torch.zeros_like(v) for n, v in optimizer.state[weights].items()}
    metric = preconditioner(optimizer)({**zeros, "step": step}, optimizer.param_groups[0])
    assert bool((torch.isfinite(metric) & (metric > 0)).all())


def test_rounding_below_zero_gives_eps():
    _, optimizer, _ = made((RMSprop, {"centered": True}))
    state = {"step": 2, "square_avg": torch.tensor([0.09]), "grad_avg": torch.tensor([0.31])}
    metric = preconditioner(optimizer)(state, optimizer.param_groups[0])
    torch.testing.assert_close(metric, torch.tensor([0.1]))


def test_sgd_is_the_identity():
    assert preconditioner(SGD([torch.nn.Parameter(torch.ones(1))], lr=1, momentum=0.9)) is None


def test_an_unknown_optimizer_warns_once_and_is_the_identity():
    Mine, Other = (type(name, (Rprop,), {}) for name in ("Mine", "Other"))  # noqa: N806
    weights = [torch.nn.Parameter(torch.ones(1))]
    with pytest.warns(UserWarning, match=r"Mine.*'identity'.*register_preconditioner\(Mine, ") as w:
        assert preconditioner(Mine(weights)) is None
    assert len(w) == 1
    assert preconditioner(Mine(weights)) is None  # warnings are errors here
    with pytest.warns(UserWarning, match="Other"):
        assert preconditioner(Other(weights)) is None


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(preconditioners, "_ADAPTERS", dict(preconditioners._ADAPTERS))


@pytest.mark.usefixtures("registry")
def test_a_subclass_is_its_base_until_it_has_its_own():
    class Mine(AdamW):
        pass

    weights = [torch.nn.Parameter(torch.ones(1))]
    assert preconditioner(Mine(weights)) is preconditioner(Adam(weights))
    own = lambda state, group: state["exp_avg_sq"]  # noqa: E731
    register_preconditioner(Mine, own)
    assert preconditioner(Mine(weights)) is own
    assert preconditioner(AdamW(weights)) is preconditioner(Adam(weights)) is not own
    register_preconditioner(Mine, None)
    assert preconditioner(Mine(weights)) is None


WRONG_CLASSES = [int, "Adam", None, Adam([torch.nn.Parameter(torch.ones(1))])]
WRONG = [("optimizer", wrong, None, wrong) for wrong in WRONG_CLASSES]
WRONG += [("adapter", Optimizer, wrong, wrong) for wrong in (1.0, "identity", torch.ones(1))]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(("name", "optimizer", "adapter", "wrong"), WRONG)
def test_only_classes_of_optimizers_and_functions_are_registered(name, optimizer, adapter, wrong):
    with raises_naming(name, repr(wrong), "must be a"):
        register_preconditioner(optimizer, adapter)
