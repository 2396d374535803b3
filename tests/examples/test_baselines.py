"""The classical baselines under a real Trainer, against loops written from their definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.benchmark.baselines.classical import AdaHSPG, hspg, prox_sgd
from examples.data.batches import Batches
from tests.helpers.trainers import make_trainer

LR = 0.5


class Trained(pl.LightningModule):
    """A network, its loss and plain SGD."""

    def __init__(self, network: nn.Module, loss: Callable[..., Tensor], lr: float = LR) -> None:
        super().__init__()
        self.network, self.loss, self.lr = network, loss, lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.network, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.lr)


class Seen(pl.Callback):
    """Weights after every epoch, gradients before every step."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.gradients: list[list[Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.weights.append([p.detach().clone() for p in pl_module.network.parameters()])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad for p in pl_module.network.parameters()]
        self.gradients.append([g.clone() for g in gradients if g is not None])


def classify(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(network(batch[0]), batch[1])


def perceptron(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), *between, nn.Tanh(), nn.Linear(8, 3)).double()


def examples(batch_size: int = 6) -> Batches:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(20, 5, dtype=torch.float64, generator=generator)
    labels = torch.randint(3, (20,), generator=generator)
    return Batches(inputs, labels, batch_size, shuffle=True)


def fit(module: Trained, batches: Batches, callback: pl.Callback, epochs: int) -> Seen:
    seen = Seen()
    make_trainer([callback, seen], max_epochs=epochs).fit(module, batches)
    return seen


def gradient(network: nn.Module, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(classify(network, (inputs, labels)), network.parameters()))


@torch.no_grad()
def proximal_step(network: nn.Module, gradients: list[Tensor], lam: float) -> None:
    """One step of ProxSGD; the groups are the rows of the first layer with their biases."""
    for parameter, gradient in zip(network.parameters(), gradients, strict=True):
        parameter -= LR * gradient
    weight, bias = network[0].weight, network[0].bias
    for row in range(len(weight)):
        norm = (weight[row].square().sum() + bias[row].square()).sqrt()
        factor = max(0.0, 1 - LR * lam / float(norm)) if norm > 0 else 0.0
        weight[row] *= factor
        bias[row] *= factor


def assert_same(found: list[Tensor], expected: nn.Module) -> None:
    for one, other in zip(found, expected.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-10, atol=1e-12)


def test_prox_sgd_is_the_loop_of_its_definition() -> None:
    lam = 0.08
    network, batches = perceptron(), examples()
    seen = fit(Trained(network, classify), batches, prox_sgd(lam), epochs=5)
    expected = perceptron()
    for epoch in range(5):
        batches.set_epoch(epoch)
        for inputs, labels in batches:
            proximal_step(expected, gradient(expected, inputs, labels), lam)
    assert_same(seen.weights[-1], expected)
    zero = int((expected[0].weight == 0).all(1).sum())
    assert 0 < zero < 8, "the test says nothing about zeros"


