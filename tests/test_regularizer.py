"""The regularizer in a plain loop, against slow twins in lockstep."""

from __future__ import annotations

import re
import warnings

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

from lightning_wgsef import WGSEF, Constant, Groups, Homotopy, group_parameters
from lightning_wgsef.groups import GroupedLayer, Member


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Linear(6, 2)).to(dtype)


def batches(count: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(16, 4, generator=generator, dtype=dtype) for _ in range(count)]
    return [(x, torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)) for x in inputs]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: list) -> None:
    for inputs, targets in data:
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        optimizer.step()


def columns(model: nn.Sequential) -> list[Tensor]:
    return [model[2].weight, model[3].weight]


@pytest.mark.parametrize("lam", [Constant(3.0), Homotopy(start=1e-2, length=20)])
def test_lockstep_with_the_slow_twin(lam: Constant | Homotopy) -> None:
    ours, twin = network(), network()
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
                exact = oracle.prox_multipliers(norms, tau, 2, ones, ones, 1.0)
                factors = oracle.anchored(exact, norms, 2, ones, ones)
            else:
                factors = oracle.project(norms, 2, ones, ones)
            with torch.no_grad():
                weight.mul_(torch.as_tensor(np.asarray(factors, dtype=np.float64)))
        for mine, theirs in zip(columns(ours), columns(twin), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=1e-2, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    ],
)
def test_dead_groups_stay_dead_after_the_freeze(make) -> None:
    model = network()
    optimizer = make(model.parameters())
    regularizer = WGSEF(model, k=2, lam=Homotopy(length=10)).attach(optimizer)

    def step(inputs: Tensor, targets: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    for batch in batches(10):
        step(*batch)
    assert regularizer.frozen
    masks = regularizer.masks
    assert [int(mask.sum()) for mask in masks.values()] == [2, 2]
    for weight, mask in zip(columns(model), masks.values(), strict=True):
        for value in optimizer.state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert value[:, ~mask].count_nonzero() == 0
                assert value[:, mask].count_nonzero() > 0
    before = [weight.detach().clone() for weight in columns(model)]
    for batch in batches(10):
        step(*batch)
        for weight, mask in zip(columns(model), masks.values(), strict=True):
            assert torch.equal(weight.norm(dim=0) > 0, mask)
    assert all(not torch.equal(a, b) for a, b in zip(before, columns(model), strict=True))


def test_unchanged_without_gradients_and_with_lam_zero() -> None:
    model, twin = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    regularizer = WGSEF(model, k=1, lam=0).attach(optimizers[0])
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        train(net, optimizer, batches(5))
    assert all(torch.equal(a, b) for a, b in zip(columns(model), columns(twin), strict=True))
    assert regularizer.attachments[0].taken == 5
    optimizers[0].zero_grad()
    optimizers[0].step()
    assert regularizer.attachments[0].taken == 5


def test_learning_rate_is_that_of_the_layers_param_group() -> None:
    model = network()
    optimizer = torch.optim.SGD(
        [
            {"params": [*model[0].parameters(), *model[2].parameters()], "lr": 0.1},
            {"params": model[3].parameters(), "lr": torch.tensor(0.3)},
            {"params": [nn.Parameter(torch.zeros(1))], "lr": 9.0},
        ]
    )
    regularizer = WGSEF(model, k=1, lam=2.0).attach(optimizer)
    train(model, optimizer, batches(1))
    steps = regularizer.attachments[0].step_size
    torch.testing.assert_close(steps, torch.tensor([0.2, 0.6], dtype=torch.float64))


def test_two_optimizers_each_act_on_their_own_layers() -> None:
    model = network()
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
        WGSEF(model, grouping="filter", lam=0.1).attach(first, second)


def test_weights_and_norms_in_param_groups_of_one_optimizer() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    decayed = [model[0].weight, model[2].weight]
    others = [p for p in model.parameters() if all(p is not d for d in decayed)]
    optimizer = torch.optim.SGD(
        [{"params": others, "lr": 5.0}, {"params": decayed, "lr": 0.1, "weight_decay": 1e-2}]
    )
    regularizer = WGSEF(model, k=2, grouping="filter", lam=0.5).attach(optimizer)
    model(torch.randn(2, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    assert regularizer.attachments[0].step_size == pytest.approx(0.05)


def test_layer_that_joins_the_optimizer_later() -> None:
    model = network()
    optimizer = torch.optim.SGD([*model[0].parameters(), *model[2].parameters()], lr=0.01)
    regularizer = WGSEF(model, k=2, lam=Homotopy(length=4)).attach(optimizer)
    assert regularizer.waiting() == ["3"]
    train(model, optimizer, batches(2))
    optimizer.add_param_group({"params": list(model[3].parameters())})
    train(model, optimizer, batches(3))
    assert regularizer.waiting() == []
    assert (model[2].weight.norm(dim=0) > 0).sum() == 2
    assert (model[3].weight.norm(dim=0) > 0).all()
    train(model, optimizer, batches(1))
    assert (model[3].weight.norm(dim=0) > 0).sum() == 2

    restored = network()
    restored.load_state_dict(model.state_dict())
    other = torch.optim.SGD(restored.parameters(), lr=0.01)
    again = WGSEF(restored, k=2, lam=Homotopy(length=4)).attach(other)
    again.load_state_dict(regularizer.state_dict())
    assert [part.taken for part in again.attachments] == [4, 4]
    assert again.frozen


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_stop_with_the_layers_name_and_nothing_is_overwritten(bad: float) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    WGSEF(model, k=1, lam=1.0, freeze=2).attach(optimizer)
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
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    regularizer = WGSEF(model, k=1, lam=5.0).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = [weight.detach().clone() for weight in columns(model)]
    optimizer.found_inf = torch.tensor(1.0)  # as GradScaler sets it around a fused step
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(columns(model), before, strict=True))
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(columns(model), before, strict=True))
    assert regularizer.attachments[0].taken == 2


def test_constant_lam_freezes_when_converged() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    regularizer = WGSEF(model, k=1, lam=0.5).attach(optimizer)
    train(model, optimizer, batches(200))
    assert not regularizer.frozen  # a first look and four at the same set are asked for
    train(model, optimizer, batches(400))
    assert regularizer.frozen
    assert [int(mask.sum()) for mask in regularizer.masks.values()] == [1, 1]
    assert regularizer.gap().tolist() == [0, 0]


def test_freeze_at_a_given_step_projects_onto_the_budget() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    regularizer = WGSEF(model, k=2, lam=1e-6, freeze=0.5, total_steps=10).attach(optimizer)
    train(model, optimizer, batches(4))
    assert not regularizer.frozen
    train(model, optimizer, batches(1))
    assert regularizer.frozen
    assert [int(mask.sum()) for mask in regularizer.masks.values()] == [2, 2]


def test_never_freezing() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    regularizer = WGSEF(model, k=2, lam=Homotopy(length=5), freeze=None).attach(optimizer)
    train(model, optimizer, batches(10))
    assert not regularizer.frozen
    assert [int(mask.sum()) for mask in regularizer.masks.values()] == [2, 2]


def test_debiased_constant_stops_at_the_projection() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    regularizer = WGSEF(model, k=2, lam=1e9, debias=1.0).attach(optimizer)
    kept = [weight.detach().norm(dim=0).topk(2).values for weight in columns(model)]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    norms = [weight.detach().norm(dim=0) for weight in columns(model)]
    assert [int((norm > 0).sum()) for norm in norms] == [2, 2]
    for norm, expected in zip(norms, kept, strict=True):
        torch.testing.assert_close(norm.topk(2).values, expected, rtol=0, atol=0)
    assert regularizer.attachments[0].step_size.item() == 1.0


def test_collapse_is_reported_once_with_layer_and_lam() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    WGSEF(model, k=2, lam=5.0, include=["2"]).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(200):
            optimizer.step()
    assert len(caught) == 1
    assert re.match(r"all groups of 2 have .*Constant\(lam=5.0\)", str(caught[0].message))


def weighted(model: nn.Module) -> Groups:
    """Columns of layer 3: the first two matter more, the last one costs more."""
    weights = torch.tensor([100.0, 100.0, 1.0, 1.0, 1.0, 1.0])
    costs = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 3.0])
    member = Member("3.weight", model[3].weight, axes=(1,))
    return Groups([GroupedLayer("3", "weighted", 6, (member,), weights=weights, costs=costs)])


