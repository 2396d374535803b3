"""Slim and sparse files, and those of the command line, that were damaged or made to do harm."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crafted import FOREIGN, WRONG_VALUES, Malicious, at, changed, places, variants
from helpers import raises_naming
from torch import Tensor, nn

from lightning_wgsef import load_slim, load_sparse, save_slim, slim, slim_files, to_sparse
from lightning_wgsef.cli import main

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
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
    assert [what for what in accepted if not what.startswith(harmless)] == []
    assert len(accepted) < 40


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
