"""Copies of networks whose dense layers store only weights that are not zero."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.export.sparse_linear import BETA, SparseLinear, sparse_matrix
from lightning_wgsef.network.equivalence import TOLERANCE, relative_difference
from lightning_wgsef.network.example_input import (
    evaluation,
    model_copy,
    observed,
    run_example,
    tensors,
)
from lightning_wgsef.network.latency import (
    alternating_times,
    compared,
)
from lightning_wgsef.network.layers import WeightedLayer, weighted_layers
from lightning_wgsef.utils.tables import format_table
from lightning_wgsef.utils.validation import check_kind, check_model

LAYOUTS = ("bsr", "csr", "2:4")

_REPEATS, _WARM_UP = 20, 3


def to_sparse(
    model: nn.Module, layout: str, example_input: Any, *, blocksize: tuple[int, int] = (16, 16)
) -> nn.Module:
    """A copy of a model in which dense layers store only weights that are not zero.

    Layers that cannot be stored so, or would take more memory, stay dense; ``storage`` of the copy
    (a `Storage`) lists all layers, with reasons and times. The copy is checked in evaluation mode
    before it is returned: every layer and the network return what they did, up to 1e-5 of the
    largest output (four units of the last place in half precision).

    Args:
        model: any module; it is copied, not touched.
        layout: "csr" (compressed rows, for single weights), "bsr" (blocks, for tiles) or "2:4" (at
            most two of every four weights in a row are not zero; CUDA only).
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        blocksize: rows and columns of a block of "bsr". Products on CPUs need square ones.

    Raises:
        ValueError: an unknown layout, a model that cannot be copied or run, a layer with zeros that
            is not 2:4, 2:4 on a CPU, or an output that differs; names the layer.

    >>> network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> _ = network[0].weight.data[:, 16:].zero_()
    >>> sparse = to_sparse(network, "bsr", torch.ones(1, 64))
    >>> [(layer.layout, layer.dense_bytes, layer.stored_bytes) for layer in sparse.storage.layers]
    [('bsr', 8192, 2068), ('dense', 512, 512)]
    """
    check_model("model", model)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {layout!r}")
    check_kind("blocksize", blocksize, (tuple, list), "two ints >= 1")
    if len(blocksize) != 2 or not all(isinstance(n, int) and n > 0 for n in blocksize):
        raise ValueError(f"blocksize must be two ints >= 1, got {blocksize!r}")
    dense = model_copy(model)
    with evaluation(dense), torch.no_grad():
        inputs = _layer_inputs(dense, example_input)
        expected = tensors(run_example(dense, example_input))
        if layout == "2:4":
            _check_two_of_four(dense)
        replacements: dict[nn.Module, nn.Module] = {}
        rows = []
        for layer in weighted_layers(dense):
            obstacle = _obstacle(layer, dense)
            found = obstacle or _sparse_layer(layer, layout, blocksize, inputs.get(layer.module))
            if isinstance(found, str):
                kind, stored, ratio, note = "dense", layer.weight.nbytes, None, found
            else:
                replacements[layer.module], stored, ratio = found
                kind, note = layout, "slower than dense on this machine" if ratio > 1 else ""
            density = int(layer.weight.count_nonzero()) / max(layer.weight.numel(), 1)
            rows.append(
                LayerStorage(layer.name, kind, density, layer.weight.nbytes, stored, ratio, note)
            )
    sparse = _replaced(dense, replacements)
    with evaluation(sparse), torch.no_grad():
        outputs = tensors(run_example(sparse, example_input))
    _check_same("the outputs", outputs, expected)
    sparse.storage = Storage(tuple(rows))  # type: ignore[assignment]  # no tensor, no module
    return sparse


def load_sparse(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a dense model with the state_dict of a model that `to_sparse` made of its like.

    Args:
        model: the dense model, with any weights; it is copied, not touched.
        state: as `torch.load` returns it, also with ``weights_only=True``.

    Raises:
        ValueError: a sparse layer that the model lacks, of another dtype, or of unfit indices.
        RuntimeError: other names or shapes differ, as in ``load_state_dict``.

    >>> network = nn.Sequential(nn.Linear(32, 16))
    >>> _ = network[0].weight.data[:, 1:].zero_()
    >>> sparse = to_sparse(network, "csr", torch.ones(1, 32))
    >>> again = load_sparse(nn.Sequential(nn.Linear(32, 16)), sparse.state_dict())
    >>> torch.equal(again(torch.ones(1, 32)), sparse(torch.ones(1, 32)))
    True
    """
    check_model("model", model)
    copied = model_copy(model)
    modules = dict(copied.named_modules(remove_duplicate=False))
    replacements: dict[nn.Module, nn.Module] = {}
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"state must be a state_dict, got {type(state).__name__}")
    for name in (key.rpartition(".")[0] for key in state if key.split(".")[-1] == "row_starts"):
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            raise ValueError(f"state has a sparse layer '{name}', which is no nn.Linear of model")
        parts = [state.get(f"{name}.{x}".lstrip(".")) for x in ("row_starts", "columns", "values")]
        starts, columns, values = (part if isinstance(part, Tensor) else None for part in parts)
        if starts is None or columns is None or values is None:
            raise ValueError(f"state: '{name}' needs tensors row_starts, columns and values")
        shape = (module.out_features, module.in_features)
        weight = sparse_matrix(starts, columns, values, shape, check=True)
        if weight.dtype != module.weight.dtype:
            raise ValueError(
                f"state: '{name}' is {weight.dtype}, in model {module.weight.dtype}; take "
                f"model.to({weight.dtype})"
            )
        replacements[module] = SparseLinear(weight, module.bias).to(module.weight.device)
    sparse = _replaced(copied, replacements)
    sparse.load_state_dict(state)
    return sparse


