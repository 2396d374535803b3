"""Running statistics estimated anew before validation: what they are, and what they leave alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_wgsef import WGSEFCallback
from lightning_wgsef.lightning import batch_norm_update
from lightning_wgsef.lightning.batch_norm_update import BatchNormUpdate
from tests.helpers.groups import raises_naming
from tests.helpers.trainers import NAMESPACES, make_module, make_trainer, namespace


def images(count: int = 96) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(count, 1, 8, 8, generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return DataLoader(TensorDataset(pictures, labels), batch_size=16)


def by_hand(module: Any, batches: list[Tensor]) -> list[Tensor]:
    """Mean and variance of both norms over some batches, the mean over the batches, in float64."""
    twin, kept = copy.deepcopy(module).double().eval(), []
    with torch.no_grad():
        for batch in batches:
            x, of_batch = batch.double(), []
            for conv, norm in ((twin.conv1, twin.bn1), (twin.conv2, twin.bn2)):
                x = conv(x)
                mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=1)
                biased = x.var((0, 2, 3), correction=0)
                of_batch += [mean, var]
                x = (x - mean.view(1, -1, 1, 1)) / (biased + norm.eps).sqrt().view(1, -1, 1, 1)
                x = torch.relu(x * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1))
            kept.append(of_batch)
    return [torch.stack(values).mean(0) for values in zip(*kept, strict=True)]


def statistics(module: Any) -> list[Tensor]:
    norms = module.bn1, module.bn2
    return [x.clone().double() for norm in norms for x in (norm.running_mean, norm.running_var)]


def validated(
    name: str, update_bn: int, freeze: Any = "converged", **arguments: Any
) -> tuple[Any, list[Any], Any]:
    """Train for two epochs: statistics and expected ones at every validation."""
    kind, seen = type(make_module(name)), []

    class Validated(kind):  # type: ignore[misc, valid-type]
        def forward(self, pictures: Tensor) -> Tensor:
            if self.training or not self.trainer.sanity_checking:
                self.log("of_forward", pictures.mean())
            return super().forward(pictures)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0 and not self.trainer.sanity_checking:
                last = [pictures for pictures, _ in images()][-2:]
                modes = [m.training for m in self.modules()]
                frozen = callback.regularizer.frozen if callback.regularizer else False
                seen.append((statistics(self), by_hand(self, last), modes, frozen))

    namespace(name).seed_everything(0, verbose=False)
    module = Validated()
    callback = WGSEFCallback(0.5, grouping="channel", freeze=freeze, update_bn=update_bn)
    trainer = make_trainer([callback], name, **{"max_epochs": 4, **arguments})
    trainer.fit(module, images(), images(32))
    return module, seen, callback


def close(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", NAMESPACES)
def test_validation_sees_the_statistics_of_the_last_batches(name: str) -> None:
    _, seen, _ = validated(name, 2)
    assert [frozen for *_, frozen in seen] == [False, True, True, True]
    assert close(seen[0][0], seen[0][1])
    assert close(seen[1][0], seen[1][1])  # right after the freeze
    assert not close(seen[2][0], seen[2][1])  # then they are the usual ones
    assert not any(mode for _, _, modes, _ in seen for mode in modes)
    _, plain, _ = validated(name, 0)
    assert not close(plain[0][0], plain[0][1])


def test_training_is_the_same_and_the_logger_sees_no_more() -> None:
    one, _, callback = validated(NAMESPACES[0], 3)
    other, _, _ = validated(NAMESPACES[0], 0)
    for mine, same in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, same)
    assert callback._statistics is None
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in one.modules())
    assert one.bn1.momentum == 0.1
    assert int(one.bn1.num_batches_tracked) == int(other.bn1.num_batches_tracked)


@pytest.mark.parametrize("freeze", [1.0, 0.5])
def test_what_is_trained_is_never_the_estimate(freeze: float) -> None:
    """Also at the end: a resumed run remembers fewer batches, and ends with the same bits."""
    module, _, _ = validated(NAMESPACES[0], 2, max_epochs=2, freeze=freeze)
    without, _, _ = validated(NAMESPACES[0], 0, max_epochs=2, freeze=freeze)
    for one, other in zip(*(x.state_dict().values() for x in (module, without)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("fails", ["network", "validation"])
def test_what_fails_leaves_the_statistics_as_they_were_trained(fails: str) -> None:
    """A network that cannot be called once more costs a warning, not the training."""
    found = []

    class Fragile(type(make_module())):  # type: ignore[misc]
        def forward(self, pictures: Tensor) -> Tensor:
            if fails == "network" and self.bn2.training and not self.bn1.momentum:
                raise LookupError("no more")
            return super().forward(pictures)

        def on_train_batch_end(self, *_: Any) -> None:
            found.append(statistics(self))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if fails == "validation":
                raise LookupError("no more")

    module = Fragile()
    trainer = make_trainer([WGSEFCallback(0.5)], max_epochs=1, num_sanity_val_steps=0)
    if fails == "network":
        with pytest.warns(UserWarning, match=r"update_bn=10: .*LookupError: no more"):
            trainer.fit(module, images(192), images(32))
    else:
        with pytest.raises(LookupError):
            trainer.fit(module, images(192), images(32))
    for mine, trained in zip(statistics(module), found[-1], strict=True):
        assert torch.equal(mine, trained)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in module.modules())


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.linear(x)))


@pytest.mark.parametrize("how", ["a copy", "in place"])
def test_what_is_compiled_is_not_compiled_again(how: str) -> None:
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    network = Small()
    called = network
    if how == "in place":
        network.compile(backend=backend, fullgraph=True)
    else:
        called = torch.compile(network, backend=backend, fullgraph=True)
    model, inputs = nn.ModuleDict({"called": called}), torch.randn(32, 4)
    called(inputs)
    estimate = BatchNormUpdate(model, 1)
    estimate.start()
    called(inputs)
    estimate.update()
    called(inputs)
    assert len(compiled) == 1
    seen = torch.allclose(network.norm.running_mean, network.linear(inputs).mean(0), atol=1e-6)
    assert seen == (how == "a copy")  # the inputs of the other are not seen from outside


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last batch stays, however large."""
    monkeypatch.setattr(batch_norm_update, "MOST_BYTES", 16 * 4 * 4)
    network = Apart()
    for size, kept in ((8, [8]), (8, [8, 8]), (4, [8, 8, 4]), (40, [8, 4, 40]), (8, [40, 8])):
        if size == 8 and kept == [8]:
            estimate = BatchNormUpdate(network, 10)
        estimate.start()
        network.step(torch.randn(size, 4))
        assert [len(args[0]) for ((_, args, _),) in estimate._batches] == kept
    estimate.remove()
    assert BatchNormUpdate(nn.Linear(2, 2), 10)._hooks == []


