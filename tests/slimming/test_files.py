"""Slim and sparse files, and those of the command line, that were damaged or made to do harm."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_wgsef import load_slim, load_sparse, save_slim, slim, to_sparse
from lightning_wgsef.cli.commands import main
from lightning_wgsef.slimming import files as slim_files
from tests.helpers.groups import raises_naming
from tests.helpers.malicious_files import (
    FOREIGN,
    WRONG_VALUES,
    Malicious,
    at,
    changed,
    places,
    variants,
)
from tests.helpers.networks.slim import (
    IMAGE,
    SEQUENCE,
    Residual,
    convolutions,
    drawn,
    pruned,
    silent,
)

PLAIN = {
    name: value for name, value in WRONG_VALUES.items() if not isinstance(value, bytes | Tensor)
}


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten()
    )


class File:
    """A file of `save_slim` in its parts, and written again with others."""

    def __init__(self, path: Path) -> None:
        network = make()
        with torch.no_grad():
            network[3].weight[:, 3:] = 0
        self.small = slim(network, IMAGE).eval()
        self.path = path
        save_slim(self.small, path)
        self.whole = path.read_bytes()
        (self.length,) = struct.unpack("<Q", self.whole[:8])
        self.header = json.loads(self.whole[8 : 8 + self.length])
        self.data = self.whole[8 + self.length :]

    def write(self, header: Any) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.path.write_bytes(struct.pack("<Q", len(text)) + text + self.data)

    def write_metadata(self, key: str, text: str) -> None:
        self.write(changed(self.header, ("__metadata__", key), text))

    def refused(self) -> bool:
        """A `ValueError` that names the file; else the network does what the small one does."""
        try:
            network = load_slim(self.path, make)
        except ValueError as error:
            message = str(error)
        else:
            assert torch.equal(network(IMAGE), self.small(IMAGE))
            return False
        return str(self.path) in message


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "small.safetensors")


def json_variants(value: Any) -> Iterator[tuple[str, Any]]:
    """Every change of every place of what JSON can hold."""
    for path in places(value):
        found = at(value, path)
        news = dict(PLAIN)
        if isinstance(found, int):
            news |= {"negative": -found - 1, "far": 10**12, "float": found + 0.5, "digits": "0"}
        if isinstance(found, list) and found:
            news |= {"twice": found + found[:1], "often": found * 10**4, "reversed": found[::-1]}
        if isinstance(found, dict):
            more = ({}, 0, {"forward": 1}, {"training": 0}, {"__class__": 0}, {"padding": [3, 3]})
            news |= {f"with {new}": {**found, FOREIGN: new, "0": new} for new in map(str, more)}
            news |= {f"with {new} of 0": {**found, "0": new} for new in more}
            news |= {f"no {key}": {k: x for k, x in found.items() if k != key} for key in found}
        for what, new in news.items():
            yield f"{path}: {what}", changed(value, path, new)


def test_every_place_of_the_header_is_checked(file: File) -> None:
    """What is accepted is the same network: without sizes that are only said, or said twice."""
    refused, accepted = 0, []
    assert not file.refused()  # as it was written
    for key in ("plans", "tied"):
        for what, value in json_variants(json.loads(file.header["__metadata__"][key])):
            file.write_metadata(key, json.dumps(value))
            if file.refused():
                refused += 1
            else:
                accepted.append(f"{key} {what}")
    assert refused > 300
    harmless = ("plans ()", "plans (0,)", "plans (0, 'sizes'", "plans (0, 'heads')")
    harmless += ("plans (0, 'biases')", "plans (0, 'skipped')", "tied ()")
    harmless += ("plans (0, 'parts')", "plans (0, 'experts')", "plans (0, 'silenced')")
    harmless += ("plans (0, 'norms')",)
    assert [what for what in accepted if not what.startswith(harmless)] == []
    assert len(accepted) < 53


def test_planted_fault_without_the_check_of_plans(
    file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan could set what it likes, and make tensors larger than they were."""
    plans = json.loads(file.header["__metadata__"]["plans"])
    padded = changed(plans, (0, "sizes", "0"), {"out_channels": 3, "padding": [3, 3]})
    file.write_metadata("plans", json.dumps(padded))
    assert file.refused()
    monkeypatch.setattr(slim_files, "_check_plan", lambda plan, model: None)
    assert load_slim(file.path, make)(IMAGE).shape != file.small(IMAGE).shape
    often = changed(plans, (0, "kept", "0.weight", "0"), [0] * 10**6)
    file.write_metadata("plans", json.dumps(often))
    with raises_naming("(1000000, 3, 3, 3)"):  # 100 MB from 864 bytes, before it is refused
        load_slim(file.path, make)
    monkeypatch.undo()
    with raises_naming("kept['0.weight'][0]", "increasing indices below 8"):
        load_slim(file.path, make)


