"""Recurrent layers: the matrices that make their hidden units, and what a graph sees of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from lightning_wgsef.network.layers import canonical_name
from lightning_wgsef.network.slim_modules import SlimRecurrent

_GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1, nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1}


def recurrent_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the recurrent layers of torch in ``model``, cells included.

    >>> [name for name, _ in recurrent_layers(nn.ModuleDict({"rnn": nn.GRU(2, 3)}))]
    ['rnn']
    """
    for name, module in model.named_modules():
        if _gates(module):
            yield canonical_name(name), module


class UnitLayer(nn.Linear):
    """One matrix of a recurrent layer as a dense layer, of which the units are the outputs.

    Each unit has a row for every gate, and one number of the bias. What it computes says nothing.

    Attributes:
        owner: canonical name of the recurrent layer.
        layer: the recurrent layer, in a tuple, since it is no part of this module.
        gates: number of rows of a unit.
        projections: what the recurrent layer projects its units to, 0 for not.
        matrix: name of the parameter there.
        vector: name of its bias there, "" for none.
        sizes: attributes of the recurrent layer that hold the numbers of inputs and outputs, "" for
            a number that another matrix stands for.
    """

    def __init__(self, owner: str, layer: nn.Module, kind: str, suffix: str, first: bool) -> None:
        matrix = getattr(layer, f"weight_{kind}{suffix}")
        projects = kind == "hr"
        gates = 1 if projects else _gates(layer)
        units = len(matrix) // gates
        super().__init__(
            matrix.shape[1], units, bias=False, device=matrix.device, dtype=matrix.dtype
        )
        with torch.no_grad():
            self.weight.copy_(matrix[:units])
        self.owner, self.layer, self.gates = owner, (layer,), gates
        self.projections = int(getattr(layer, "proj_size", 0))
        self.matrix = f"weight_{kind}{suffix}"
        bias = getattr(layer, f"bias_{kind}{suffix}", None)
        self.vector = f"bias_{kind}{suffix}" if isinstance(bias, Tensor) else ""
        made = "proj_size" if projects else "hidden_size" if kind == "ih" else ""
        self.sizes = ("input_size" if kind == "ih" else "", made) if first else ("", "")

    @property
    def set_name(self) -> str:
        """By which the units are called: the layer's, and of projections the matrix's."""
        return f"{self.owner}.weight_hr".lstrip(".") if self.matrix[7:9] == "hr" else self.owner

    @property
    def tensors(self) -> list[str]:
        """Names of the parameters that hold its rows."""
        return [name for name in (self.matrix, self.vector) if name]

    def parameter(self, name: str) -> Tensor:
        """Return a parameter of the recurrent layer."""
        found: Tensor = getattr(self.layer[0], name)
        return found

    def rows(self, units: Iterable[int]) -> list[int]:
        """List the rows of some units: one for each gate.

        >>> UnitLayer("rnn", nn.GRU(3, 4), "ih", "_l0", True).rows([0, 2])
        [0, 2, 4, 6, 8, 10]
        """
        places = list(units)
        return [place + gate * self.out_features for gate in range(self.gates) for place in places]


def unit_indices(layer: nn.Module) -> dict[str, Tensor]:
    """The hidden unit of every row of the parameters that make hidden units, by name.

    >>> {name: index.tolist() for name, index in unit_indices(nn.GRUCell(3, 2)).items()}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'weight_ih': [0, 1, 0, 1, 0, 1], 'weight_hh': [0, 1, 0, 1, 0, 1],
     'bias_ih': [0, 1, 0, 1, 0, 1], 'bias_hh': [0, 1, 0, 1, 0, 1]}
    """
    units: int = layer.hidden_size  # type: ignore[assignment]  # nn.Module: Tensor | Module
    found = {name: getattr(layer, name) for name in _names(layer)}
    return {
        name: torch.arange(len(tensor), device=tensor.device) % units
        for name, tensor in found.items()
        if tensor is not None and not name.startswith("weight_hr")
    }


def follow_units(model: nn.Module) -> None:
    """Turn the recurrent layers of a copy into what a graph can follow; the numbers say nothing.

    In every layer and direction of one module the number of hidden units is the same, and a state
    has those of all: a unit goes in all of them, or in none. A unit that is zero in all parameters
    is zero in the copy, too, as it is in torch's layers: their gates multiply tanh(0).
    """
    for name, module in list(recurrent_layers(model)):
        given = [getattr(module, own) for own in _names(module)]
        if any(isinstance(x, Tensor) and not isinstance(x, nn.Parameter) for x in given):
            continue  # computed from others
        ends, ways, kinds, cells = [""], [""], ["ih", "hh"], isinstance(module, nn.LSTMCell)
        if isinstance(module, nn.RNNBase):
            ends, cells = [f"_l{n}" for n in range(module.num_layers)], module.mode == "LSTM"
            ways += ["_reverse"] * module.bidirectional
            kinds += ["hr"] * bool(module.proj_size)
        layers = {
            f"{kind}{end}{way}": UnitLayer(name, module, kind, end + way, end + way == ends[0])
            for end in ends
            for way in ways
            for kind in kinds
        }
        base = _Followed if isinstance(module, nn.RNNBase) else _FollowedCell
        # A forward may ask for the class that it was.
        module.__class__ = type(type(module).__name__, (base, type(module)), {})
        assert isinstance(module, _FollowedCell)
        module.ends, module.ways, module.has_cells = ends, ways, cells
        for path, layer in layers.items():
            module.add_module(path, layer)