class Apart(nn.Module):
    """Modules that a training step calls one by one; one is checkpointed, one norm kept still."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
        self.still, self.unused = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.head = nn.Sequential(nn.Linear(6, 2), nn.BatchNorm1d(2, momentum=None))
        self.register_buffer("calls", torch.zeros(()))

    def step(self, x: Tensor) -> Tensor:
        return self(x, scale=2.0).square().mean()

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        self.calls += 1
        x = checkpoint(self.front, x, use_reentrant=False)
        return self.head(self.still(x) * scale)


def test_what_is_left_alone() -> None:
    torch.manual_seed(0)
    network = Apart()
    network.still.eval()
    estimate = BatchNormUpdate(network, 2)
    batches = [torch.randn(16, 4) for _ in range(3)]
    for batch in batches:
        estimate.start()
        loss = network.step(batch)
        estimate.pause()
        loss.backward()
        estimate.resume()
    before = {name: x.clone() for name, x in network.named_buffers()}
    modes, state = [m.training for m in network.modules()], torch.get_rng_state()
    with torch.inference_mode():
        estimate.update()
    changed = {n for n, x in network.named_buffers() if not torch.equal(x, before[n])}
    assert changed == {
        f"{name}.running_{kind}" for name in ("front.1", "head.1") for kind in ("mean", "var")
    }
    assert modes == [m.training for m in network.modules()]
    assert torch.equal(state, torch.get_rng_state())
    wanted = torch.stack([network.front[0](x).mean(0) for x in batches[1:]]).mean(0)
    assert torch.allclose(network.front[1].running_mean, wanted, atol=1e-6)
    network.step(batches[0]).backward()  # nothing became an inference tensor


@pytest.mark.parametrize("wrong", [-1, 2.0, True, "10", None])
def test_what_is_no_number_of_batches(wrong: Any) -> None:
    with raises_naming("update_bn", repr(wrong), ">= 0"):
        WGSEFCallback(update_bn=wrong)