def _obstacle(layer: WeightedLayer, model: nn.Module) -> str:
    """Why a layer stays dense, whatever the layout; "" for no such reason."""
    module = layer.module
    if not isinstance(module, nn.Linear):
        return f"torch has no sparse product for {type(module).__name__}"
    if layer.problem or type(module) is not nn.Linear:
        return layer.problem or f"{type(module).__name__} is more than nn.Linear"
    if bool(layer.weight.all()):
        return "no weight is zero"
    if sum(any(p is layer.weight for p in x.parameters(False)) for x in model.modules()) > 1:
        return "its weight is shared with another module (tied)"
    encoders = [x for x in model.modules() if isinstance(x, nn.TransformerEncoderLayer)]
    if any(module in encoder.children() for encoder in encoders):
        return "the fast path of nn.TransformerEncoderLayer takes dense weights only"
    return "it has hooks" if module._forward_hooks or module._forward_pre_hooks else ""


def _sparse_layer(
    layer: WeightedLayer, layout: str, blocksize: tuple[int, int], given: Tensor | None
) -> tuple[nn.Module, int, float] | str:
    """The layer with a sparse weight, its size and its ratio of times, or why there is none."""
    module, weight = layer.module, layer.weight.detach()
    if layout == "bsr" and (weight.shape[0] % blocksize[0] or weight.shape[1] % blocksize[1]):
        return f"blocks of {tuple(blocksize)} do not divide its shape {tuple(weight.shape)}"
    if given is None:
        return "the forward pass does not call it"
    try:
        sparse, stored = _compressed(module, weight, layout, blocksize)
        if stored >= weight.nbytes:
            return f"{layout} would take {stored:,} bytes, not less than {weight.nbytes:,}"
        found = sparse(given)
    except RuntimeError as error:
        return f"torch cannot do this here: {str(error).splitlines()[0]}"
    _check_same(f"layer '{layer.name}'", [found], [module(given)])
    calls = [partial(sparse, given), partial(module, given)]
    times = alternating_times(calls, _REPEATS, _WARM_UP, given.device)
    return sparse, stored, compared(*times).median


