"""A BatchNorm network whose filters start with equal norms: no winner is given, none must fade."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from examples.benchmark.baselines.classical import GradualMagnitude
from examples.data.modules import Digits
from examples.models.lenet import SmallConvNet
from examples.training import Classifier, accuracy
from lightning_wgsef import WGSEF, Constant, Homotopy, WGSEFCallback, group_parameters
from tests.helpers.groups import batches, columns, dense_network, train
from tests.helpers.oracles import envelope as oracle
from tests.helpers.trainers import make_trainer


def equal_norms() -> SmallConvNet:
    network = SmallConvNet()
    with torch.no_grad():
        for conv in (network.conv1, network.conv2, network.conv3):
            conv.weight /= torch.linalg.vector_norm(conv.weight, dim=(1, 2, 3), keepdim=True)
    return network


def trained(callback: pl.Callback, grouping: str) -> tuple[float, list[int], list[float]]:
    """Test accuracy in percent, groups alive and budgets."""
    pl.seed_everything(0, verbose=False)
    data = Digits(batch_size=64)
    data.setup("fit")
    data.setup("test")
    model = Classifier(equal_norms(), lr=3e-3)
    make_trainer([callback], max_epochs=12).fit(model, data.train_dataloader())
    groups = group_parameters(model, grouping, k=0.25)
    left = [int(part.sum()) for part in groups.split(groups.alive()).values()]
    return accuracy(model, data.test_dataloader()), left, groups.budgets.tolist()


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("grouping", [pytest.param("filter", marks=pytest.mark.sweep), "channel"])
def test_defaults_beside_gradual_magnitude(grouping: str) -> None:
    ours, left, budgets = trained(WGSEFCallback(k=0.25, grouping=grouping), grouping)
    rival, rival_left, _ = trained(GradualMagnitude(k=0.25, grouping=grouping), grouping)
    assert left == rival_left == budgets
    assert rival > 80
    # A collapse is tens of points; over seeds the two differ by about 3.
    assert ours > rival - 10


@pytest.mark.parametrize("lam", [Constant(3.0), Homotopy(start=1e-2, length=20)])
def test_lockstep_with_the_slow_twin(lam: Constant | Homotopy) -> None:
    ours, twin = dense_network(), dense_network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.02, momentum=0.9) for m in (ours, twin)]
    WGSEF(ours, k=2, lam=lam).attach(optimizers[0])
    for step, batch in enumerate(batches(20)):
        train(ours, optimizers[0], [batch])
        train(twin, optimizers[1], [batch])
        for weight in columns(twin):
            norms = weight.detach().norm(dim=0).numpy()
            ones = np.ones_like(norms)
            if isinstance(lam, Constant):
                factors = oracle.prox_multipliers(norms, 0.02 * 3.0, 2, ones, ones, 0.0)
            elif step < 19:
                tau = 1e-2 ** (1 - (step + 1) / 20)
                left = 2 + (len(norms) - 2) * max(0, 1 - (step + 1) / 18) ** 3
                exact = oracle.prox_multipliers(norms, tau, left, ones, ones, 1.0)
                factors = oracle.anchored(exact, norms, left, ones, ones)
            else:
                factors = oracle.project(norms, 2, ones, ones)
            with torch.no_grad():
                weight.mul_(torch.as_tensor(np.asarray(factors, dtype=np.float64)))
        for mine, theirs in zip(columns(ours), columns(twin), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_unchanged_without_gradients_and_with_lam_zero() -> None:
    model, twin = dense_network(), dense_network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    regularizer = WGSEF(model, k=1, lam=Constant(0)).attach(optimizers[0])
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        train(net, optimizer, batches(5))
    assert all(torch.equal(a, b) for a, b in zip(columns(model), columns(twin), strict=True))
    assert regularizer.pruners[0].taken == 5
    optimizers[0].zero_grad()
    optimizers[0].step()
    assert regularizer.pruners[0].taken == 5


def test_learning_rate_is_that_of_the_layers_param_group() -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(
        [
            {"params": [*model[0].parameters(), *model[2].parameters()], "lr": 0.1},
            {"params": model[3].parameters(), "lr": torch.tensor(0.3)},
            {"params": [nn.Parameter(torch.zeros(1))], "lr": 9.0},
        ]
    )
    regularizer = WGSEF(model, k=1, lam=Constant(2.0)).attach(optimizer)
    train(model, optimizer, batches(1))
    steps = regularizer.pruners[0].step_size
    torch.testing.assert_close(steps, torch.tensor([0.2, 0.6], dtype=torch.float64))


def test_two_optimizers_each_act_on_their_own_layers() -> None:
    model = dense_network()
    first = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.01)
    second = torch.optim.SGD(model[3].parameters(), lr=0.01)
    regularizer = WGSEF(model, k=2, lam=Homotopy(length=3)).attach(first, second)
    for batch in batches(3):
        train(model, first, [batch])
    assert (model[2].weight.norm(dim=0) > 0).sum() == 2
    assert (model[3].weight.norm(dim=0) > 0).all()
    assert not regularizer.frozen
    for batch in batches(3):
        train(model, second, [batch])
    assert (model[3].weight.norm(dim=0) > 0).sum() == 2
    assert regularizer.frozen


def test_group_spread_over_optimizers_is_refused_with_names() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    first = torch.optim.SGD(model[0].parameters(), lr=0.1)
    second = torch.optim.SGD([*model[1].parameters(), *model[2].parameters()], lr=0.1)
    with pytest.raises(ValueError, match=r"layer '0'.*0\.weight.*1\.weight"):
        WGSEF(model, grouping="filter", lam=Constant(0.1)).attach(first, second)


def test_weights_and_norms_in_param_groups_of_one_optimizer() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    decayed = [model[0].weight, model[2].weight]
    others = [p for p in model.parameters() if all(p is not d for d in decayed)]
    optimizer = torch.optim.SGD(
        [{"params": others, "lr": 5.0}, {"params": decayed, "lr": 0.1, "weight_decay": 1e-2}]
    )
    regularizer = WGSEF(model, k=2, grouping="filter", lam=Constant(0.5)).attach(optimizer)
    model(torch.randn(2, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    assert regularizer.pruners[0].step_size == pytest.approx(0.05)


def test_layer_that_joins_the_optimizer_later() -> None:
    model = dense_network()
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.01)
    regularizer = WGSEF(model, k=2, lam=Homotopy(length=4)).attach(optimizer)
    assert regularizer.waiting() == ["3"]
    train(model, optimizer, batches(2))
    optimizer.add_param_group({"params": list(model[3].parameters())})
    train(model, optimizer, batches(1))
    assert regularizer.waiting() == []
    assert (model[3].weight.norm(dim=0) > 0).sum() > 2
    train(model, optimizer, batches(1))
    assert (model[2].weight.norm(dim=0) > 0).sum() == 2
    assert [part.frozen for part in regularizer.pruners] == [True, False]
    train(model, optimizer, batches(2))
    assert (model[3].weight.norm(dim=0) > 0).sum() == 2

    restored = dense_network()
    restored.load_state_dict(model.state_dict())
    other = torch.optim.SGD(restored.parameters(), lr=0.01)
    again = WGSEF(restored, k=2, lam=Homotopy(length=4)).attach(other)
    again.load_state_dict(regularizer.state_dict())
    assert [part.taken for part in again.pruners] == [4, 4]
    assert again.frozen


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_stop_with_the_layers_name_and_nothing_is_overwritten(bad: float) -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    WGSEF(model, k=1, lam=Constant(1.0), freeze=2).attach(optimizer)
    with torch.no_grad():
        model[3].weight[0, 0] = bad
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(FloatingPointError, match="weights of 3 are NaN or infinite"):
        optimizer.step()
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.nan_to_num(), old.nan_to_num())


def test_fused_step_that_found_infinities_is_skipped() -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    regularizer = WGSEF(model, k=1, lam=Constant(5.0)).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [weight.detach().clone() for weight in columns(model)]
    optimizer.found_inf = torch.tensor(1.0)  # as GradScaler sets it around a fused step
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(columns(model), before, strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(columns(model), before, strict=True))
    assert regularizer.pruners[0].taken == 2


@pytest.mark.filterwarnings("ignore:lam = .* had not reached the budget")
def test_metrics_have_constant_names_and_true_values() -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    regularizer = WGSEF(model, k=2, lam=Homotopy(start=0.1, length=2))
    names = {f"{layer}/{key}" for layer in "23" for key in ("group_sparsity", "value", "gap")}
    names |= {"sparsity", "value", "gap", "step", "frozen"}
    assert set(regularizer.metrics()) == names
    regularizer.attach(optimizer)
    train(model, optimizer, batches(1))
    metrics = regularizer.metrics()
    assert set(metrics) == names
    assert metrics["step"].item() == pytest.approx(0.1**0.5)
    assert metrics["frozen"].item() == 0
    assert metrics["gap"].item() > 0
    norms = model[3].weight.detach().norm(dim=0).numpy()
    ones = np.ones_like(norms)
    expected = oracle.value(norms, 2, ones, ones)
    assert metrics["3/value"].item() == pytest.approx(float(expected), rel=1e-6)
    assert regularizer.value()[1].item() == pytest.approx(float(expected), rel=1e-6)
    train(model, optimizer, batches(1))
    metrics = regularizer.metrics()
    assert metrics["frozen"].item() == 1
    assert metrics["gap"].item() == 0
    assert metrics["2/group_sparsity"].item() == pytest.approx(3 / 5)
    assert metrics["sparsity"].item() == pytest.approx((3 * 6 + 4 * 2) / (5 * 6 + 6 * 2))
    assert set(metrics) == names


def test_detached_leaves_the_weights_alone() -> None:
    model, twin = dense_network(), dense_network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    WGSEF(model, k=1, lam=Constant(9.0)).attach(optimizers[0]).detach()
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        train(net, optimizer, batches(3))
    assert all(torch.equal(a, b) for a, b in zip(columns(model), columns(twin), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": -1.0}, r"lam must be a finite number, at least 0, got -1"),
        ({"lam": float("nan")}, r"lam must be a finite number.*got nan"),
        ({"lam": "0.1"}, r"lam must be a number, None, or a schedule.*'0\.1'"),
        ({"debias": 1.5}, r"debias must be.*at most 1, got 1\.5"),
        ({"debias": 0.5}, r"debias must be 1 .*Homotopy.*got 0\.5"),
        ({"freeze": "later"}, r"freeze must be 'converged'.*'later'"),
        ({"freeze": 0}, r"freeze must be a number of steps.*got 0"),
        ({"freeze": 1.5}, r"freeze must be a number of steps.*got 1\.5"),
        ({"total_steps": 0}, r"total_steps must be.*got 0"),
        ({"total_steps": 0.5}, r"total_steps must be.*got 0\.5"),
        ({"k": 0}, r"k must be a number of groups.*got 0"),
        ({"masks": "nowhere.ckpt"}, r"masks: 'nowhere\.ckpt' cannot be read"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WGSEF(dense_network(), **arguments)


def test_share_of_a_training_run_of_unknown_length() -> None:
    model = dense_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"Homotopy\(length=...\) = 0\.5 is a share of training"):
        WGSEF(model).attach(optimizer)
    with pytest.raises(ValueError, match=r"freeze = 0\.5 is a share of training"):
        WGSEF(model, lam=Constant(0.1), freeze=0.5).attach(optimizer)


def test_optimizer_that_trains_no_grouped_layer() -> None:
    model = dense_network()
    with pytest.raises(ValueError, match="no optimizer trains any of the grouped layers 2, 3"):
        WGSEF(model, lam=Constant(0.1)).attach(torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_budgets_are_those_of_group_parameters() -> None:
    model = dense_network()
    regularizer = WGSEF(model, k={"2": 0.4, "3": 5})
    groups = group_parameters(model, "channel", {"2": 0.4, "3": 5})
    assert regularizer.groups.budgets.tolist() == groups.budgets.tolist() == [2, 5]
