"""Networks with sparse weights return what the dense ones do, and say what they store."""

import copy
import io

import pytest
import torch
from torch import nn

from lightning_wgsef.export import sparse_storage as sparse_storage
from lightning_wgsef.export.sparse_storage import SparseLinear, load_sparse, to_sparse
from tests.helpers.groups import raises_naming


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks_alive(rows, columns, alive):
    """A mask in which the 16x16 blocks at these places are one."""
    mask = torch.zeros(rows // 16, columns // 16)
    mask[tuple(torch.tensor(alive).T)] = 1
    return mask.repeat_interleave(16, 0).repeat_interleave(16, 1)


@pytest.fixture
def network():
    """Layer 0 has 2 of 12 blocks, layer 2 no zero, layer 4 one of five rows."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 16, bias=False), nn.ReLU(), nn.Linear(16, 5)
    )
    with torch.no_grad():
        model[0].weight.mul_(blocks_alive(64, 48, [(0, 1), (3, 2)]))
        model[4].weight[1:] = 0
    return model


EXAMPLE, IMAGES = drawn(7, 48), drawn(2, 3, 6, 6)
both = pytest.mark.parametrize("layout", ["csr", "bsr"])


def same(one, other, bound=1e-5):
    return one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=bound)


def notes(model):
    return {layer.name: layer.note for layer in model.storage.layers if layer.layout == "dense"}


@both
@pytest.mark.parametrize("shape", [(7, 48), (1, 48), (48,), (2, 3, 48), (1, 1, 48), (0, 48)])
def test_outputs_are_those_of_the_dense_network(network, layout, shape):
    sparse, inputs = to_sparse(network, layout, EXAMPLE), drawn(*shape, seed=1)
    assert isinstance(sparse[0], SparseLinear)
    assert same(sparse(inputs), network(inputs))
    assert sparse[0](inputs).is_contiguous()  # models call `view` on it
    with torch.inference_mode():
        assert same(copy.deepcopy(sparse)(inputs), network(inputs))
    sparse = to_sparse(network.double(), layout, EXAMPLE.double())
    assert same(sparse(inputs.double()), network(inputs.double()), 1e-12)


@both
def test_exactly_the_weights_that_are_not_zero_are_stored(network, layout):
    sparse = to_sparse(network, layout, EXAMPLE)
    assert torch.equal(sparse[0].weight.to_dense(), network[0].weight)
    assert sparse[0].values.numel() == 2 * 256
    assert {name for name, _ in sparse.named_parameters()} == {
        *("0.values", "0.bias", "2.weight", "4.bias"),
        "4.values" if layout == "csr" else "4.weight",
    }


def test_what_does_not_fit_or_gets_larger_stays_dense(network):
    reason = "blocks of (16, 16) do not divide its shape (5, 16)"
    assert notes(to_sparse(network, "bsr", EXAMPLE))["4"] == reason
    network[4].weight.data[:] = drawn(5, 16)
    network[4].weight.data[0, 0] = 0
    reason = f"csr would take {79 * 8 + 24} bytes, not less than 320"
    assert notes(to_sparse(network, "csr", EXAMPLE))["4"] == reason


def test_the_model_itself_is_not_touched(network):
    network.train()
    network[2].eval()
    before = copy.deepcopy(network.state_dict())
    sparse = to_sparse(network, "csr", EXAMPLE)
    assert [type(module) for module in network] == [nn.Linear, nn.ReLU] * 2 + [nn.Linear]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    for model in (network, sparse):
        assert [x.training for x in model.modules()] == [True, True, True, False, True, True]
        assert not any(module._forward_pre_hooks for module in model.modules())
    assert not hasattr(network, "storage")


def test_gradients_flow_through_other_layers(network):
    sparse = to_sparse(network, "csr", EXAMPLE)
    sparse(EXAMPLE).sum().backward()
    assert {name for name, p in sparse.named_parameters() if p.grad is not None} == {"2.weight"}
    network(EXAMPLE).sum().backward()
    assert same(sparse[2].weight.grad, network[2].weight.grad, 1e-4)


# --- what stays dense ----------------------------------------------------------------------------


class Mixed(nn.Module):
    """Layers that stay dense for five reasons, and one that is stored sparse."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.embedding, self.tied = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
        self.tied.weight = self.embedding.weight
        self.hooked, self.unused, self.used = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9)
        self.masked = nn.Linear(9, 9)
        self.hooked.register_forward_hook(lambda module, args, output: output + 1)
        nn.utils.parametrize.register_parametrization(self.masked, "weight", nn.ReLU())
        for parameter in self.parameters():
            parameter.data.view(-1)[1:] = 0

    def forward(self, images):
        return self.masked(self.used(self.hooked(self.tied(self.conv(images).mean((2, 3))))))