def _compressed(
    module: nn.Module, weight: Tensor, layout: str, blocksize: tuple[int, int]
) -> tuple[nn.Module, int]:
    """A layer with a sparse weight, and the bytes of that."""
    if layout == "2:4":
        sparse = copy.deepcopy(module)
        packed: Any = torch.sparse.to_sparse_semi_structured(weight)
        sparse.weight = nn.Parameter(packed, requires_grad=False)
        return sparse, sum(getattr(packed, name).nbytes for name in packed.__tensor_flatten__()[0])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=BETA)
        compressed = weight.to_sparse_csr() if layout == "csr" else weight.to_sparse_bsr(blocksize)
    layer = SparseLinear(compressed, module.bias)  # type: ignore[arg-type]  # nn.Module: Tensor | Module
    return layer, layer.values.nbytes + layer.row_starts.nbytes + layer.columns.nbytes


def _check_two_of_four(model: nn.Module) -> None:
    for layer in weighted_layers(model):
        if _obstacle(layer, model):
            continue
        weight, shape = layer.weight, tuple(layer.weight.shape)
        if shape[1] % 4 or bool((weight.reshape(-1, 4).count_nonzero(1) > 2).any()):
            raise ValueError(
                "layout '2:4' needs rows in which at most 2 of every 4 weights are not zero, layer "
                f"'{layer.name}' of shape {shape} has others: train with grouping='2:4', or use "
                "'csr' or 'bsr'"
            )
        if weight.device.type != "cuda":
            raise ValueError(
                f"layout '2:4' needs a CUDA device, '{layer.name}' is on {weight.device}: torch "
                "has no such products elsewhere; use 'csr' or 'bsr'"
            )


def _layer_inputs(model: nn.Module, example_input: Any) -> dict[nn.Module, Tensor]:
    """What every dense layer is called with at first in a pass."""
    inputs: dict[nn.Module, Tensor] = {}

    def note(_: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.setdefault(module, args[0] if args else named["input"])

    linear = {n: module for n, module in model.named_modules() if isinstance(module, nn.Linear)}
    with observed(linear, note):
        run_example(model, example_input)
    return inputs


def _replaced(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """The model with other modules in the place of some."""
    for old, new in replacements.items():
        new.train(old.training)
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
    return replacements.get(model, model)


def _check_same(what: str, found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        precision = torch.finfo(other.dtype).eps if other.is_floating_point() else 0.0
        tolerance = max(TOLERANCE, 4 * precision)
        if not (difference := relative_difference([one], [other])) <= tolerance:
            raise ValueError(f"{what} would differ by {difference:.3g} of the largest output")


@dataclass(frozen=True)
class LayerStorage:
    """How one layer is stored.

    Attributes:
        name: its name.
        layout: of its weight, "dense" where it was left as it is.
        density: share of its weights that are not zero.
        dense_bytes: size of the dense weight.
        stored_bytes: size of what is stored, with indices.
        time_ratio: time of the sparse over that of the dense layer, on what the layer gets from the
            example input, median over turns in which both run; None where it is dense.
        note: why it is dense, or that it is slower.
    """

    name: str
    layout: str
    density: float
    dense_bytes: int
    stored_bytes: int
    time_ratio: float | None
    note: str


@dataclass(frozen=True)
class Storage:
    """How the convolutions and dense layers of a network are stored."""

    layers: tuple[LayerStorage, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        header = ["layer", "layout", "density", "bytes dense", "stored", "time sparse / dense"]
        rows = []
        for x in self.layers:
            ratio = "-" if x.time_ratio is None else f"{x.time_ratio:.2f}"
            sizes = [f"{x.dense_bytes:,}", f"{x.stored_bytes:,}"]
            rows.append([x.name, x.layout, f"{x.density:.3f}", *sizes, ratio])
        notes = [f"{x.name}: {x.note}" for x in self.layers if x.note]
        return "\n".join([format_table(header, rows), *notes])
