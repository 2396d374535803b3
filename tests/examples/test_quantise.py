"""Slim, then int8: what torchao makes of a slim network, in the bytes and answers it has."""

from __future__ import annotations

import copy
import itertools
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from examples import quantise as example
from examples.benchmark.records import Records
from examples.data.modules import Digits
from examples.models.lenet import SmallConvNet
from examples.models.resnet import CifarResNet
from examples.training import accuracy
from lightning_wgsef import export_onnx, prune
from lightning_wgsef.network.equivalence import relative_difference

pytest.importorskip("torchao.quantization.pt2e")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = Digits()
    data.setup()
    return data


@pytest.fixture(scope="module")
def small(digits: Digits) -> nn.Module:
    """Half of a network that has learned its digits, trained on."""
    torch.manual_seed(0)
    network = SmallConvNet()
    example.fit(network, digits, 0.1, 6, 1.0)
    half = prune(network.eval(), digits.train_dataloader(), 0.5)
    example.fit(half, digits, 0.02, 3, 1.0)
    return half.eval()


def weights(network: nn.Module) -> int:
    return sum(x.numel() for x in network.parameters() if x.dim() > 1)


def test_statistics_follow_while_a_slim_network_trains_on(digits: Digits, small: nn.Module) -> None:
    """BatchNorm in evaluation mode would keep those of before, and the network diverges."""
    network = copy.deepcopy(small).eval()
    example.fit(network, digits, 0.02, 1, 2)
    assert network.norm1.num_batches_tracked == small.norm1.num_batches_tracked + 2
    assert not torch.equal(network.norm1.running_var, small.norm1.running_var)


@pytest.fixture(scope="module")
def before(small: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in small.state_dict().items()}


@pytest.fixture(scope="module")
def quantised(digits: Digits, small: nn.Module, before: dict[str, torch.Tensor]) -> nn.Module:
    return example.post_training(small, digits.train_dataloader())


def test_a_slim_network_in_int8(
    digits: Digits, small: nn.Module, before: dict[str, torch.Tensor], quantised: nn.Module
) -> None:
    for name, value in small.state_dict().items():
        assert torch.equal(value, before[name]), name
    right = accuracy(small, digits.test_dataloader())
    assert right > 90
    assert abs(accuracy(quantised, digits.test_dataloader()) - right) < 1.5
    state = quantised.state_dict()
    kept = sum(value.numel() for value in state.values() if value.dtype == torch.int8)
    assert kept == weights(small)
    assert not any(value.dim() > 1 for value in state.values() if value.is_floating_point())
    assert example.stored(quantised) < 0.3 * example.stored(small)
    images, _ = next(iter(digits.test_dataloader()))
    with torch.no_grad():
        for count in (1, 3, 64):
            wanted, found = small(images[:count]), quantised(images[:count])
            assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_rounded_weights_are_those_of_their_scales(small: nn.Module, quantised: nn.Module) -> None:
    """Symmetric, a scale for every filter, BatchNorm folded in: by hand from the definition."""
    state, norm = quantised.state_dict(), small.norm1
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = small.conv1.weight.detach() * factor[:, None, None, None]
    scale = folded.abs().amax((1, 2, 3)) / 127.5
    torch.testing.assert_close(state["_scale_0"], scale.detach(), rtol=1e-3, atol=0)
    rounded = (folded / state["_scale_0"][:, None, None, None]).round().clamp(-128, 127)
    assert (state["_frozen_param0"] - rounded).abs().max() <= 1


def test_residual_blocks_stay_one_graph() -> None:
    torch.manual_seed(0)
    network = CifarResNet(8, width=4).eval()
    batches = [(torch.randn(4, 3, 16, 16), torch.zeros(4)) for _ in range(3)]
    quantised = example.post_training(network, itertools.cycle(batches))
    kept = [x.numel() for x in quantised.state_dict().values() if x.dtype == torch.int8]
    assert sum(kept) == weights(network)
    wanted, found = network(batches[0][0]), quantised(batches[0][0])
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torchao"):
        example.prepared(nn.Linear(2, 2), torch.zeros(1, 2))


@pytest.mark.sweep
def test_training_with_rounded_numbers(digits: Digits, small: nn.Module) -> None:
    quantised = example.quantisation_aware(copy.deepcopy(small), digits, 0.002, 1, 1.0)
    right = accuracy(small, digits.test_dataloader())
    assert abs(accuracy(quantised, digits.test_dataloader()) - right) < 2
    assert example.stored(quantised) < 0.3 * example.stored(small)


@pytest.mark.sweep
def test_int8_as_onnx(digits: Digits, quantised: nn.Module, tmp_path: Path) -> None:
    """A number between two steps is rounded up by one runtime and down by the other.

    On a processor without VNNI, onnxruntime's sums of int8 overflow, unless it is told.
    """
    runtime = pytest.importorskip("onnxruntime")
    images, _ = next(iter(digits.test_dataloader()))
    with pytest.raises(ValueError, match="differs on"):
        export_onnx(quantised, tmp_path / "int8.onnx", images[:2], tolerance=1e-9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(quantised, tmp_path / "int8.onnx", images[:2], tolerance=0.05)
    said = any("x64quantprecision" in str(x.message) for x in caught)
    differences = []
    for settings in ({}, {"session.x64quantprecision": "1"}):
        options = runtime.SessionOptions()
        for name, value in settings.items():
            options.add_session_config_entry(name, value)
        session = runtime.InferenceSession(tmp_path / "int8.onnx", options)
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        differences.append(relative_difference([torch.from_numpy(found)], [quantised(images)]))
    assert differences[1] < 0.05
    assert (differences[0] > 0.05) == said


@pytest.mark.sweep
def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["quantise", "--epochs", "1", "--batches", "4", "--folder", str(tmp_path)]
    )
    try:
        example.main()
    finally:
        torch.set_flush_denormal(False)
    found = {record["name"]: record for record in Records(tmp_path / "figures.jsonl").all()}
    assert list(found) == ["dense", "dense, int8", "slim", "slim, int8", "slim, int8, trained"]
    assert found["slim, int8"]["bytes"] < 0.3 * found["slim"]["bytes"]
    assert found["slim"]["flops"] <= 0.5 * found["dense"]["flops"]
    assert all(
        len(record["latency"]) == 2 for name, record in found.items() if "trained" not in name
    )