def test_what_stays_dense_is_listed_with_the_reason():
    torch.manual_seed(0)
    network = Mixed()
    sparse = to_sparse(network, "csr", IMAGES)
    assert isinstance(sparse.used, SparseLinear)
    assert notes(sparse) == {
        "conv": "torch has no sparse product for Conv2d",
        "tied": "its weight is that of 'embedding' (tied)",
        "hooked": "it has hooks",
        "unused": "the forward pass does not call it",
        "masked": "its weight is computed from other tensors (a parametrisation); "
        "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight') makes it a parameter",
    }
    assert same(sparse(IMAGES), network(IMAGES))


def test_two_layers_with_one_weight_stay_dense(network):
    network[2] = nn.Linear(64, 48)
    network[4] = nn.Linear(48, 64)
    network[4].weight = network[0].weight
    found = notes(to_sparse(network, "csr", EXAMPLE))
    assert found["0"] == "its weight is shared with another module (tied)"
    assert found["4"] == "its weight is that of '0' (tied)"


def test_a_layer_used_twice_is_stored_once(network):
    square = nn.Linear(48, 48)
    square.weight.data.mul_(blocks_alive(48, 48, [(0, 2)]))
    twice = nn.Sequential(square, nn.ReLU(), square)
    sparse = to_sparse(twice, "bsr", EXAMPLE)
    assert isinstance(sparse[0], SparseLinear)
    assert sparse[0] is sparse[2]
    assert same(sparse(EXAMPLE), twice(EXAMPLE))


@both
def test_attention_of_torch_still_runs(layout):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    network = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    for name, parameter in network.named_parameters():
        if "linear" in name or "out_proj" in name:
            parameter.data[1:] = 0
    sparse = to_sparse(network, layout, inputs := drawn(2, 5, 16))
    assert len(notes(sparse)) == 3
    assert "nn.TransformerEncoderLayer takes dense" in notes(sparse)["layers.0.linear1"]
    assert same(sparse(inputs), network(inputs))
    with torch.no_grad():
        assert same(sparse(inputs), network(inputs))


def test_what_torch_cannot_do_stays_dense(network):
    reason = notes(to_sparse(network, "bsr", EXAMPLE, blocksize=(16, 8)))["0"]
    assert "non-square blocks" in reason
    reason = notes(to_sparse(network.bfloat16(), "csr", EXAMPLE.bfloat16()))["0"]
    assert "torch cannot do this here" in reason
    assert "BFloat16" in reason


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "blocksize", "words"),
    [
        ("coo", (16, 16), ("layout", "'bsr'", "'csr'", "'2:4'", "'coo'")),
        ("bsr", (16,), ("blocksize", "(16,)")),
        ("bsr", (0, 16), ("blocksize", "(0, 16)")),
        ("bsr", (16, 1.5), ("blocksize", "(16, 1.5)")),
        ("csr", (16, 16), ("example_input", "(7, 47)")),
    ],
)
def test_wrong_arguments(network, layout, blocksize, words):
    with raises_naming(*words):
        to_sparse(network, layout, EXAMPLE[:, 1:], blocksize=blocksize)