def _names(module: nn.Module) -> list[str]:
    """List the names of the weights and biases of a recurrent layer."""
    cell = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    names: list[str] = getattr(module, "_flat_weights_names", cell)
    return names


def _gates(module: nn.Module) -> int:
    """Count the gates of a recurrent layer of torch; 0 for others, and for a forward of one's own.

    >>> _gates(nn.LSTM(2, 3)), _gates(nn.Linear(2, 3))
    (4, 0)
    """
    for kind, gates in _GATES.items():
        if isinstance(module, kind):
            known: list[Any] = [kind.forward, SlimRecurrent.forward]  # type: ignore[attr-defined]
            own = type(module).forward not in known
            return 0 if own else gates
    return 0


class _FollowedCell(nn.Module):
    """A recurrent cell whose units are tied as the graph must see them."""

    ends: list[str]
    ways: list[str]
    has_cells: bool

    def forward(self, given: Tensor, state: Any = None) -> Any:
        """Return states of the right shapes."""
        units, _ = self._tied("", given, *self._begin(state))
        return (units, units) if self.has_cells else units

    def _begin(self, state: Any) -> tuple[Tensor | None, Tensor | None]:
        """Sum the states given for every unit: of outputs, and of cells; constants tie nothing."""
        states = state if isinstance(state, tuple) else (state,)
        starts = [
            x.sum(tuple(range(x.dim() - 1)))
            for x in states
            if isinstance(x, Tensor) and x.requires_grad
        ]
        if self.ends == [""] or not self.proj_size:
            return (sum(starts[1:], starts[0]) if starts else None), None
        return (starts[0], starts[-1]) if len(starts) > 1 else (None, None)

    def _tied(
        self, end: str, given: Tensor, units: Tensor | None, cells: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Pass the matrices of one layer and direction; tie its units to those before."""
        read, recur = self._modules[f"ih{end}"], self._modules[f"hh{end}"]
        project = self._modules.get(f"hr{end}")
        assert read is not None
        assert recur is not None
        if project is None:
            made = read(given) if units is None else read(given) + units
            made = made + recur(made)
            return made, made
        made = read(given) if cells is None else read(given) + cells
        units = project(made) if units is None else project(made) + units
        made = made + recur(units)
        return units + project(made), made


class _Followed(_FollowedCell):
    """A recurrent layer whose units are tied as the graph must see them."""

    batch_first: bool

    def forward(self, given: Any, state: Any = None) -> Any:
        """Return outputs and states of the right shapes."""
        packed = isinstance(given, PackedSequence)
        inputs: Tensor = given.data if packed else given
        units, cells = self._begin(state)
        for end in self.ends:
            for way in self.ways:
                units, cells = self._tied(f"{end}{way}", inputs, units, cells)
            assert units is not None
            inputs = torch.cat([units, units], -1) if len(self.ways) > 1 else units
        outputs: Any = inputs
        if packed:
            outputs = PackedSequence(
                inputs, given.batch_sizes, given.sorted_indices, given.unsorted_indices
            )
        last = [self._last(x, given) for x in (units, cells) if x is not None]
        count = len(self.ends) * len(self.ways)
        states = tuple(torch.stack([x] * count) for x in last)
        return outputs, states if self.has_cells else states[0]

    def _last(self, units: Tensor, given: Any) -> Tensor:
        """Return units at one step, for every sample."""
        if isinstance(given, PackedSequence):
            return units.mean(0) + units.new_zeros(int(given.batch_sizes[0]), 1)
        return units[:, -1] if self.batch_first and units.dim() == 3 else units[-1]


class PaddingAsAnySum(TorchFunctionMode):
    """Pads packed sequences by a sum, which a graph can follow: torch copies into slices.

    >>> packed = nn.utils.rnn.pack_sequence([torch.ones(2, 3, requires_grad=True)])
    >>> with PaddingAsAnySum():
    ...     padded, _ = nn.utils.rnn.pad_packed_sequence(packed)
    >>> padded.shape, padded.grad_fn.name()
    (torch.Size([2, 1, 3]), 'AddBackward0')
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function, or what stands for it."""
        found = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "_pad_packed_sequence":
            padded, lengths = found
            return args[0].mean(0) + torch.zeros_like(padded[..., :1]).detach(), lengths
        return found