@pytest.mark.parametrize("lam", [Homotopy(length=3), Constant(0.0)])
def test_weights_and_costs_of_ones_own_groups_decide_who_stays(lam) -> None:
    model = network()
    with torch.no_grad():
        model[3].weight.copy_(torch.tensor([1.0, 1.1, 2.0, 2.1, 1.9, 3.5]).expand(2, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    regularizer = WGSEF(model, k=3, lam=lam, grouping=weighted, freeze=3).attach(optimizer)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    # strength a * sqrt(w / c): 10, 11, 2, 2.1, 1.9, 2.02 -> the first two, then 2.1
    assert regularizer.masks["3"].tolist() == [True, True, False, True, False, False]
    assert regularizer.gap().item() == 0


def test_resume_is_bit_identical_and_loads_weights_only(tmp_path) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, WGSEF]:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        regularizer = WGSEF(model, k=2, lam=Homotopy(length=60)).attach(optimizer)
        return model, optimizer, regularizer

    whole, optimizer, _ = start()
    train(whole, optimizer, batches(80))
    for stop in (30, 60, 70):
        model, optimizer, regularizer = start()
        train(model, optimizer, batches(80)[:stop])
        path = tmp_path / "state.ckpt"
        parts = (model, optimizer, regularizer)
        torch.save([part.state_dict() for part in parts], path)
        resumed = start()
        for part, state in zip(resumed, torch.load(path, weights_only=True), strict=True):
            part.load_state_dict(state)
        train(*resumed[:2], batches(80)[stop:])
        for a, b in zip(whole.parameters(), resumed[0].parameters(), strict=True):
            assert torch.equal(a, b)


def test_state_of_another_model_is_refused() -> None:
    model = network()
    state = WGSEF(model, lam=0.1).attach(torch.optim.SGD(model.parameters(), lr=0.1)).state_dict()
    other = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 7))
    regularizer = WGSEF(other, lam=0.1).attach(torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"saved state is of other groups.*'2': 5"):
        regularizer.load_state_dict(state)