@pytest.mark.parametrize("key", ["plans", "tied"])
def test_text_that_is_no_json_for_us(key: str, file: File) -> None:
    deep = ("[" * 10**5 + "]" * 10**5, '{"a":' * 10**5 + "1" + "}" * 10**5)
    for text in (*deep, "9" * 5000, "NaN", "", "nul", '"x"', "1"):
        file.write_metadata(key, text)
        assert file.refused(), text[:20]


def test_shapes_and_places_that_the_file_does_not_have(file: File) -> None:
    name = next(key for key in file.header if key.endswith("0.weight"))
    wrong = {
        "shape": [[10**6, 10**6], [0, 2**63], [2**63, 2], [-1], ["a"], None, [1.5], []],
        "dtype": ["F64", "I64", "F8_E4M3", "F4", "C64", "no type", None, "F8_E8M0", "F6_E2M3"],
        "data_offsets": [[0, 10**15], [10, 5], [-1, 4], [0, 0], "x", [0]],
    }
    for entry, values in wrong.items():
        for value in values:
            file.write(changed(file.header, (name, entry), value))
            assert file.refused(), (entry, value)
    nothing = {"dtype": "F32", "shape": [0, 10**15], "data_offsets": [0, 0]}
    file.write({**file.header, FOREIGN: nothing})
    assert file.refused()
    for text in (b"", b"{}", b"[" * 10**5, b'{"a":' * 10**5, b"\xff\xfe"):
        file.write(text)
        assert file.refused(), text[:10]


def test_weights_of_another_kind(file: File) -> None:
    """Complex numbers would lose a part, and none of the real ones may become whole."""
    name = next(key for key in file.header if key.endswith("0.bias"))
    start, end = file.header[name]["data_offsets"]
    shape = file.header[name]["shape"]
    assert (end - start, shape) == (12, [3])
    file.write(changed(file.header, (name, "dtype"), "I32"))
    network = load_slim(file.path, make)  # whole numbers are real ones
    assert network[0].bias.dtype == torch.float32
    counted = next(key for key in file.header if key.endswith("num_batches_tracked"))
    file.write(changed(file.header, (counted, "dtype"), "F64"))
    with raises_naming("num_batches_tracked", "torch.float64", "torch.int64"):
        load_slim(file.path, make)


def test_files_that_are_none(file: File) -> None:
    whole = file.whole
    for content in (b"", b"\0" * 7, b"\xff" * 8, whole[:-1], whole[:100], whole[: 8 + file.length]):
        file.path.write_bytes(content)
        assert file.refused()
    file.path.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    assert file.refused()
    harm = file.path.with_name("harm")
    torch.save(Malicious(harm), file.path)
    assert file.refused()
    assert not harm.exists()
    file.path.unlink()
    assert file.refused()
    file.path.mkdir()
    assert file.refused()


def dense() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize("layout", ["csr", "bsr"])
def test_every_place_of_a_sparse_state_is_checked(layout: str) -> None:
    """Other names and shapes of dense weights are an error of torch, which names them."""
    network, inputs = dense(), torch.ones(2, 32)
    with torch.no_grad():
        network[0].weight[16:, 1:16] = 0
        network[0].weight[:16, :31] = 0
        if layout == "bsr":
            network[0].weight[:, 16:] = 0
            network[0].weight[16:, 0] = 0
            network[0].weight[:16, :16] = 1
    state = dict(to_sparse(network, layout, inputs).state_dict())
    assert "0.row_starts" in state
    crafted = dict(variants(state))
    for key in ("0.row_starts", "0.columns"):
        found = state[key]
        crafted |= {
            f"('{key}',): less": {**state, key: found - 1},
            f"('{key}',): beyond": {**state, key: found + 1000},
            f"('{key}',): largest": {**state, key: torch.full_like(found, 2**31 - 1)},
            f"('{key}',): shorter": {**state, key: found[:-1]},
            f"('{key}',): wide": {**state, key: found.long() + 2**40},
        }
    own = ("('0.row_starts'", "('0.columns'", "('0.values'", "():")
    for what, value in crafted.items():
        try:
            load_sparse(dense(), value)
        except ValueError as error:
            message, torchs = str(error), False
        except RuntimeError as error:
            message, torchs = str(error), True
        else:
            assert not what.startswith(own[:2]), what
            assert what.startswith(("('0.bias'", "('2.")) or what.endswith(("NaN", "negative"))
            continue
        assert "sparse layer" in message or "state" in message, what
        assert not torchs or not what.startswith(own[:3]), what


