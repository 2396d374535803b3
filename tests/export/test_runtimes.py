"""Files that other runtimes load: the outputs are the model's, or there is no file."""

import copy
import importlib
import math
import sys

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_wgsef.export import runtimes as export
from lightning_wgsef.export.runtimes import export_onnx, export_program
from lightning_wgsef.export.sparse_storage import to_sparse
from lightning_wgsef.network.equivalence import relative_difference
from lightning_wgsef.slimming.slim import slim
from tests.helpers.groups import raises_naming

NAN, INF = math.nan, math.inf
EXPORTS = {"onnx": export_onnx, "program": export_program}
every_format = pytest.mark.parametrize("kind", EXPORTS)


class Images(pl.LightningModule):
    """A norm whose mode matters, dropout, and outputs that are not in the order of their names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(4, 5)
        self.norm.running_mean.uniform_()

    def forward(self, images, scale=None):
        features = self.dropout(torch.relu(self.norm(self.conv(images))).mean((2, 3)))
        logits = self.head(features)
        return {"b": logits if scale is None else logits * scale[:, None], "a": features}

    def training_step(self, batch):
        return self(batch)["b"].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def outputs_of(path, kind, inputs, *, by_name=False):
    """What another runtime returns, loaded as its users would."""
    if kind == "program":
        network = torch.export.load(path).module()
        return list((network(**inputs) if by_name else network(*inputs.values())).values())
    session = importlib.import_module("onnxruntime").InferenceSession(str(path))
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return [torch.from_numpy(x) for x in session.run(None, arrays)]


def same(found, expected):
    return len(found) == len(expected) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=1e-5)
        for one, other in zip(found, expected, strict=True)
    )


@every_format
@pytest.mark.parametrize("example", ["tensor", "tuple", "dict"])
def test_outputs_of_any_batch_size(tmp_path, kind, example):
    model, path = Images().eval(), tmp_path / "model.pt2"
    scaled = {"scale": torch.tensor([2.0, 3.0]), "images": IMAGES}  # not in order of the arguments
    given = {"tensor": IMAGES, "tuple": (IMAGES, scaled["scale"]), "dict": scaled}[example]
    EXPORTS[kind](model, path, given)
    more = {} if example == "tensor" else {"scale": torch.arange(5.0)}
    with torch.no_grad():
        expected = list(model(OTHER, **more).values())
        found = outputs_of(path, kind, {"images": OTHER, **more}, by_name=example == "dict")
        assert same(found, expected)
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]


@every_format
def test_an_example_of_one_sample_and_the_mode_of_evaluation(tmp_path, kind):
    model, path = Images().train(), tmp_path / "model.pt2"
    EXPORTS[kind](model, path, IMAGES[:1])
    with torch.no_grad():
        expected = list(copy.deepcopy(model).eval()(OTHER).values())
        assert same(outputs_of(path, kind, {"images": OTHER}), expected)
        assert not same(list(model(OTHER).values()), expected)


@every_format
def test_token_numbers(tmp_path, kind):
    """Integers are drawn from those of the example: others would be out of the vocabulary."""
    torch.manual_seed(0)
    model, path = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), tmp_path / "model"
    before = torch.random.get_rng_state()
    EXPORTS[kind](model, path, torch.tensor([[0, 3, 6], [1, 2, 5]]))
    assert path.is_file()
    assert torch.equal(torch.random.get_rng_state(), before)  # drawn from numbers of their own


@every_format
def test_a_model_with_a_trainer_is_left_as_it_was(tmp_path, kind):
    model = Images()
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", **dict.fromkeys(off, False))
    trainer.fit(model, torch.utils.data.DataLoader(IMAGES, batch_size=2))
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(module) or output + 1)
    model.train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "model.pt2"
    EXPORTS[kind](model, path, IMAGES)
    assert model.trainer is trainer
    assert model.training
    assert not model.norm.training
    assert len(model.head._forward_hooks) == 1
    assert model.head not in seen  # a copy was run
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():  # the hook is a part of what the model computes
        expected = copy.deepcopy(model).eval()(OTHER)["b"]
        found = outputs_of(path, kind, {"images": OTHER})[0]
        assert same([found], [expected])


# --- what is refused, and that it leaves no file -------------------------------------------------


def tampered_onnx(monkeypatch, change):
    right = torch.onnx.export

    def wrong(network, args, path, **more):
        right(network, args, path, **more)
        onnx = importlib.import_module("onnx")
        model = onnx.load(path)
        for weight in model.graph.initializer:
            values = onnx.numpy_helper.to_array(weight).copy()
            if values.ndim == 2:
                weight.CopyFrom(onnx.numpy_helper.from_array(change(values), weight.name))
        onnx.save(model, path)

    monkeypatch.setattr(torch.onnx, "export", wrong)


def tampered_program(monkeypatch, change):
    right = torch.export.save

    def wrong(program, file):
        weight = program.state_dict["head.weight"]
        with torch.no_grad():
            weight.copy_(torch.from_numpy(change(weight.numpy().copy())))
        right(program, file)

    monkeypatch.setattr(torch.export, "save", wrong)


TAMPERED = {"onnx": tampered_onnx, "program": tampered_program}


def first_weight_off(values):
    values.flat[0] += 0.01
    return values


def rows_in_another_order(values):
    return values[::-1].copy() if len(values) == 5 else values[:, ::-1].copy()


@every_format
@pytest.mark.parametrize("change", [first_weight_off, rows_in_another_order])
def test_a_tampered_weight_is_refused(tmp_path, monkeypatch, kind, change):
    TAMPERED[kind](monkeypatch, change)
    (tmp_path / "model").write_text("the file of before")
    with raises_naming("Images", "differs on the example by", "tolerance"):
        EXPORTS[kind](Images(), tmp_path / "model", IMAGES)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model").read_text() == "the file of before"


def test_tolerance_is_a_share_of_the_largest_output(tmp_path, monkeypatch):
    tampered_onnx(monkeypatch, first_weight_off)
    export_onnx(Images(), tmp_path / "model", IMAGES, tolerance=0.5)
    with raises_naming("tolerance", "-1"):
        export_onnx(Images(), tmp_path / "model", IMAGES, tolerance=-1)


def test_a_runtime_that_needs_a_setting_for_the_same_outputs_is_warned_of(tmp_path, monkeypatch):
    """As sums of int8 do on a processor without VNNI; the file is right, and is there."""
    right = export._onnx_outputs

    def overflowing(path, settings):
        run = right(path, settings)
        return run if settings else lambda inputs: [x * 0.7 for x in run(inputs)]

    monkeypatch.setattr(export, "_onnx_outputs", overflowing)
    model = Images().eval()
    with pytest.warns(UserWarning, match=r"add_session_config_entry\('session.x64quantprecision'"):
        export_onnx(model, tmp_path / "model", IMAGES)
    with torch.no_grad():
        expected = list(model(OTHER).values())
    assert same(outputs_of(tmp_path / "model", "onnx", {"images": OTHER}), expected)


class WrongElsewhere(nn.Linear):
    """Right only for as many samples as the example has."""

    def forward(self, inputs):
        return super().forward(inputs) + (len(inputs) != 2)

    def module(self):
        return self


def test_a_difference_at_another_batch_size_is_refused(tmp_path, monkeypatch):
    model, wrong = nn.Linear(3, 2), WrongElsewhere(3, 2)
    wrong.load_state_dict(model.state_dict())
    monkeypatch.setattr(torch.export, "load", lambda file: wrong)
    with raises_naming("differs on random inputs"):
        export_program(model, tmp_path / "model", torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []


class DependsOnBatch(nn.Module):
    def forward(self, inputs):
        return inputs * int(inputs.shape[0])


class Branches(nn.Module):
    def forward(self, inputs):
        return inputs if inputs.sum() > 0 else -inputs


def sparse_layer():
    layer = nn.Linear(6, 60)
    layer.weight.data[:, 1:] = 0
    return to_sparse(layer, "csr", IMAGES)


@every_format
@pytest.mark.parametrize("model", [DependsOnBatch(), Branches(), sparse_layer()])
def test_what_cannot_be_exported(tmp_path, kind, model):
    with raises_naming(type(model).__name__):
        EXPORTS[kind](model, tmp_path / "model", IMAGES)
    assert list(tmp_path.iterdir()) == []


@every_format
def test_a_wrong_example(tmp_path, kind):
    with raises_naming("example_input", "(2, 2, 6, 6)"):
        EXPORTS[kind](Images(), tmp_path / "model", IMAGES[:, :2])
    with raises_naming("example_input", "shape ()"):
        EXPORTS[kind](Images(), tmp_path / "model", torch.tensor(1.0))
    assert list(tmp_path.iterdir()) == []


@every_format
def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(export, "model_copy", lambda model: pytest.fail("the work has begun"))
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing" / "model", tmp_path, tmp_path / "file" / "model"):
        with raises_naming("path", str(path)):
            EXPORTS[kind](Images(), path, IMAGES)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with raises_naming(package, "pip install 'lightning-wgsef[onnx]'"):
        export_onnx(Images(), tmp_path / "model", IMAGES)
    assert list(tmp_path.iterdir()) == []
    export_program(Images(), tmp_path / "model", IMAGES)


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, -8.0], [3.0, -8.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([1e-9], [0.0], INF),
        ([NAN, -INF, 2.0], [NAN, -INF, 4.0], 0.5),
        ([NAN], [1.0], INF),
        ([1.0], [NAN], INF),
        ([INF, 1.0], [-INF, 1.0], INF),
        ([], [], 0.0),
    ],
)
def test_differences(found, expected, difference):
    assert relative_difference([torch.tensor(found)], [torch.tensor(expected)]) == difference


def test_differences_of_kind():
    one = torch.ones(2)
    assert relative_difference([one, one], [one]) == INF
    assert relative_difference([one.double()], [one]) == INF
    assert relative_difference([torch.tensor([1, 3])], [torch.tensor([1, 2])]) == INF
    assert relative_difference([one, one * 0.9], [one, one]) == pytest.approx(0.1)


class Attention(nn.Module):
    def __init__(self, encoder):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.out = encoder, nn.Linear(16, 3)

    def forward(self, x):
        y = self.encoder(x) if not isinstance(self.encoder, nn.MultiheadAttention) else None
        y = self.encoder(x, x, x, need_weights=False)[0] if y is None else y
        return self.out(y.mean(1))


@every_format
@pytest.mark.parametrize(
    "encoder",
    [
        nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True, add_zero_attn=True),
        nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True),
    ],
    ids=["attention", "layer"],
)
def test_attention_without_some_heads_is_exported_at_any_batch_length(tmp_path, kind, encoder):
    network = Attention(encoder).eval()
    attention = getattr(encoder, "self_attn", encoder)
    attention.out_proj.weight.data[:, 4:12] = 0
    small = slim(network, torch.randn(2, 5, 16))
    assert attention.num_heads == 4
    assert getattr(small.encoder, "self_attn", small.encoder).num_heads == 2
    path = tmp_path / "small.out"
    EXPORTS[kind](small, path, torch.randn(2, 5, 16))
    for batch in (1, 2, 7):
        inputs = torch.randn(batch, 5, 16)
        (found,) = outputs_of_one(path, kind, inputs)
        assert relative_difference([found], [network(inputs).detach()]) < 1e-4


def outputs_of_one(path, kind, inputs):
    if kind == "program":
        return [torch.export.load(path).module()(inputs).detach()]
    session = importlib.import_module("onnxruntime").InferenceSession(str(path))
    return [torch.from_numpy(x) for x in session.run(None, {"x": inputs.numpy()})]