@pytest.mark.parametrize(
    ("pattern", "columns", "words"),
    [
        ([0.0, 1.0, 1.0, 0.0], 8, ("needs a CUDA device", "cpu")),
        ([0.0, 1.0, 0.0, 0.0], 8, ("needs a CUDA device", "cpu")),
        ([0.0, 1.0, 1.0, 1.0], 8, ("at most 2 of every 4", "(5, 8)")),
        ([0.0, 1.0], 6, ("at most 2 of every 4", "(5, 6)")),  # rows that end within four
    ],
)
def test_two_of_four(pattern, columns, words):
    network = nn.Sequential(nn.Linear(columns, 5))
    network[0].weight.data.copy_(torch.tensor(pattern).repeat(columns)[:columns])
    with raises_naming("'2:4'", "'0'", *words):
        to_sparse(network, "2:4", torch.ones(1, columns))


def moved_column(layer):
    layer.columns[0] = 0


def scaled_value(layer):
    layer.values.data.view(-1)[0] *= 1.01


@pytest.mark.parametrize("fault", [moved_column, scaled_value])
def test_a_wrong_layer_is_named(network, monkeypatch, fault):
    right = SparseLinear.__init__

    def wrong(self, weight, bias):
        right(self, weight, bias)
        fault(self)

    monkeypatch.setattr(SparseLinear, "__init__", wrong)
    with raises_naming("layer '0'", "differ"):
        to_sparse(network, "csr", EXAMPLE)


def test_wrong_outputs_are_refused(network, monkeypatch):
    right = sparse_storage._replaced

    def wrong(model, replacements):
        model = right(model, replacements)
        model[2].weight.data[0] = 1
        return model

    monkeypatch.setattr(sparse_storage, "_replaced", wrong)
    with raises_naming("the outputs", "differ"):
        to_sparse(network, "csr", EXAMPLE)


# --- states --------------------------------------------------------------------------------------


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@both
def test_a_state_makes_a_round_trip(network, layout):
    sparse = to_sparse(network, layout, EXAMPLE)
    others = copy.deepcopy(sparse), copy.deepcopy(network).eval()
    for parameter in (p for model in others for p in model.parameters()):
        parameter.data.fill_(1)
    others[0].load_state_dict(saved(sparse))
    loaded = load_sparse(others[1], saved(sparse))
    for again in (others[0], loaded):
        assert torch.equal(again(EXAMPLE), sparse(EXAMPLE))
        assert again.state_dict().keys() == sparse.state_dict().keys()
    assert type(others[1][0]) is nn.Linear
    assert not loaded[0].training


def test_a_model_that_is_a_layer(network):
    sparse = to_sparse(network[0], "csr", EXAMPLE)
    assert isinstance(sparse, SparseLinear)
    assert same(sparse(EXAMPLE), network[0](EXAMPLE))
    again = load_sparse(nn.Linear(48, 64), saved(sparse))
    assert torch.equal(again(EXAMPLE), sparse(EXAMPLE))


def test_an_index_beyond_the_matrix_is_refused(network):
    sparse = to_sparse(network, "csr", EXAMPLE)
    state = saved(sparse)
    state["0.columns"][-1] = 48
    for load in (sparse.load_state_dict, lambda state: load_sparse(network, state)):
        with raises_naming("indices", "(64, 48)"):
            load(state)


def test_a_state_of_another_network_is_refused(network):
    state = saved(to_sparse(network, "csr", EXAMPLE))
    with raises_naming("'0'", "nn.Linear"):
        load_sparse(nn.ReLU(), state)
    with pytest.raises(RuntimeError, match=r"4\.bias"):
        load_sparse(nn.Sequential(*network[:4], nn.Linear(16, 5, bias=False)), state)