def test_masks_from_zeros_and_from_a_checkpoint(tmp_path) -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    torch.save(model.state_dict(), tmp_path / "pruned.pt")
    for masks, start in (("from_zeros", model), (tmp_path / "pruned.pt", network())):
        optimizer = torch.optim.AdamW(start.parameters(), lr=0.01)
        regularizer = WGSEF(start, masks=masks).attach(optimizer)
        assert regularizer.frozen
        assert start[2].weight[:, 1].count_nonzero() == 0
        train(start, optimizer, batches(5))
        assert regularizer.masks["2"].tolist() == [True, False, True, True, True]
        assert (start[2].weight.norm(dim=0) > 0).tolist() == regularizer.masks["2"].tolist()
        assert regularizer.gap().tolist() == [0, 0]
    with pytest.raises(ValueError, match="no group is zero"):
        WGSEF(network(), masks="from_zeros")


def test_metrics_have_constant_names_and_true_values() -> None:
    model = network()
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
    train(model, optimizer, batches(1))
    metrics = regularizer.metrics()
    assert metrics["frozen"].item() == 1
    assert metrics["gap"].item() == 0
    assert metrics["2/group_sparsity"].item() == pytest.approx(3 / 5)
    assert metrics["sparsity"].item() == pytest.approx((3 * 6 + 4 * 2) / (5 * 6 + 6 * 2))
    assert set(metrics) == names


def test_detached_leaves_the_weights_alone() -> None:
    model, twin = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    WGSEF(model, k=1, lam=9.0).attach(optimizers[0]).detach()
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        train(net, optimizer, batches(3))
    assert all(torch.equal(a, b) for a, b in zip(columns(model), columns(twin), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": -1.0}, r"lam must be a finite number, at least 0, got -1"),
        ({"lam": float("nan")}, r"lam must be a finite number.*got nan"),
        ({"lam": "0.1"}, r"lam must be a number or a schedule.*'0\.1'"),
        ({"debias": 1.5}, r"debias must be.*at most 1, got 1\.5"),
        ({"debias": 0.5}, r"debias must be 1 .*Homotopy.*got 0\.5"),
        ({"freeze": "later"}, r"freeze must be 'converged'.*'later'"),
        ({"freeze": 0}, r"freeze must be a number of steps.*got 0"),
        ({"freeze": 1.5}, r"freeze must be a number of steps.*got 1\.5"),
        ({"total_steps": 0}, r"total_steps must be.*got 0"),
        ({"k": 0}, r"k must be a number of groups.*got 0"),
        ({"masks": "nowhere.ckpt"}, r"masks: 'nowhere\.ckpt' cannot be read"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WGSEF(network(), **arguments)


def test_share_of_a_training_run_of_unknown_length() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"Homotopy\(length=...\) = 0\.5 is a share of training"):
        WGSEF(model).attach(optimizer)
    with pytest.raises(ValueError, match=r"freeze = 0\.5 is a share of training"):
        WGSEF(model, lam=0.1, freeze=0.5).attach(optimizer)


def test_optimizer_that_trains_no_grouped_layer() -> None:
    model = network()
    with pytest.raises(ValueError, match="no optimizer trains any of the grouped layers 2, 3"):
        WGSEF(model, lam=0.1).attach(torch.optim.SGD(model[0].parameters(), lr=0.1))


def test_budgets_are_those_of_group_parameters() -> None:
    model = network()
    regularizer = WGSEF(model, k={"2": 0.4, "3": 5})
    groups = group_parameters(model, "channel", {"2": 0.4, "3": 5})
    assert regularizer.groups.budgets.tolist() == groups.budgets.tolist() == [2, 5]
