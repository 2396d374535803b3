"""Modules that stand in a slim network for those that cannot be made smaller by themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Skip(nn.Module):
    """Hands its first input on: what is left of a residual block that adds nothing.

    >>> Skip()(torch.ones(2), "a mask").tolist()
    [1.0, 1.0]
    """

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Returns the first input that is a tensor."""
        return next(x for x in (*inputs, *named.values()) if isinstance(x, Tensor))


class Silent(nn.Module):
    """Returns zeros like its first input: what is left of an expert that adds nothing.

    >>> Silent()(torch.ones(2)).tolist()
    [0.0, 0.0]
    """

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        """Returns zeros like the first input that is a tensor."""
        return torch.zeros_like(
            next(x for x in (*inputs, *named.values()) if isinstance(x, Tensor))
        )


Routed = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def routed_to(
    change: Routed, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Replace, among the arguments of experts, the numbers of experts and the weights they get.

    Those are a tensor of integers and one of floats of the same shape.

    >>> index, weights = torch.tensor([[0, 2]]), torch.ones(1, 2)
    >>> args, _ = routed_to(lambda i, w: (i + 1, w / 2), (torch.ones(1, 8), index, weights), {})
    >>> args[1].tolist(), args[2].tolist()
    ([[1, 3]], [[0.5, 0.5]])
    """
    given: dict[int | str, Any] = dict(enumerate(args))
    given.update(named)
    found = {key: x for key, x in given.items() if isinstance(x, Tensor) and x.dim() < 4}
    for key, index in found.items():
        if index.dtype not in (torch.int32, torch.int64) or not index.dim():
            continue
        for other, weights in found.items():
            if weights.is_floating_point() and weights.shape == index.shape:
                given[key], given[other] = change(index, weights)
                break
    return tuple(given[place] for place in range(len(args))), {key: given[key] for key in named}


class KeptExperts:
    """Hook before the forward of experts of which some were zero and are gone.

    The router goes on to know them all. What it sends to one that is gone gets the weight 0, which
    is what zero weights made of it.

    Args:
        kept: the experts that stay, by their number of before.
        full: how many there were before.

    >>> hook = KeptExperts([1, 3], 4)
    >>> args = torch.ones(1, 8), torch.tensor([[0, 3]]), torch.tensor([[0.5, 0.5]])
    >>> (_, index, weights), _ = hook(nn.Identity(), args, {})
    >>> index.tolist(), weights.tolist()
    ([[0, 1]], [[0.0, 0.5]])
    """

    def __init__(self, kept: list[int], full: int) -> None:
        self.kept = kept
        self.full = full
        # One place more, for the number that stands for no expert.
        self._places = [kept.index(number) if number in kept else -1 for number in range(full + 1)]

    def __call__(
        self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments with the numbers that the experts have now."""

        def to_kept(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            places = torch.tensor(self._places, device=index.device)[index.long()]
            return places.clamp(min=0).to(index.dtype), weights.masked_fill(places < 0, 0)

        return routed_to(to_kept, args, named)


class SlimAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` without some of its heads, of the same width outside.

    Its parameters have the names they had, and rows and columns of the kept heads alone. A mask for
    every head must have all the heads of before, so that nobody else has to change; weights that
    are returned are those of the kept heads.

    >>> attention = nn.MultiheadAttention(8, 4, batch_first=True)
    >>> for p in (attention.in_proj_weight, attention.in_proj_bias):
    ...     p.data = p.data[[0, 1, 8, 9, 16, 17]]
    >>> attention.out_proj.weight.data = attention.out_proj.weight.data[:, :2]
    >>> attention = SlimAttention.of(attention, kept=[0])
    >>> attention(*[torch.ones(1, 5, 8)] * 3)[0].shape
    torch.Size([1, 5, 8])
    """

    full_heads: int
    kept_heads: tuple[int, ...]

    @classmethod
    def of(cls, module: nn.MultiheadAttention, kept: list[int]) -> SlimAttention:
        """Turn a module into one that has these of its heads.

        It stays the same object, so that hooks and whoever else holds it stay with it.
        """
        before = tuple(range(module.num_heads))
        module.__class__ = cls
        assert isinstance(module, cls)
        module.full_heads = getattr(module, "full_heads", module.num_heads)
        heads = getattr(module, "kept_heads", before)
        module.kept_heads = tuple(heads[number] for number in kept)
        module.num_heads = len(kept)
        module._qkv_same_embed_dim = False  # no fast path, which takes all heads for granted
        return module

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`; ``is_causal`` is a hint there, and not needed here."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        queries, keys, values = self._projected(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, keys.shape[2], queries)
        if need_weights:
            looks = queries @ keys.transpose(2, 3) * self.head_dim**-0.5
            weights = (looks if mask is None else looks + mask).softmax(-1)
            weights = functional.dropout(weights, self.dropout, self.training)
            mixed = weights @ values
        else:
            dropout = self.dropout if self.training else 0.0
            mixed = functional.scaled_dot_product_attention(queries, keys, values, mask, dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            output = output[0]
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights if batched else weights[0]

    def _projected(self, *inputs: Tensor) -> list[Tensor]:
        """Queries, keys and values, of shape (batch, heads, length, width of a head)."""
        width = self.num_heads * self.head_dim
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        bias = self.in_proj_bias
        biases = [None] * 3 if bias is None else bias.chunk(3)
        found: list[Tensor] = []
        for x, weight, own, extra in zip(
            inputs, weights, biases, (None, self.bias_k, self.bias_v), strict=True
        ):
            projected = functional.linear(x, weight, own)
            more = [] if extra is None else [extra.expand(x.shape[0], 1, width)]
            if self.add_zero_attn and len(found) > 0:
                more.append(projected.new_zeros(x.shape[0], 1, width))
            projected = torch.cat([projected, *more], 1)
            heads = projected.view(*projected.shape[:2], self.num_heads, self.head_dim)
            found.append(heads.transpose(1, 2))
        return found

    def _mask(
        self, mask: Tensor | None, padding: Tensor | None, length: int, like: Tensor
    ) -> Tensor | None:
        """Both masks as numbers to add, for as many keys as there are with the extra ones."""
        parts = []
        if mask is not None:
            if mask.dim() == 3:
                mask = mask.view(-1, self.full_heads, *mask.shape[1:])[:, list(self.kept_heads)]
            parts.append(mask)
        if padding is not None:
            parts.append(padding[:, None, None, :])
        total: Tensor | None = None
        for part in parts:
            if part.dtype == torch.bool:
                part = torch.zeros_like(part, dtype=like.dtype).masked_fill_(part, -torch.inf)
            part = functional.pad(part.to(like.dtype), (0, length - part.shape[-1]))
            total = part if total is None else total + part
        return total


class SlimRecurrent(nn.Module):
    """A recurrent layer without some of its hidden units, which takes the states of before, too.

    A state of the width of before, such as zeros that a forward makes, is cut to the units that
    were kept. What is returned has the kept ones.

    >>> gru = nn.GRUCell(2, 3)
    >>> for p in gru.parameters():
    ...     p.data = p.data[[0, 3, 6]]
    >>> gru.weight_hh.data, gru.hidden_size = gru.weight_hh.data[:, :1], 1
    >>> gru = SlimRecurrent.of(gru, [(3, [0])])
    >>> gru(torch.ones(5, 2), torch.zeros(5, 3)).shape
    torch.Size([5, 1])
    """

    states: tuple[tuple[int, tuple[int, ...]], ...]

    @staticmethod
    def of(module: nn.Module, states: list[tuple[int, list[int]]]) -> nn.Module:
        """Turn a recurrent layer of torch into one that takes states of before.

        Args:
            module: the layer, which stays the same object.
            states: for every tensor of its state, how wide it was and which units are kept of it.
        """
        before = getattr(module, "states", tuple((wide, tuple(range(wide))) for wide, _ in states))
        now = tuple(
            (full, tuple(known[place] for place in kept))
            for (full, known), (_, kept) in zip(before, states, strict=True)
        )
        module.__class__ = _SLIM_RECURRENT.get(type(module), type(module))
        module.states = now  # type: ignore[assignment]  # plain data
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
        return module

    def forward(self, given: Any, state: Any = None) -> Any:
        """As the layer of torch; a state may be of the full width."""
        if isinstance(state, tuple):
            pairs = zip(state, self.states, strict=True)
            return super().forward(given, tuple(_kept_of(x, *own) for x, own in pairs))
        return super().forward(given, _kept_of(state, *self.states[0]))


def _kept_of(state: Any, full: int, kept: tuple[int, ...]) -> Any:
    if not isinstance(state, Tensor) or state.shape[-1] != full or len(kept) == full:
        return state
    return state.index_select(-1, torch.tensor(kept, device=state.device))


class SlimLSTM(SlimRecurrent, nn.LSTM):
    """`nn.LSTM` without some of its hidden units."""


class SlimGRU(SlimRecurrent, nn.GRU):
    """`nn.GRU` without some of its hidden units."""


class SlimRNN(SlimRecurrent, nn.RNN):
    """`nn.RNN` without some of its hidden units."""


class SlimLSTMCell(SlimRecurrent, nn.LSTMCell):
    """`nn.LSTMCell` without some of its hidden units."""


class SlimGRUCell(SlimRecurrent, nn.GRUCell):
    """`nn.GRUCell` without some of its hidden units."""


class SlimRNNCell(SlimRecurrent, nn.RNNCell):
    """`nn.RNNCell` without some of its hidden units."""


_SLIM_RECURRENT: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: SlimLSTM,
    nn.GRU: SlimGRU,
    nn.RNN: SlimRNN,
    nn.LSTMCell: SlimLSTMCell,
    nn.GRUCell: SlimGRUCell,
    nn.RNNCell: SlimRNNCell,
}
