"""The residual stream of a transformer as one set: found, taken out exactly, loaded again."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from lightning_wgsef import group_parameters, load_slim, save_slim, slim
from lightning_wgsef.network.surgery import RemovalPlan
from tests.helpers.removal import NEGLIGIBLE, difference, drawn, removal

TOKENS = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 8, bias=False) for _ in range(3))
        self.o_proj, self.num_heads = nn.Linear(8, 12, bias=False), 2

    def forward(self, x):
        heads = [
            layer(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        ]
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class OneMore(nn.RMSNorm):
    """As Gemma has it: the scale is 1 + weight."""

    def forward(self, x):
        return functional.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class Decoder(nn.Module):
    """Two blocks on a stream of twelve channels, which is not what it returns."""

    def __init__(self, norm, tied=False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.attention = nn.ModuleList(Attention() for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(12, 16) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(16, 12) for _ in range(2))
        self.norms = nn.ModuleList(norm(12) for _ in range(5))
        self.head = nn.Linear(12, 20, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for number in range(2):
            x = x + self.attention[number](self.norms[2 * number](x))
            up = self.up[number](self.norms[2 * number + 1](x))
            x = x + self.down[number](functional.silu(up))
        return self.head(self.norms[4](x))


def rms(width):
    """With an epsilon that counts."""
    return nn.RMSNorm(width, eps=0.1)


@pytest.mark.parametrize("norm", [rms, lambda width: OneMore(width, eps=0.1), nn.RMSNorm])
@pytest.mark.parametrize("tied", [False, True])
def test_zero_channels_of_the_stream_are_taken_out(norm, tied, tmp_path):
    """In float64, with what the norms divide by; the file and other inputs give the same."""
    found = removal(Decoder(norm, tied).double(), TOKENS, {"*": "stream"})
    (layer,) = found.groups.layers
    assert (layer.count, layer.grouping, layer.removable) == (12, "stream", True)
    assert {m.name for m in layer.members} >= {"embedding.weight", "down.1.weight", "down.1.bias"}
    assert {f"norms.{n}.weight" for n in range(5)} <= {m.name for m in layer.members}
    assert found.small.embedding.weight.shape == (20, 6)
    assert found.small.attention[1].o_proj.weight.shape == (6, 8)
    assert (found.small.head.weight is found.small.embedding.weight) == tied
    other = torch.arange(20).view(4, 5)
    assert difference(found.zeroed, found.small, other) < NEGLIGIBLE
    save_slim(found.small, tmp_path / "small.safetensors")
    again = load_slim(tmp_path / "small.safetensors", lambda: Decoder(norm, tied).double())
    assert difference(found.small, again, other) == 0


def test_include_names_the_stream_of_structure():
    """What `structure` reserves is grouped by its name, and as removable."""
    network = drawn(Decoder(rms))
    left_out = group_parameters(network, "structure", example_input=TOKENS).left_out
    (name,) = [name for name, why in left_out.items() if why.startswith("residual stream of")]
    groups = group_parameters(network, "structure", example_input=TOKENS, include=name)
    assert [(x.name, x.count, x.removable) for x in groups.layers] == [(name, 12, True)]


def test_what_is_divided_by_matters(monkeypatch):
    """Planted fault: without the change of the norms the outputs differ, and nothing goes."""
    monkeypatch.setattr("lightning_wgsef.network.surgery._rescale", lambda *_: None)
    network = drawn(Decoder(rms))
    groups = group_parameters(network, "stream", example_input=TOKENS)
    assert "normalises over these channels" in groups.layers[0].obstacle


def test_layer_norm_says_why_nothing_can_go():
    groups = group_parameters(drawn(Decoder(nn.LayerNorm)), "stream", example_input=TOKENS)
    assert "it subtracts their mean" in groups.layers[0].obstacle
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="no residual stream"):
        group_parameters(plain, "stream", example_input=torch.ones(2, 4))


def test_a_file_that_asks_for_more_channels_is_refused():
    plan = RemovalPlan(norms={"0": (4, 2)})
    with pytest.raises(ValueError, match="does not normalise by the mean square"):
        plan.apply(nn.Sequential(nn.LayerNorm(4)))


def test_from_pretrained(tmp_path):
    """Hidden size and epsilon are in the configuration; Gemma multiplies by the hidden size."""
    sizes = {
        "vocab_size": 20,
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "rms_norm_eps": 0.1,
        "pad_token_id": 0,
    }
    example = {"input_ids": TOKENS}
    torch.manual_seed(0)
    llama = drawn(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)))
    gemma = drawn(transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes)))
    for network in (llama.double(), gemma.double()):  # their norms are float32 in any case
        groups = group_parameters(network, "stream", example_input=example)
        groups.scale_((torch.arange(12) % 2).float())
        small = slim(copy.deepcopy(network), example)
        assert difference(network, small, example) < 1e-6
        if network is llama:
            assert (small.config.hidden_size, small.config.rms_norm_eps) == (6, 0.2)
            small.save_pretrained(tmp_path)
            again = type(network).from_pretrained(tmp_path, dtype=torch.float64)
            assert difference(again, small, example) < 1e-6
        else:
            assert "computes other numbers from the new sizes" in small.slimming.kept["config"]
            assert small.config.hidden_size == 12
