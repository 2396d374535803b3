"""Attention with fused projections, laid out as in the families of transformers; gates, too."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, SIZE = 16, 4, 4


class Fused(nn.Module):
    """Four heads of width four, of which one layer makes queries, keys and values.

    What differs is how `parts` takes its outputs apart: into queries, keys and values of shape
    (batch, length, heads, width of a head).
    """

    rows = 3 * HEADS * SIZE

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.query_key_value = nn.Linear(WIDTH, self.rows)
        self.dense = nn.Linear(WIDTH, WIDTH)

    def parts(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.transpose(1, 2) for part in self.parts(self.query_key_value(x)))
        mixed = (query @ key.transpose(2, 3) / 2).softmax(-1) @ value
        outputs: Tensor = self.dense(mixed.transpose(1, 2).flatten(2))
        return x + outputs


class ByKind(Fused):
    """timm, DBRX."""

    def parts(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(2, (-1, SIZE)) for part in x.chunk(3, -1)]


class ByHead(Fused):
    """GPT-NeoX, Persimmon."""

    def parts(self, x: Tensor) -> list[Tensor]:
        return list(x.unflatten(2, (-1, 3 * SIZE)).chunk(3, -1))


class ByHeadAlternating(Fused):
    """BLOOM."""

    def parts(self, x: Tensor) -> list[Tensor]:
        return list(x.view(*x.shape[:2], self.num_heads, 3, SIZE).unbind(3))


class ByGroup(Fused):
    """Falcon: two heads of queries, one of keys and one of values side by side."""

    rows = (HEADS + 4) * SIZE

    def __init__(self) -> None:
        super().__init__()
        self.num_kv_heads = 2

    def parts(self, x: Tensor) -> list[Tensor]:
        groups = x.unflatten(2, (-1, 4, SIZE))
        query = groups[:, :, :, :2].flatten(2, 3)
        rest = [groups[:, :, :, place].repeat_interleave(2, 2) for place in (2, 3)]
        return [query, *rest]


class InTwoParts(Fused):
    """CodeGen: parts of two heads, in each queries, values, keys."""

    def parts(self, x: Tensor) -> list[Tensor]:
        query, value, key = x.unflatten(2, (-1, 6, SIZE)).chunk(3, 3)
        return [part.flatten(2, 3) for part in (query, key, value)]


class Interleaved(Fused):
    """A layout that nobody has: head and place in the head change their places."""

    def parts(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(2, (SIZE, -1)).transpose(2, 3) for part in x.chunk(3, -1)]


class ManyQueries(Fused):
    """Falcon 7b: one head of keys and values for all."""

    rows = (HEADS + 2) * SIZE

    def __init__(self) -> None:
        super().__init__()
        self.num_kv_heads = 1

    def parts(self, x: Tensor) -> list[Tensor]:
        heads = x.unflatten(2, (-1, SIZE))
        return [heads[:, :, :HEADS], heads[:, :, -2:-1], heads[:, :, -1:]]


class Latent(nn.Module):
    """DeepSeek: keys and values of a head side by side, made from what all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_b_proj = nn.Linear(WIDTH, HEADS * 6)
        self.kv_a_proj, self.kv_b_proj = nn.Linear(WIDTH, 8), nn.Linear(8, HEADS * (4 + SIZE))
        self.o_proj = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query = self.q_b_proj(x).unflatten(2, (-1, 6)).transpose(1, 2)
        latent = self.kv_a_proj(x)
        key, value = self.kv_b_proj(latent).unflatten(2, (-1, 4 + SIZE)).split([4, SIZE], -1)
        shared = latent[:, :, None, :2].expand(-1, -1, key.shape[2], -1)
        key, value = torch.cat([key, shared], -1).transpose(1, 2), value.transpose(1, 2)
        mixed = (query @ key.transpose(2, 3)).softmax(-1) @ value
        outputs: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return x + outputs


class Crossed(nn.Module):
    """vit-pytorch, diffusers: `to_q`, a fused or two layers, and an output in a list."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.heads, self.fused = HEADS, fused
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        if fused:
            self.to_kv = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        else:
            self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)])

    def forward(self, x: Tensor) -> Tensor:
        parts = self.to_kv(x).chunk(2, -1) if self.fused else (self.to_k(x), self.to_v(x))
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.to_q(x), *parts)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).flatten(2)
        for layer in self.to_out:
            mixed = layer(mixed)
        return x + mixed


class FusedGate(nn.Module):
    """Phi-3, GLM, GEGLU: gate and units in one layer, one after another or in turn."""

    def __init__(self, in_turn: bool) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(WIDTH, 24), nn.Linear(12, WIDTH)
        self.in_turn = in_turn

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up_proj(x)
        gate, up = both.unflatten(-1, (-1, 2)).unbind(-1) if self.in_turn else both.chunk(2, -1)
        outputs: Tensor = self.down_proj(functional.silu(gate) * up)
        return x + outputs
