"""What groups cost: weights, operations or time, measured in one model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from numbers import Integral
from statistics import median
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.backends import mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_wgsef.grouped_layer import GroupedLayer
from lightning_wgsef.groupings.example_runs import run_example
from lightning_wgsef.groupings.layers import weighted_layers
from lightning_wgsef.groups import Groups

Costs = Literal["flops", "latency", "params"] | Tensor | Mapping[str, Tensor] | None
_NAMES = ("flops", "latency", "params")
_KNOWN = ", ".join(map(repr, _NAMES))
_WARM_UP = 2


def group_costs(
    model: nn.Module, groups: Groups, costs: str, example_input: Any | None = None
) -> tuple[dict[str, Tensor], float]:
    r"""What every group of ``model`` costs, and what everything outside of groups costs.

    ``"params"`` counts the weights of a group. ``"flops"`` and ``"latency"`` share what a layer
    costs in one forward pass, C, by the number n of a group's weights in the largest member:

    .. math:: c_j = C \, n_j / \sum_i n_i

    Returns the costs in every grouped layer, float64 of shape (count,), and the rest. Together they
    are the cost of the model (for medians of times: about). ``example_input`` is a tensor, or a
    tuple of the arguments of ``forward``; ``"params"`` needs none.

    Raises:
        ValueError: an unknown name, no or an unfit example_input, a group that costs nothing.

    >>> from lightning_wgsef.groupings.parameters import group_parameters
    >>> network = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> group_costs(network, group_parameters(network), "flops", torch.ones(1, 4))
    ({'1': tensor([4., 4., 4.], dtype=torch.float64)}, 24.0)
    """
    if not isinstance(costs, str) or costs not in _NAMES:
        raise ValueError(f"costs must be one of {_KNOWN}, got {costs!r}")
    if costs != "params" and example_input is None:
        raise ValueError(f"costs={costs!r} needs an example_input, a tensor or a tuple of them")
    measured: Mapping[str, float]
    whole: float
    if costs == "params":
        found = {layer.name: layer.sizes() for layer in groups.layers}
        measured = {name: float(sizes.sum()) for name, sizes in found.items()}
        whole = sum(parameter.numel() for parameter in model.parameters())
    else:
        measure = layer_flops if costs == "flops" else layer_latencies
        measured, whole = measure(model, example_input)
        found = {x.name: measured.get(x.name, 0) * _shares(x) for x in groups.layers}
    for layer in groups.layers:
        free = (~(found[layer.name] > 0)).nonzero()
        if len(free):
            reason = f"group {int(free[0])} has no weights in '{layer.largest_member.name}'"
            if costs != "params" and not measured.get(layer.name):
                reason = "example_input runs through no convolution or dense layer of this name"
                reason += " (costs='params' needs none)"
            raise ValueError(
                f"costs={costs!r}: groups of layer '{layer.name}' ({layer.grouping}) cost nothing: "
                f"{reason}; exclude the layer or give costs as tensors"
            )
    return found, max(0.0, float(whole - sum(measured[name] for name in found)))


def layer_flops(model: nn.Module, example_input: Any) -> tuple[dict[str, int], int]:
    """FLOPs of every weighted layer that one forward pass calls, and of the whole pass.

    They are torch's own count, two a multiply-add, over all calls of a layer. The whole includes
    operations outside of layers, as in attention. Raises `ValueError` if the forward pass fails.

    >>> shared = nn.Linear(4, 4)
    >>> layer_flops(nn.Sequential(nn.Linear(3, 4), shared, shared), torch.ones(1, 3))
    ({'0': 24, '1': 64}, 88)
    """
    counter = FlopCounterMode(display=False)
    flops: dict[str, int] = {}

    def before(name: str) -> None:
        flops[name] = flops.get(name, 0) - counter.get_total_flops()

    def after(name: str) -> None:
        flops[name] += counter.get_total_flops()

    # torch counts the fused attention of GPUs, but not that of CPUs.
    attention = nullcontext() if _gpu(model) else sdpa_kernel(SDPBackend.MATH)
    with _watched(model, before, after), attention, counter:
        run_example(model, example_input)
    return flops, counter.get_total_flops()


def layer_latencies(
    model: nn.Module, example_input: Any, repeats: int = 10
) -> tuple[dict[str, float], float]:
    """Seconds of every weighted layer that a forward pass calls, and of the whole pass.

    Medians over ``repeats`` passes, after two to warm up, on a CPU or one CUDA device; the calls of
    a layer are added up. A compiled model runs as it is written. Raises `ValueError` if the pass
    fails or ``repeats`` is no count.

    >>> seconds, whole = layer_latencies(nn.Sequential(nn.Linear(3, 4)), torch.ones(1, 3))
    >>> 0 < seconds["0"] < whole
    True
    """
    if not isinstance(repeats, Integral) or isinstance(repeats, bool) or repeats < 1:
        raise ValueError(f"repeats must be a number of forward passes (int >= 1), got {repeats!r}")
    gpu = _gpu(model)
    marks: dict[str | None, list[Any]] = {}  # begin, end, begin, end ..; None: the whole pass
    seconds: dict[str | None, list[float]] = {}

    def mark(name: str | None) -> None:
        now: Any = perf_counter()
        if gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        marks.setdefault(name, []).append(now)

    with _watched(model, mark, mark), torch.cuda.device(gpu) if gpu else nullcontext():
        for run in range(_WARM_UP + repeats):
            marks.clear()
            mark(None)
            run_example(model, example_input)
            mark(None)
            if gpu:
                torch.cuda.synchronize()
            for name, (*times,) in marks.items() if run >= _WARM_UP else ():
                pairs = zip(times[::2], times[1::2], strict=True)
                spent = sum(a.elapsed_time(b) / 1000 if gpu else b - a for a, b in pairs)
                seconds.setdefault(name, []).append(spent)
    whole = median(seconds.pop(None))
    return {name: median(times) for name, times in seconds.items() if name is not None}, whole


def check_costs(costs: Costs) -> None:
    """Raise `ValueError` unless ``costs`` is None, a name, a tensor or a mapping to tensors.

    >>> check_costs({"fc": torch.tensor([2.0, 0.0])})
    Traceback (most recent call last):
    ...
    ValueError: costs['fc'] must be a positive, finite tensor, one entry a group, got 0.0 at index 1
    """
    if isinstance(costs, Tensor):
        _check_vector("costs", costs)
    elif isinstance(costs, Mapping) and costs and all(isinstance(name, str) for name in costs):
        for name, values in costs.items():
            _check_vector(f"costs[{name!r}]", values)
    elif costs is not None and not (isinstance(costs, str) and costs in _NAMES):
        raise ValueError(
            f"costs must be {_KNOWN}, a tensor with an entry for every group, a mapping from layer "
            f"names to such tensors or None, got {costs!r}"
        )


def _check_vector(name: str, values: object) -> None:
    given = repr(values)
    if isinstance(values, Tensor):
        given = f"{values.dtype} of shape {tuple(values.shape)}"
        real = not values.is_complex() and values.dtype != torch.bool
        if real and values.dim() == 1 and len(values):
            wrong = (~((values > 0) & values.isfinite())).nonzero()
            if not len(wrong):
                return
            given = f"{values[wrong[0, 0]].item()!r} at index {int(wrong[0, 0])}"
    raise ValueError(f"{name} must be a positive, finite tensor, one entry a group, got {given}")


def _shares(layer: GroupedLayer) -> Tensor:
    sizes = replace(layer, members=(layer.largest_member,)).sizes()
    return sizes / sizes.sum()


@contextmanager
def _watched(
    model: nn.Module, before: Callable[[str], None], after: Callable[[str], None]
) -> Iterator[None]:
    """Evaluation mode without gradients, in which every call of a weighted layer is announced."""
    with ExitStack() as undo, torch.no_grad():
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        # The fast path of torch's attention passes by the layers inside and the counter.
        undo.callback(mha.set_fastpath_enabled, mha.get_fastpath_enabled())
        mha.set_fastpath_enabled(False)
        if hasattr(torch.compiler, "set_stance"):  # compiled code ignores hooks set after it
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        for layer in weighted_layers(model):
            hook = layer.module.register_forward_pre_hook(lambda *_, n=layer.name: before(n))
            undo.callback(hook.remove)
            hook = layer.module.register_forward_hook(lambda *_, n=layer.name: after(n))
            undo.callback(hook.remove)
        yield


def _gpu(model: nn.Module) -> torch.device | None:
    return next((p.device for p in model.parameters() if p.is_cuda), None)