def test_a_sparse_layer_that_refused_a_state_is_empty() -> None:
    """Used all the same, it must not read the memory that the indices point to."""
    network = dense()
    with torch.no_grad():
        network[0].weight[:, 1:] = 0
    sparse = to_sparse(network, "csr", torch.ones(2, 32))
    state = {name: value.clone() for name, value in sparse.state_dict().items()}
    state["0.columns"] += 10**7
    with raises_naming("indices", "(32, 32)"):
        sparse.load_state_dict(state)
    layer = sparse[0]
    assert layer.row_starts.count_nonzero() == 0
    assert torch.equal(layer(torch.ones(2, 32)), layer.bias.expand(2, 32))


def command(capsys: pytest.CaptureFixture, words: list[str]) -> tuple[int, str]:
    code = main(words)
    return code, capsys.readouterr().err


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Exit code 1 and a message that names what is wrong, for each change; nothing is executed."""
    path, harm = tmp_path / "weights.ckpt", tmp_path / "harm"
    output = tmp_path / "small.safetensors"
    common = ["--model", "torch.nn.Linear", "--init", '{"in_features": 4, "out_features": 2}']
    common += ["--example-input", "1,4", "--output", str(output)]
    weights = {"weight": torch.ones(2, 4), "bias": torch.ones(2)}
    content = {"state_dict": weights, "hyper_parameters": {"bias": True}}
    torch.save(content, path)
    assert command(capsys, ["slim", str(path), *common])[0] == 0
    codes = []
    for what, crafted in variants({"state_dict": weights}):
        torch.save(crafted, path)
        code, message = command(capsys, ["slim", str(path), *common])
        codes.append(code)
        if code:
            assert message.startswith("lightning-wgsef: error: "), what
            assert len(message) < 600, what
    assert set(codes) == {0, 1}
    assert codes.count(1) > 60
    torch.save(content, path)
    whole = path.read_bytes()
    for wrong in (b"", b"x", whole[:100], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(wrong)
        code, message = command(capsys, ["slim", str(path), *common])
        assert (code, str(path) in message) == (1, True), wrong[:5]
    torch.save({"state_dict": weights, "more": Malicious(harm)}, path)
    for option in ([], ["--masks", str(path)]):
        code, message = command(capsys, ["slim", str(path), *common, *option])
        assert (code, "mkdir" in message) == (1, True)
    assert not harm.exists()
    for name in ("folder", "folder.safetensors"):
        (tmp_path / name).mkdir()
        code, message = command(capsys, ["slim", str(tmp_path / name), *common])
        assert (code, name in message) == (1, True)


class Tied(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.words, self.inner = nn.Embedding(9, 6), nn.Linear(6, width)
        self.outer, self.head = nn.Linear(width, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens):
        x = self.words(tokens)
        return self.head(x + self.outer(self.inner(x).tanh()))


def encoder():
    layer = nn.TransformerEncoderLayer(12, 4, 16, dropout=0.1, batch_first=True)
    return drawn(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def without_bias():
    last = nn.Conv2d(8, 4, 1, bias=False)
    return convolutions(nn.BatchNorm2d(8, affine=False), nn.Sigmoid(), last=last)


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])
BOTH = {"*self_attn": "head", "*linear1": "hidden"}
NETWORKS = {
    "filters": (lambda: convolutions(nn.BatchNorm2d(8)), "filter", [0, 7], IMAGE),
    "blocks and sums": (Residual, "structure", [0, 3], IMAGE),
    "skipped": (Residual, "layer", [1], IMAGE),
    "heads and units": (encoder, BOTH, [1, 4, 5, 10], SEQUENCE),
    "tied": (Tied, "hidden", [1], TOKENS),
    "norms of torch": (
        lambda: nn.Sequential(nn.Linear(12, 8), nn.RMSNorm(8), nn.Linear(8, 2)),
        "channel",
        [],
        SEQUENCE,
    ),
}


def made(kind):
    """How to make the network, a slim one, and its example."""
    make, grouping, dead, example = NETWORKS[kind]
    traced = example if grouping in ("structure", "layer") else None
    return make, slim(pruned(drawn(make()), grouping, *dead, example=traced), example), example


@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_read_is_what_was_written(kind, tmp_path):
    make, small, example = made(kind)
    save_slim(small, tmp_path / "small.safetensors")
    assert os.listdir(tmp_path) == ["small.safetensors"]
    again = load_slim(tmp_path / "small.safetensors", make)
    assert [name for name, _ in again.named_parameters()] == [
        name for name, _ in small.named_parameters()
    ]
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in small.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(example), small.eval()(example))
    assert str(again) == str(small)
    save_slim(again, tmp_path / "again.safetensors")  # it can be made smaller once more
    assert [x.kept for x in again.slimming.plans] == [x.kept for x in small.slimming.plans]


def test_others_may_read_it_as_any_new_file(tmp_path):
    _, small, _ = made(next(iter(NETWORKS)))
    save_slim(small, tmp_path / "small.safetensors")
    (tmp_path / "another").touch()
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_bias_that_was_added(tmp_path):
    network = silent(without_bias(), 1)
    with torch.no_grad():
        network[1].running_mean[1] = network[0].bias[1] = 0  # else training differs
    small = slim(network, IMAGE)
    assert small[3].bias is not None
    save_slim(small, tmp_path / "small.safetensors")
    again = load_slim(tmp_path / "small.safetensors", without_bias)
    assert torch.equal(again[3].bias, small[3].bias)


def test_ties_survive(tmp_path):
    make, small, _ = made("tied")
    save_slim(small, tmp_path / "small.safetensors")
    again = load_slim(tmp_path / "small.safetensors", make)
    assert again.head.weight is again.words.weight


def test_two_rounds(tmp_path):
    make, small, _ = made("filters")
    smaller = slim(pruned(small, "filter", 0), IMAGE)
    assert len(smaller.slimming.plans) == 2
    save_slim(smaller, tmp_path / "small.safetensors")
    assert load_slim(tmp_path / "small.safetensors", make)[0].out_channels == 5


def test_the_file_holds_numbers_and_json(tmp_path):
    _, small, _ = made("filters")
    save_slim(small, tmp_path / "small.safetensors")
    with safetensors.safe_open(tmp_path / "small.safetensors", framework="pt") as file:
        plans = json.loads(file.metadata()["plans"])
    assert plans[0]["kept"]["0.weight"] == {"0": [1, 2, 3, 4, 5, 6]}


# --- mistakes ----------------------------------------------------------------------------------


def refused(path, make, *words):
    with raises_naming(*words):
        load_slim(path, make)


def test_no_such_file(tmp_path):
    refused(tmp_path / "none", Residual, "no file", "none")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_truncated(share, tmp_path):
    make, small, _ = made("filters")
    path = tmp_path / "small.safetensors"
    save_slim(small, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    refused(path, make, "truncated", "small.safetensors")


def test_another_kind_of_file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"a": torch.ones(1)}, path)
    refused(path, Residual, "save_slim", "None")
    torch.save({"a": torch.ones(1)}, path)
    refused(path, Residual, "no safetensors file")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Tied(5), ["make_model", "Tied"]),
        (lambda: Tied(9), ["make_model", "Tied"]),
        (Residual, ["make_model", "Tied"]),
        (lambda: nn.Sequential(Tied()), ["make_model", "Tied"]),
        (nn.Flatten, ["make_model", "Tied"]),
    ],
)
def test_another_network(make, words, tmp_path):
    _, small, _ = made("tied")
    path = tmp_path / "small.safetensors"
    save_slim(small, path)
    if make().__class__ is Tied and make().inner.out_features == 9:
        again = load_slim(path, make)  # what is kept is there: it is the same network after all
        assert again.inner.out_features == 7
    else:
        refused(path, make, *words)


@pytest.mark.parametrize(
    "header", [{}, {"plans": "[]"}, {"plans": "[1]", "tied": "{}"}, {"plans": "[{", "tied": "{}"}]
)
def test_a_damaged_header(header, tmp_path):
    path = tmp_path / "small.safetensors"
    file_format = {"format": "lightning_wgsef slim network, version 1"}
    save_file({"a": torch.ones(1)}, path, {**file_format, **header})
    refused(path, Residual, "header", "damaged")


def test_heads_of_something_else(tmp_path):
    _, small, _ = made("heads and units")
    path = tmp_path / "small.safetensors"
    save_slim(small, path)

    def other():
        network = encoder()
        network.layers[0].self_attn = nn.Linear(12, 12)
        return network

    refused(path, other, "make_model", "layers.0.self_attn")


def test_a_network_that_is_not_slim(tmp_path):
    with raises_naming("model", "slim", "Residual"):
        save_slim(Residual(), tmp_path / "small.safetensors")
    assert os.listdir(tmp_path) == []


def test_a_path_that_cannot_be_written(tmp_path):
    _, small, _ = made("filters")
    with raises_naming("path", "missing"):
        save_slim(small, tmp_path / "missing" / "small.safetensors")
    assert os.listdir(tmp_path) == []


def test_nothing_is_left_of_a_file_that_could_not_be_finished(tmp_path, monkeypatch):
    _, small, _ = made("filters")
    path = tmp_path / "small.safetensors"
    save_slim(small, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightning_wgsef.slimming.files.save_file", full)
    with raises_naming("small.safetensors", "No space left"):
        save_slim(small, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["small.safetensors"]
