"""Experts of mixture-of-experts layers: where they are, and runs that use every one of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.network.example_input import observed, tensors
from lightning_wgsef.network.layers import canonical_name, is_lazy, parameter_homes
from lightning_wgsef.network.slim_modules import KeptExperts, Silent, routed_to

_ROUTER = re.compile("gate|router|switch|classifier|wg", re.IGNORECASE)

_ACTIVE = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "num_selected_experts",
    "moe_top_k",
    "moe_topk",
    "topk",
    "moe_k",
)

# Runs in which tokens are sent to the experts in turn, until each has had one.
_MOST_TURNS = 64

IN_TURN = "the outputs with every expert in turn"


@dataclass(frozen=True, eq=False)
class Experts:
    """Experts of one layer.

    Attributes:
        name: canonical name of the module that holds them.
        module: that module.
        numbers: which of the experts that the router knows they are.
        stacked: weights of which the first axis is that of the experts, by path from the module.
        children: experts that are modules, by path from the module.
        router: canonical name of the layer with a row of weights for every expert, and that layer.
        active: how many of them a token is sent to, 1 where that is not known.
    """

    name: str
    module: nn.Module
    numbers: tuple[int, ...]
    stacked: dict[str, nn.Parameter] = field(default_factory=dict)
    children: dict[str, nn.Module] = field(default_factory=dict)
    router: tuple[str, nn.Module] | None = None
    active: int = 1

    @property
    def count(self) -> int:
        """Number of experts."""
        return len(self.numbers)

    def path(self, inside: str) -> str:
        """Canonical name of what lies at a path from the module."""
        return f"{self.name}.{inside}".lstrip(".")


def expert_modules(model: nn.Module) -> Iterator[Experts]:
    """Every set of experts of ``model``.

    Either a module with two weights or more of three axes, of which the first is that of the
    experts, or a list or dict of modules of one kind, beside a layer with an output for each.

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.gate = nn.Linear(4, 3)
    ...         self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    >>> [(found.name, found.count, found.router[0]) for found in expert_modules(Block())]
    [('experts', 3, 'gate')]
    """
    homes, modules = parameter_homes(model), dict(model.named_modules())
    for raw, module in modules.items():
        parent = modules[raw.rpartition(".")[0]] if raw else module
        name = canonical_name(raw)
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            children = dict(module.named_children())
            alive = {path: x for path, x in children.items() if not isinstance(x, Silent)}
            alike = len({_signature(child) for child in alive.values()}) == 1
            if not raw or len(alive) < 2 or not alike or not _signature(next(iter(alive.values()))):
                continue
            router = _router(raw, parent, module, len(children))
            if router is None:
                continue
            numbers = tuple(place for place, path in enumerate(children) if path in alive)
            stacked: dict[str, nn.Parameter] = {}
        else:
            stacked, alive = _stacked(module), {}
            if not stacked:
                continue
            count = len(next(iter(stacked.values())))
            numbers = _kept_numbers(module, count)
            router = _router(raw, parent, module, _known(module, count))
        own = [*stacked.values(), *(p for x in alive.values() for p in x.parameters())]
        if all(len(homes[id(parameter)]) == 1 for parameter in own):
            active = _active([router[1] if router else None, module, parent, model])
            yield Experts(name, module, numbers, stacked, alive, router, active)


def _signature(module: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    named = dict(module.named_parameters())
    if any(is_lazy(parameter) for parameter in named.values()):
        return ()
    return tuple((name, tuple(parameter.shape)) for name, parameter in named.items())


def _stacked(module: nn.Module) -> dict[str, nn.Parameter]:
    """Weights with an axis of experts, of a module or of children that hold one each."""
    if type(module).__module__.startswith("torch.nn."):
        return {}
    own = dict(module.named_parameters(recurse=False))
    if not any(parameter.dim() == 3 for parameter in own.values()):
        own = {
            f"{path}.{name}": parameter
            for path, child in module.named_children()
            if not type(child).__module__.startswith("torch.nn.")
            for name, parameter in child.named_parameters(recurse=False)
            if len(child._parameters) == 1 and parameter.dim() == 3
        }
    if any(is_lazy(parameter) for parameter in own.values()):
        return {}
    cubes = [x for x in own.values() if x.dim() == 3 and x.is_floating_point() and min(x.shape) > 1]
    counts = {len(x) for x in cubes}
    if len(cubes) < 2 or len(counts) > 1:
        return {}
    (count,) = counts
    return {name: x for name, x in own.items() if x.dim() in (2, 3) and len(x) == count}


def _router(
    raw: str, parent: nn.Module, experts: nn.Module, count: int
) -> tuple[str, nn.Module] | None:
    """Find the layer with a row for every expert, beside the experts."""
    inside, found = set(experts.modules()), []
    for path, module in parent.named_modules():
        if "weight" not in module._parameters:  # of TorchScript it is no dict, and has no get
            continue
        weight = module._parameters["weight"]
        if not path or path.count(".") > 1 or module in inside or weight is None:
            continue
        if not is_lazy(weight) and weight.dim() == 2 and len(weight) == count:
            name = f"{raw.rpartition('.')[0]}.{path}"
            found.append((not _ROUTER.search(path), canonical_name(name), module))
    found.sort(key=lambda entry: entry[0])
    return found[0][1:] if found else None


def _active(places: list[nn.Module | None]) -> int:
    configs = [getattr(place, "config", None) for place in places]
    for place in [*places, *configs]:
        for name in _ACTIVE:
            value = getattr(place, name, None)
            if type(value) is int and value > 0:
                return value
    return 1


def _kept(module: nn.Module) -> list[KeptExperts]:
    return [x for x in module._forward_pre_hooks.values() if isinstance(x, KeptExperts)]


def _known(module: nn.Module, count: int) -> int:
    """Count the experts that are told apart outside of the module."""
    return next((hook.full for hook in _kept(module)), count)


def _kept_numbers(module: nn.Module, count: int) -> tuple[int, ...]:
    numbers = list(range(_known(module, count)))
    for hook in _kept(module):
        numbers = [numbers[place] for place in hook.kept]
    return tuple(numbers)


class EveryExpert:
    """Runs that use every expert of a network, also those that the router sends nothing to.

    Experts that are modules and were not called are called with what another one was given. Where
    a module takes the numbers of the experts that every token is sent to, the network is run
    again with others in their place, until each had a token.
    """

    def __init__(self, network: nn.Module) -> None:
        self._experts = list(expert_modules(network))
        self._given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note which experts are called while the block runs."""
        children = {name: m for x in self._experts for name, m in _modules(x).items()}

        def note(name: str, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._given.setdefault(name, (args, named))

        with observed(children, note):
            yield

    def others(self, run: Callable[[], Any]) -> dict[str, list[Tensor]]:
        """Return what the experts make that were not called, and the network with each in turn."""
        found: dict[str, list[Tensor]] = {}
        for experts in self._experts:
            names = _modules(experts)
            called = [name for name in names if name in self._given]
            for name, module in names.items() if called else ():
                if name not in self._given:
                    args, named = self._given[called[0]]
                    try:
                        found[name] = tensors(module(*args, **named))
                    except Exception:  # an expert may be anything; it differs from one that runs
                        found[name] = []
        stacked = [experts for experts in self._experts if experts.stacked]
        missing = {x: set(range(_known(x.module, x.count))) for x in stacked}
        for turn in range(_MOST_TURNS if stacked else 0):
            with _in_turn(missing, turn) as seen:
                outputs = tensors(run())
            if not seen:
                break  # no module takes the numbers of experts
            found[f"{IN_TURN}, {turn}"] = outputs
            if not any(missing[experts] for experts in seen):
                break
        return found


def _modules(experts: Experts) -> dict[str, nn.Module]:
    """Experts that are modules by name, those that are gone included."""
    children = experts.module.named_children() if experts.children else ()
    return {experts.path(path): module for path, module in children}


@contextmanager
def _in_turn(missing: dict[Experts, set[int]], turn: int) -> Iterator[set[Experts]]:
    """Send tokens to other experts than the router does, and cross off those who got one."""
    seen: set[Experts] = set()

    def hook(experts: Experts) -> Callable[..., Any]:
        full = _known(experts.module, experts.count)

        def turned(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            def other(index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
                if index.numel() and not 0 <= int(index.min()) <= int(index.max()) <= full:
                    return index, weights
                tokens = index.shape[:-1] if index.dim() > 1 else index.shape
                shift = torch.arange(tokens.numel(), device=index.device).view(tokens)
                shift = shift.unsqueeze(-1) if index.dim() > 1 else shift
                new = (index + shift + turn * max(1, tokens.numel())) % full
                missing[experts] -= set(new.flatten().tolist())
                seen.add(experts)
                return new.to(index.dtype), weights

            return routed_to(other, args, named)

        return turned

    with ExitStack() as undo:
        for experts in missing:
            handle = experts.module.register_forward_pre_hook(
                hook(experts), with_kwargs=True, prepend=True
            )
            undo.callback(handle.remove)
        yield seen
