"""Penalty weights measured from gradients, against a twin in loops."""

import io

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_wgsef import WGSEF, CubicRamp, Homotopy, WGSEFCallback
from tests.helpers.groups import batches, dense_network, mlp, raises_naming
from tests.helpers.networks.scope import IMAGES, loader, pictures
from tests.helpers.trainers import make_trainer

KINDS = ["taylor", "fisher"]


class Twin:
    """Weights of the columns of layers 2 and 3, step by step."""

    def __init__(self, model, kind):
        self.model, self.kind, self.means, self.count = model, kind, None, 0

    def measure(self):
        ratios = []
        for layer in (self.model[2], self.model[3]):
            for weight, gradient in zip(layer.weight.T, layer.weight.grad.T, strict=True):
                products = [float(w.detach() * g) for w, g in zip(weight, gradient, strict=True)]
                squares = sum(float(w.detach()) ** 2 for w in weight)
                saved = sum(products) ** 2
                saved = saved if self.kind == "taylor" else sum(x * x for x in products)
                ratios.append(saved / squares if squares else None)
        self.count += 1
        share = 0.01 / (1 - 0.99**self.count)
        before = self.means or [0.0] * len(ratios)
        self.means = [
            b if r is None else b + share * (r - b) for b, r in zip(before, ratios, strict=True)
        ]


def gradients(model, parts):
    """Of a step whose gradients are accumulated, and clipped."""
    model.zero_grad()
    for inputs, targets in parts:
        ((model(inputs) - targets).square().mean() / len(parts)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_running_means(kind, closure):
    """At the weights that gradients were computed at, wherever those are computed."""
    model = dense_network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    more = {"weights": kind, "scope": "global", "lam": Homotopy(length=20)}
    regularizer = WGSEF(model, 5, **more).attach(optimizer)
    twin = Twin(model, kind)
    parts = batches(24)
    for number in range(12):
        own = parts[2 * number : 2 * number + 2]
        if closure:

            def compute(own=own):
                gradients(model, own)
                twin.measure()

            optimizer.step(compute)
        else:
            gradients(model, own)
            twin.measure()
            optimizer.step()
        expected = torch.tensor(twin.means, dtype=torch.float64)
        torch.testing.assert_close(regularizer.pruners[0].groups.weights, expected)
    for _ in range(8):
        gradients(model, parts[:2])
        optimizer.step()
    assert regularizer.frozen
    assert sum(int(mask.sum()) for mask in regularizer.masks.values()) == 5


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_changes_nothing(fused, clipped):
    """Neither its factor, which a fused optimizer takes out itself, nor a step without effect."""

    def train(scaler, overflows):
        model = dense_network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05, fused=fused)
        more = {"weights": "taylor", "scope": "global", "lam": Homotopy(length=9)}
        regularizer = WGSEF(model, 5, **more).attach(optimizer)
        measured = []
        for number in range(11):
            for overflow in [True, False] if number == overflows else [False]:
                optimizer.zero_grad()
                for inputs, targets in batches(24)[2 * number : 2 * number + 2]:
                    loss = (model(inputs) - targets).square().mean() / 2
                    scaler.scale(loss * (torch.inf if overflow else 1.0)).backward()
                if clipped:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                scaler.step(optimizer)
                scaler.update()
                weights = regularizer.pruners[0].groups.weights
                state = weights, nn.utils.parameters_to_vector(model.parameters()).detach()
                if overflow:
                    torch.testing.assert_close(state, measured[-1], rtol=0, atol=0)
                else:
                    measured.append(state)
        assert regularizer.frozen
        return measured

    # Powers of 2 scale gradients without rounding. Fused steps without effect count as steps.
    scaled = train(torch.amp.GradScaler("cpu", init_scale=2.0**10), overflows=4)
    plain = train(torch.amp.GradScaler("cpu", enabled=False), overflows=None)
    same = 4 if fused else 11
    torch.testing.assert_close(scaled[:same], plain[:same], rtol=0, atol=0)
    assert not torch.equal(plain[0][0], plain[3][0])


def test_the_first_projection_keeps_what_the_loss_would_miss():
    """A column that is large and that the loss does not feel goes; smaller ones stay."""
    torch.manual_seed(0)
    model = mlp(4, 6, 1).double()
    with torch.no_grad():
        model[0].weight[2:4].zero_()
        model[0].bias[2:4] = -1.0  # behind the ReLU these are always zero
        model[2].weight[:, 2:4] *= 100
    masks = {}
    for kind in ("uniform", *KINDS):
        network = mlp(4, 6, 1).double()
        network.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        more = {"weights": kind, "lam": Homotopy(length=1), "grouping": "channel"}
        regularizer = WGSEF(network, 2, **more).attach(optimizer)
        network(torch.randn(8, 4).double()).square().mean().backward()
        optimizer.step()
        masks[kind] = regularizer.masks["2"].nonzero().flatten().tolist()
    assert masks["uniform"] == [2, 3]
    assert not {2, 3} & {*masks["taylor"], *masks["fisher"]}


