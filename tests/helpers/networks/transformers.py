"""Small transformers, with every weight drawn anew, and what the tests of their groups share."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_wgsef import Groups
from tests.helpers.groups import without


def drawn(network, seed=0, scale=0.7):
    """The network in eval mode, all weights and biases different from zero and from each other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return network.eval()


def given(*shape):
    """Inputs, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


class GroupedQueryAttention(nn.Module):
    """Four heads of queries of width 3, on ``key_value_heads`` of keys and values."""

    num_heads = 4

    def __init__(self, key_value_heads=2, fused=False):
        super().__init__()
        self.key_value_heads = self.num_key_value_heads = key_value_heads
        widths = (12, 3 * key_value_heads, 3 * key_value_heads)
        self.fused = fused
        if fused:
            self.qkv = nn.Linear(8, sum(widths))
            self.proj = nn.Linear(12, 8)
        else:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, width) for width in widths)
            self.o_proj = nn.Linear(12, 8)

    @property
    def last(self):
        return self.proj if self.fused else self.o_proj

    def forward(self, inputs):
        if self.fused:
            width = 3 * self.key_value_heads
            projected = self.qkv(inputs).split([12, width, width], -1)
        else:
            projected = [layer(inputs) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        queries, keys, values = (part.unflatten(-1, (-1, 3)).transpose(1, 2) for part in projected)
        keys, values = (
            part.repeat_interleave(self.num_heads // self.key_value_heads, 1)
            for part in (keys, values)
        )
        mixed = functional.scaled_dot_product_attention(queries, keys, values)
        return self.last(mixed.transpose(1, 2).flatten(2))


class GatedUnits(nn.Module):
    """SwiGLU with the names of the first Llama."""

    def __init__(self, inputs=4, units=6, names=("w1", "w2", "w3"), norm=None):
        super().__init__()
        self.names = names
        gate, down, up = names
        self.add_module(gate, nn.Linear(inputs, units))
        self.add_module(down, nn.Linear(units, inputs))
        self.add_module(up, nn.Linear(inputs, units))
        self.norm = nn.Identity() if norm is None else norm(units)

    def forward(self, inputs):
        gate, down, up = (getattr(self, name) for name in self.names)
        return down(self.norm(functional.silu(gate(inputs)) * up(inputs)))


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 30}
BLOCK = {**SIZES, "intermediate_size": 24}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Model, config, path of the second layer's attention, its output projection, width of one group's
# columns; path of that layer's first hidden layers, and of the second.
HUGGING_FACE = {
    "Llama": (
        {**BLOCK, **SPECIAL, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
        ("layers.1.self_attn", "o_proj", 8),
        (["layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"], "layers.1.mlp.down_proj"),
    ),
    "Qwen3": (
        {**BLOCK, **SPECIAL, "num_key_value_heads": 2, "head_dim": 6},
        ("layers.1.self_attn", "o_proj", 12),
        (["layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"], "layers.1.mlp.down_proj"),
    ),
    "Bert": (
        BLOCK,
        ("encoder.layer.1.attention", "output.dense", 4),
        (["encoder.layer.1.intermediate.dense"], "encoder.layer.1.output.dense"),
    ),
    "ViT": (
        {**SIZES, "intermediate_size": 24, "image_size": 8, "patch_size": 4},
        ("layers.1.attention", "o_proj", 4),
        (["layers.1.mlp.fc1"], "layers.1.mlp.fc2"),
    ),
    "GPT2": (
        {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 30, "n_inner": 24, **SPECIAL},
        ("h.1.attn", "c_proj", 4),
        (["h.1.mlp.c_fc"], "h.1.mlp.c_proj"),
    ),
}


def hugging_face(kind):
    """A model, its inputs, and where its second layer keeps what."""
    transformers = pytest.importorskip("transformers")
    sizes, attention, units = HUGGING_FACE[kind]
    config = getattr(transformers, f"{kind}Config")(**sizes)
    # Small weights keep the attention away from looking at one place only.
    model = drawn(getattr(transformers, f"{kind}Model")(config), scale=0.4)
    if kind == "ViT":
        return model, {"pixel_values": given(2, 3, 8, 8)}, attention, units
    return model, {"input_ids": torch.tensor([[3, 17, 8, 29, 5]])}, attention, units


def output_of(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state if isinstance(inputs, dict) else model(inputs)


def zeroed(network, grouping, layer, number):
    """A copy in which one group of the layer is zero."""
    pruned = copy.deepcopy(network)
    found = {x.name: x for x in grouping(pruned).layers}
    without(Groups([found[layer]]), number)
    return pruned


def apart(one, other):
    """Largest difference, in units of the largest value."""
    return float((one - other).abs().max() / one.abs().max())


def shifted(grouping, member_name, by):
    """The grouping with a planted mistake: slices of one member belong to the wrong groups."""

    def wrong(model):
        layers = []
        for layer in grouping(model).layers:
            members = tuple(
                replace(member, index=_index(member).roll(by))
                if member.name == member_name
                else member
                for member in layer.members
            )
            layers.append(replace(layer, members=members))
        return Groups(layers)

    return wrong


def _index(member):
    return torch.arange(member.slices) if member.index is None else member.index