class Walk:
    """Rows that move along a line: every batch b moves row i from theta to theta - lr * b * c_i."""

    def __init__(self, start: list[float], speed: list[float]) -> None:
        self.network = nn.Sequential(nn.Linear(2, len(start), bias=False), nn.Linear(len(start), 1))
        self.speed = torch.tensor(speed)
        self.network[0].weight.data = torch.tensor(start)[:, None] * torch.tensor([[0.6, 0.8]])

    def loss(self, network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        along = network[0].weight @ torch.tensor([0.6, 0.8])
        return batch[0].mean() * (self.speed * along).sum() / LR

    def places(self, callback: pl.Callback, moves: list[float], epochs: int = 1) -> list[Any]:
        """Where the rows are after every epoch."""
        batches = Batches(torch.tensor(moves), torch.zeros(len(moves)), batch_size=1)
        seen = fit(Trained(self.network, self.loss), batches, callback, epochs)
        rows = [weights[0] @ torch.tensor([0.6, 0.8]) for weights in seen.weights]
        for row, weights in zip(rows, seen.weights, strict=True):
            assert torch.equal(row == 0, (weights[0] == 0).all(1))
        return [row.tolist() for row in rows]


TINY = 1e-9  # a penalty that shrinks nothing to speak of


@pytest.mark.parametrize(
    ("epsilon", "moves", "expected"),
    [
        (0.0, [0.0, 1.0], [0.0, 0.3, 0.9]),  # 1 -> -0.5 turns round, 1 -> 0.3 does not
        (0.4, [0.0, 1.0], [0.0, 0.0, 0.9]),  # less than 0.4 of it is left
        (0.0, [0.0, 1.0, -1.0], [0.0, 1.0, 1.0]),  # what is zero stays so
        (0.0, [1.0, 0.0], [-0.5, 0.3, 0.9]),  # the first step is one of ProxSGD
    ],
)
def test_hspg_zeroes_groups_that_leave_their_half_space(
    epsilon: float, moves: list[float], expected: list[float]
) -> None:
    walk = Walk([1.0, 1.0, 1.0], [1.5, 0.7, 0.1])
    places = walk.places(hspg(TINY, epsilon, start=1), moves)
    assert places[-1] == pytest.approx(expected, abs=1e-6)
    assert [place == 0 for place in places[-1]] == [place == 0 for place in expected]


def test_a_group_that_is_zero_leaves_under_prox_sgd_and_not_under_hspg() -> None:
    moves = [0.0, 1.0]
    assert Walk([0.0, 1.0], [0.5, 0.1]).places(prox_sgd(TINY), moves)[-1][0] == pytest.approx(-0.5)
    assert Walk([0.0, 1.0], [0.5, 0.1]).places(hspg(TINY, 0.0, start=1), moves)[-1][0] == 0


def test_the_variance_reduced_gradient_is_the_full_one_at_the_snapshot() -> None:
    network, batches = perceptron(), examples()
    expected = gradient(perceptron(), batches.images, batches.labels)
    seen = fit(Trained(network, classify), batches, AdaHSPG(0.01, loss=classify), epochs=1)
    for found, full in zip(seen.gradients[0], expected, strict=True):
        torch.testing.assert_close(found, full, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(seen.gradients[1][0], expected[0])


def test_a_proximal_epoch_of_adahspg_is_the_loop_of_its_definition() -> None:
    lam = 0.05
    network, batches = perceptron(), examples()
    seen = fit(Trained(network, classify), batches, AdaHSPG(lam, loss=classify), epochs=1)
    expected, snapshot = perceptron(), perceptron()
    full = gradient(snapshot, batches.images, batches.labels)
    batches.set_epoch(0)
    for inputs, labels in batches:
        terms = gradient(expected, inputs, labels), gradient(snapshot, inputs, labels), full
        proximal_step(expected, [a - b + c for a, b, c in zip(*terms, strict=True)], lam)
    assert_same(seen.weights[-1], expected)


def test_the_snapshot_disturbs_neither_random_numbers_nor_running_statistics() -> None:
    """Weights that do not move have the full gradient at every step, under dropout as well."""

    def trained(callback: pl.Callback) -> tuple[Seen, nn.Module, Tensor]:
        network = perceptron(nn.BatchNorm1d(8).double(), nn.Dropout(0.5))
        torch.manual_seed(3)
        seen = fit(Trained(network, classify, lr=0.0), examples(), callback, epochs=2)
        return seen, network, torch.rand(1)

    reduced, network, drawn = trained(AdaHSPG(0.0, loss=classify))
    plain, other, expected = trained(prox_sgd(0.0))
    assert drawn == expected
    assert torch.equal(network[1].running_mean, other[1].running_mean)
    assert torch.equal(network[1].running_var, other[1].running_var)
    steps = len(examples())
    for found in reduced.gradients[1:steps]:
        assert all(torch.equal(a, b) for a, b in zip(found, reduced.gradients[0], strict=True))
    assert not torch.equal(plain.gradients[0][0], plain.gradients[1][0])
    for found, same in zip(reduced.gradients[steps:], plain.gradients[steps:], strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(found, same, strict=True)
        )  # a half-space epoch


def test_adahspg_alternates_epochs() -> None:
    """Turning round costs the life of a group in odd epochs, and it comes back in even ones."""
    walk = Walk([1.0, 0.4], [0.6, 0.6])
    callback = AdaHSPG(TINY, loss=walk.loss)
    places = walk.places(callback, [1.0], epochs=4)
    assert places[0] == pytest.approx([0.4, -0.2], abs=1e-6)  # proximal: turning is free
    assert places[1] == pytest.approx([0.0, -0.8], abs=1e-6)
    assert places[1][0] == 0
    assert places[2] == pytest.approx([-0.6, -1.4], abs=1e-6)
    assert places[3] == pytest.approx([-1.2, -2.0], abs=1e-6)


def test_adahspg_adapts_epsilon() -> None:
    """Up where a half-space epoch gained nothing, down where a group came back."""
    walk = Walk([4.6], [1.0])
    callback = AdaHSPG(TINY, loss=walk.loss)
    places = [place for (place,) in walk.places(callback, [1.0], epochs=6)]
    # 2.6 is more than 0 of 3.6, but 0.6 is less than half of 1.6
    assert places == pytest.approx([3.6, 2.6, 1.6, 0.0, -1.0, -2.0], abs=1e-6)
    assert places[3] == 0
    assert callback.epsilon == 0.25
    for highest, expected in ((0.9, 0.75), (0.6, 0.6)):
        still = Walk([1.0], [0.0])
        callback = AdaHSPG(TINY, highest, loss=still.loss)
        assert still.places(callback, [1.0], epochs=5)[-1] == pytest.approx([1.0])
        assert callback.epsilon == expected


def test_gradients_cannot_be_accumulated() -> None:
    trainer = make_trainer([AdaHSPG(0.1, loss=classify)], accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1, got 2"):
        trainer.fit(Trained(perceptron(), classify), examples())