@pytest.mark.parametrize("kind", KINDS)
def test_zero_groups_and_missing_gradients(kind):
    """Neither is a NaN; what was measured stays, and what comes late is not thought weak."""
    model = dense_network()
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    more = {"weights": kind, "scope": "global", "lam": Homotopy(length=9)}
    regularizer = WGSEF(model, 0.5, **more).attach(optimizer)
    second = slice(model[2].in_features, None)
    found = []
    for number, batch in enumerate(batches(6)):
        gradients(model, [batch])
        if number == 3:
            fresh = Twin(model, kind)
            fresh.measure()
        else:
            model[3].weight.grad = None
        optimizer.step()
        found.append(regularizer.pruners[0].groups.weights.clone())
    assert all(bool((weights.isfinite() & (weights > 0)).all()) for weights in found)
    expected = torch.tensor(fresh.means[second], dtype=torch.float64)
    torch.testing.assert_close(found[3][second], expected)
    assert torch.equal(found[5][second], found[3][second])
    assert regularizer.value().isfinite().all()


def test_a_state_brings_what_was_measured():
    def made():
        model = dense_network()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        more = {"scope": "global", "weights": "taylor", "lam": Homotopy(length=20)}
        return model, optimizer, WGSEF(model, 0.6, **more).attach(optimizer)

    def train(part, own):
        for batch in own:
            gradients(part[0], [batch])
            part[1].step()

    first, second = made(), made()
    train(first, batches(30)[:8])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for part in (first, second):
        train(part, batches(30)[8:])
    assert first[2].frozen
    assert torch.equal(first[2].groups.weights, second[2].groups.weights)
    assert torch.equal(
        nn.utils.parameters_to_vector(first[0].parameters()),
        nn.utils.parameters_to_vector(second[0].parameters()),
    )


def test_under_a_trainer_with_a_size_and_resumed(tmp_path):
    """Bit for bit, and the size that was named, of a checkpoint that has it."""

    def fit(**arguments):
        model = pictures()
        saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1)
        callback = WGSEFCallback(
            k="80 kFLOPs", scope="global", weights="taylor", lam=Homotopy(length=0.5)
        )
        trainer = make_trainer(
            [callback, saver], enable_checkpointing=True, accumulate_grad_batches=2, max_epochs=4
        )
        trainer.fit(model, loader(), **arguments)
        return model, callback.regularizer

    model, regularizer = fit()
    path = next(path for path in tmp_path.glob("*.ckpt") if "step=6" in path.name)
    again, other = fit(ckpt_path=path)
    assert regularizer.frozen
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    assert torch.equal(regularizer.groups.weights, other.groups.weights)
    size = regularizer.groups.size
    alive = torch.cat(list(regularizer.masks.values()))
    assert float(size.of(alive)) <= 80e3
    assert IMAGES.shape == (1, 1, 8, 8)


def test_what_has_no_gradients_is_refused():
    model = dense_network()
    model[3].weight.requires_grad_(False)
    with raises_naming("weights='taylor'", "gradients", "frozen layer '3'", "'layer_norm'"):
        WGSEF(model, weights="taylor", include=["2", "3"])
    with raises_naming("metric must be 'identity' with weights='fisher'", "'auto'"):
        WGSEFCallback(weights="fisher", metric="auto")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"k": 0.5, "scope": "global", "costs": "flops"}, "taylor"),
        ({"k": 0.5, "scope": "global", "costs": "params"}, "taylor"),
        ({"k": CubicRamp(0.5, length=0.3), "scope": "global", "costs": "params"}, "taylor"),
        ({"k": "60 kFLOPs", "scope": "global"}, "taylor"),
        ({"k": "60 kFLOPs", "scope": "global", "weights": "fisher"}, "fisher"),
        ({"k": "60 kFLOPs", "scope": "global", "weights": "layer_norm"}, None),
        ({"k": "60 kFLOPs"}, None),  # the same share of every layer
        ({"k": 0.5, "costs": "flops"}, None),
        ({"k": 0.5, "scope": "global"}, None),  # a number of groups is no size
        ({"k": "60 kFLOPs", "scope": "global", "metric": "auto"}, None),  # which has its own
    ],
)
def test_layers_that_compete_for_a_size_are_compared_by_the_loss(arguments, expected):

    def step(**more):
        model = pictures()
        more = {"grouping": "structure", "example_input": IMAGES, "total_steps": 8, **more}
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        regularizer = WGSEF(model, **more).attach(optimizer)
        model(IMAGES.expand(2, -1, -1, -1)).square().mean().backward()
        optimizer.step()
        return regularizer.pruners, nn.utils.parameters_to_vector(model.parameters())

    pruners, weights = step(**arguments)
    assert {pruner.importance for pruner in pruners} == {expected}
    if expected:
        assert torch.equal(weights, step(**arguments | {"weights": expected})[1])


def test_a_run_goes_on_with_the_importance_it_began_with():
    """Means of two kinds would mean nothing; a fixed mask needs none."""

    def train(count, **arguments):
        model = dense_network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        more = {"scope": "global", "lam": Homotopy(length=6), **arguments}
        regularizer = WGSEF(model, 5, **more).attach(optimizer)
        for part in batches(count):
            gradients(model, [part])
            optimizer.step()
        return regularizer

    taylor = {"weights": "taylor"}
    half, frozen = train(3, **taylor).state_dict(), train(8, **taylor).state_dict()
    train(0, **taylor).load_state_dict(half)
    with raises_naming("weights='taylor'", "weights='fisher'", "without ckpt_path"):
        train(0, weights="fisher").load_state_dict(half)
    with raises_naming("weights='taylor'", "weights not measured"):
        train(0).load_state_dict(half)
    with raises_naming("weights not measured", "this one weights='taylor'", "'layer_norm'"):
        train(0, **taylor).load_state_dict(train(3).state_dict())
    again = train(0, weights="fisher")
    again.load_state_dict(frozen)
    assert again.frozen
