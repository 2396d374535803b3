"""Size of the slim network by its groups alive, measured on copies with groups taken out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.latency_table import MADE, ONE, OPERATIONS, READ, fitted
from lightning_wgsef.groupings.removability import Removable, as_channels, as_read_channels
from lightning_wgsef.groupings.unit_removal import unit_removal
from lightning_wgsef.groups.grouped_layer import GroupedLayer, on_model
from lightning_wgsef.groups.size import SlimSize
from lightning_wgsef.network.dependency_graph import build_graph
from lightning_wgsef.network.example_input import (
    model_copy,
    reason_of,
    tensors,
    with_batch_size,
)
from lightning_wgsef.network.experts import expert_modules
from lightning_wgsef.network.flops import Operation, layer_flops, operations
from lightning_wgsef.network.latency import module_calls, pass_times
from lightning_wgsef.network.layers import canonical_name, modules_by_name
from lightning_wgsef.network.residual import residual_blocks
from lightning_wgsef.network.sharding import on_first_process
from lightning_wgsef.network.surgery import RemovalPlan, channel_removal

UNITS = {"flops": "FLOPs", "params": "parameters", "bytes": "bytes", "latency": "ms"}

# Shares of the groups of every layer that stay in the networks that are timed; None: another share
# of every layer. A share is varied by half of itself from layer to layer, so that what a layer
# reads and what it makes are told apart.
_LEVELS = (0.75, 0.75, 0.5, 0.5, 0.25, 0.25, 0.12, 0.12, None, None, None, None)


def slim_size(
    model: nn.Module,
    layers: Sequence[GroupedLayer],
    measure: str,
    example_input: Any,
    known: Tensor | None = None,
) -> SlimSize:
    """Measure what `slim` leaves of a network, as a function of its groups that are alive.

    Groups of a layer are alike if as many slices of everything that makes and reads them go with
    each. Of every such kind one group is taken out of a copy, by the surgery of `slim`, and the
    shapes of all parameters, buffers and operations are compared: they are affine in the numbers
    alive, and their products are the size. In the end half of all groups is taken out at once, and
    what comes out must be what the products say.

    Latency is fitted to what modules take at a number of widths (see `fitted`), with the
    example as it is, batch and all, on the model's device. Where torch.distributed runs, the first
    process measures for all, and every process has to ask.

    Args:
        model: any module; it is copied, not touched.
        layers: its groups.
        measure: "flops" (of one sample, as `network_report` counts), "params", "bytes", those
            of parameters and buffers, or "latency", in milliseconds.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.
        known: the `Groups.latency` that was measured before; None: measure it.

    Raises:
        ValueError: groups that cannot be taken out, or whose size cannot be told from widths.

    >>> from lightning_wgsef.groupings.per_layer import filter_groups
    >>> network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> layers = filter_groups(network).only(["0"]).layers
    >>> size = slim_size(network, layers, "params", torch.ones(1, 4))
    >>> int(size.total), size.costs(torch.ones(6, dtype=torch.bool)).tolist()
    (51, [8.0, 8.0, 8.0, 8.0, 8.0, 8.0])
    """
    stuck = {x.name: x.obstacle or f"groups of {x.grouping!r} stay in place" for x in layers}
    stuck = {x.name: stuck[x.name] for x in layers if not x.removable}
    if stuck:
        reasons = "; ".join(f"'{name}' ({why})" for name, why in stuck.items())
        raise ValueError(
            f"a size of the slim network needs groups that slim takes out; it cannot those of "
            f"{reasons}. Leave them out with exclude={list(stuck)}, or take grouping='structure'"
        )
    surgery = _Surgery(model, layers, example_input)
    kinds = _joined_kinds(surgery.kinds(layer) for layer in layers)
    count = int(kinds.max()) + 1
    counted = kinds.bincount().double()
    shapes = _Shapes(surgery, example_input, measure)
    counts = [layer.count for layer in layers]
    whole = torch.zeros(len(kinds), dtype=torch.bool)
    slopes = torch.zeros(len(shapes.sizes), count, dtype=torch.float64)
    owner = torch.cat([torch.full((n,), number) for number, n in enumerate(counts)])
    for kind in range(count):
        (first, *_) = (kinds == kind).nonzero().flatten().tolist()
        layer = layers[int(owner[first])]
        if first in surgery.modules.values() or layer.count < 2:
            continue  # it goes with all that it is; of one group nothing can go
        dead = whole.clone()
        dead[first] = True
        slopes[:, kind] = shapes.sizes - shapes.without(dead, layer.name)
    base = shapes.sizes - slopes @ counted
    size = _products(shapes, base, slopes, kinds, surgery.modules)
    device = layers[0].largest_member.parameter.device
    if measure == "latency":
        if known is not None and len(known) == 1 + len(size.coefficients):
            return size.with_latency(known.cpu()).to(device)
        shapes.measure_units(_narrower(kinds, owner, layers, surgery.modules.values()))
        size = _products(shapes, base, slopes, kinds, surgery.modules)
    _check(size, shapes, counts, layers)
    return size.to(device)


def counted_size(network: nn.Module, unit: str, example_input: Any) -> float:
    """Count the size of a network as it is.

    Args:
        network: any module.
        unit: "FLOPs" (of one sample), "parameters" or "bytes", as `SlimSize.unit` has it.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.

    >>> [counted_size(nn.Linear(4, 3), unit, torch.ones(1, 4)) for unit in ("FLOPs", "bytes")]
    [24.0, 60.0]
    """
    if unit == UNITS["flops"]:
        example_input, samples = _samples(network, example_input)
        return layer_flops(network, example_input)[1] / samples
    values = [*network.parameters(), *(network.buffers() if unit == UNITS["bytes"] else ())]
    sizes = [x.element_size() if unit == UNITS["bytes"] else 1 for x in values]
    return float(sum(n * x.numel() for n, x in zip(sizes, values, strict=True)))


class _Part(NamedTuple):
    """A product that counts: a parameter, a buffer, an operation, or what a module reads or makes.

    Attributes:
        name: of it; of what takes time, of the module or class that it belongs to.
        sizes: of all its axes.
        within: names of the modules that a group stands for, and that it is part of.
        value: what it costs for these sizes.
        operation: to count it with other sizes; None: the product of the sizes, times the unit.
        unit: bytes a number, a share, or 1.
        kind: of what takes time, as `fitted` has it.
    """

    name: str
    sizes: list[int]
    within: frozenset[str]
    operation: Operation | None = None
    unit: float = 1.0
    kind: int = ONE

    def value(self, sizes: Sequence[int]) -> float:
        if self.operation is not None:
            return self.operation.flops(sizes) * self.unit
        product = self.unit
        for size in sizes:
            product *= size
        return product


class _Surgery:
    """Takes groups out of copies of a model, as `slim` does.

    Attributes:
        modules: whole modules that go with a group, by name: residual blocks, and experts.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[GroupedLayer], example_input: Any
    ) -> None:
        self.model = model_copy(model).eval()
        self.layers = on_model(layers, self.model)
        self.modules: dict[str, int] = {}
        self.channels: dict[str, Removable] = {}
        self._blocks: list[str] = []
        first = 0
        for layer in layers:
            if layer.grouping == "layer":
                self._blocks = residual_blocks(self.model, example_input)
                self.modules |= {name: first + n for n, name in enumerate(self._blocks)}
            elif layer.grouping == "expert":
                found = next(x for x in expert_modules(self.model) if x.name == layer.name)
                own = enumerate(() if found.stacked else found.children)
                self.modules |= {found.path(path): first + n for n, path in own}
            first += layer.count
        channels = [x for x in self.layers if not x.has_reader and x.grouping != "layer"]
        if channels:
            self.graph = build_graph(self.model, example_input)
        for layer in channels:
            find = as_read_channels if layer.grouping == "channel" else as_channels
            self.channels[layer.name] = find(self.graph, layer)
        self.widths = False

    def kinds(self, layer: GroupedLayer) -> Tensor:
        """Number the kinds of the groups of a layer, shape (count,)."""
        if layer.grouping in ("layer", "expert"):
            return torch.arange(layer.count)
        own = next(x for x in self.layers if x.name == layer.name)
        columns = []
        found = self.channels.get(layer.name)
        if found is None:
            for member in own.members:
                index = torch.arange(member.slices) if member.index is None else member.index.cpu()
                columns.append(index[index >= 0].bincount(minlength=layer.count))
        else:
            for roots in found.tied.positions.values():
                of = torch.tensor(
                    [found.groups[found.tied.bundle[root]] for root in roots.values()]
                )
                columns.append(of.bincount(minlength=layer.count))
        alike: Tensor = torch.unique(torch.stack(columns, 1), dim=0, return_inverse=True)[1]
        return alike

    def plans(self, dead: Tensor) -> list[RemovalPlan]:
        """Plan to take out some groups, booleans of shape (m,), layer after layer."""
        units, channels, blocks = [], [], []
        for layer, gone in zip(
            self.layers,
            torch.split_with_sizes(dead, [layer.count for layer in self.layers]),
            strict=True,
        ):
            if layer.has_reader:
                units.append((layer, gone))
            elif layer.grouping == "layer":
                blocks += [name for name, one in zip(self._blocks, gone, strict=True) if one]
            elif bool(gone.any()):
                found = self.channels[layer.name]
                channels.append((found.tied, found.bundles(gone.nonzero().flatten())))
        plans = [RemovalPlan(skipped=blocks)]
        if channels:
            plans.append(channel_removal(self.graph, channels, widths=self.widths))
        if units:  # where no head goes, too: what stands for torch's attention is compared
            plans.append(unit_removal(self.model, units, widths=self.widths))
        return plans

    def without(self, dead: Tensor) -> nn.Module:
        """Copy the model without some groups."""
        small, (blocks, *others) = model_copy(self.model), self.plans(dead)
        for plan in (*others, blocks):
            plan.apply(small)
        return small


class _Shapes:
    """Sizes of all axes of everything that counts, of the dense network and of those without."""

    def __init__(self, surgery: _Surgery, example_input: Any, measure: str) -> None:
        self.surgery, self.measure = surgery, measure
        self.units: dict[tuple[str, int], float] = {}
        self.dense: float | None = None
        self.example_input, self.samples = example_input, 1
        if measure == "flops":
            self.example_input, self.samples = _samples(surgery.model, example_input)
        nobody = torch.zeros(sum(x.count for x in surgery.layers), dtype=torch.bool)
        self.parts = self._parts(nobody)
        self.sizes = self._joined(self.parts)

    def without(self, dead: Tensor, name: str) -> Tensor:
        """Return the same sizes without these groups, of a layer of this name."""
        try:
            found = self._parts(dead)
        except ValueError as error:
            if self.surgery.widths:
                raise ValueError(
                    f"the network does not run without a group of '{name}': "
                    f"{reason_of(error)}; leave it out with exclude=['{name}']"
                ) from error
            self.surgery.widths = True  # another way to say how wide all heads are
            return self.without(dead, name)
        kinds = [[(x.name, len(x.sizes)) for x in parts] for parts in (found, self.parts)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"the operations of the network are others without a group of '{name}', so that "
                f"its size cannot be told from widths; leave it out with exclude=['{name}']"
            )
        return self._joined(found)

    def count(self, dead: Tensor) -> float:
        """Count the size of the network without these groups."""
        parts = self._parts(dead)
        return sum(part.value(part.sizes) for part in parts)

    def measure_units(self, narrower: Iterable[Tensor]) -> None:
        """Find out what one unit of every part takes, in milliseconds, on one process for all."""
        self.dense, *units = on_first_process(lambda: self._measured(narrower))
        # By what they are of: some are gone where a block is, and what takes its place is free.
        self.units = {(x.name, x.kind): u for x, u in zip(self.parts, units, strict=True)}
        self.parts = self._with_units(self.parts)

    def _measured(self, narrower: Iterable[Tensor]) -> list[float]:
        whole = torch.zeros(sum(x.count for x in self.surgery.layers), dtype=torch.bool)
        networks = [self.surgery.without(dead) for dead in (whole, *narrower)]
        found = [self._parts_of(network) for network in networks]
        names = [part.name for part in self.parts]
        values = [[part.value(part.sizes) for part in parts] for parts in found]
        seconds, passes = [], pass_times(networks, self.example_input)
        for times, network in zip(passes, networks, strict=True):
            of_class: dict[str, float] = {}
            for name, module in modules_by_name(network).items():
                own = of_class.get(type(module).__name__, 0.0)
                of_class[type(module).__name__] = own + times.modules.get(name, 0.0)
            parts = {**of_class, **{f"'{x}'": t for x, t in times.modules.items()}}
            seconds.append([parts[name] for name in dict.fromkeys(names)])
        dense, *narrow = (times.whole for times in passes)
        # Often of widths that kernels like, and then faster than what is a little narrower.
        units = fitted(
            names,
            [part.kind for part in self.parts],
            torch.tensor(values[1:], dtype=torch.float64),
            torch.tensor(seconds[1:], dtype=torch.float64),
            torch.tensor(narrow, dtype=torch.float64),
        )
        return [1000 * dense, *(1000 * units).tolist()]

    def _parts(self, dead: Tensor) -> list[_Part]:
        return self._with_units(self._parts_of(self.surgery.without(dead)))

    def _with_units(self, parts: list[_Part]) -> list[_Part]:
        if not self.units:
            return parts
        return [x._replace(unit=self.units.get((x.name, x.kind), 0.0)) for x in parts]

    def _parts_of(self, network: nn.Module) -> list[_Part]:
        modules = self.surgery.modules
        if self.measure == "latency":
            return list(_timed_parts(network, self.example_input, modules))
        if self.measure == "flops":
            return [
                _Part(x.name, x.sizes, frozenset(x.within), x, 1 / self.samples)
                for x in operations(network, self.example_input, modules)
            ]
        values: dict[str, Tensor] = dict(network.named_parameters())
        if self.measure == "bytes":
            values |= dict(network.named_buffers())
        found = []
        for raw, value in values.items():
            name = canonical_name(raw)
            within = frozenset(own for own in modules if name.startswith(f"{own}."))
            unit = float(value.element_size()) if self.measure == "bytes" else 1.0
            found.append(_Part(name, list(value.shape), within, None, unit))
        return found

    @staticmethod
    def _joined(parts: Iterable[_Part]) -> Tensor:
        return torch.tensor([n for part in parts for n in part.sizes], dtype=torch.float64)


def _timed_parts(
    network: nn.Module, example_input: Any, modules: Collection[str]
) -> Iterator[_Part]:
    """Yield what takes time: of modules with products their own, of all others those of a class."""
    own = modules_by_name(network)
    products = operations(network, example_input, own)
    busy = {x.within[-1] for x in products}
    for x in products:
        within = frozenset(x.within) & frozenset(modules)
        yield _Part(f"'{x.within[-1]}'", x.sizes, within, x, kind=OPERATIONS)
    for call in module_calls(network, example_input):
        name = f"'{call.name}'" if call.name in busy else type(own[call.name]).__name__
        within = frozenset(call.within) & frozenset(modules)
        yield _Part(name, [], within)
        for kind, shapes in ((READ, call.read), (MADE, call.made)):
            for shape in shapes:
                yield _Part(name, list(shape), within, kind=kind)


def _narrower(
    kinds: Tensor, owner: Tensor, layers: Sequence[GroupedLayer], whole: Collection[int]
) -> Iterator[Tensor]:
    """Yield which groups are taken out of networks of other widths, booleans (m,)."""
    generator = torch.Generator().manual_seed(0)
    for level in _LEVELS:
        dead = torch.zeros(len(kinds), dtype=torch.bool)
        for kind in range(int(kinds.max()) + 1):
            own = (kinds == kind).nonzero().flatten()
            draw = float(torch.rand((), generator=generator, dtype=torch.float64))
            share = 0.1 + 0.9 * draw if level is None else min(1.0, level * (0.5 + draw))
            step = layers[int(owner[own[0]])].multiple
            count = max(1, round(share * len(own) / step)) * step
            if own[0] not in whole:
                dead[own[count:]] = True
        yield dead


def _samples(model: nn.Module, example_input: Any) -> tuple[Any, int]:
    """The example with two samples, as a report counts, or as it is where there is no batch."""
    try:
        two = with_batch_size(example_input, 2)
        operations(model, two)
    except ValueError:
        given = tensors(
            list(example_input.values()) if isinstance(example_input, Mapping) else example_input
        )
        return example_input, len(given[0]) if given and given[0].dim() else 1
    return two, 2


def _joined_kinds(parts: Iterable[Tensor]) -> Tensor:
    joined, first = [], 0
    for part in parts:
        joined.append(part + first)
        first += int(part.max()) + 1
    return torch.cat(joined)


def _products(
    shapes: _Shapes, base: Tensor, slopes: Tensor, kinds: Tensor, modules: Mapping[str, int]
) -> SlimSize:
    """Write what every part costs as a product of the widths that change."""
    widths: dict[tuple[float, ...], int] = {}
    products: dict[tuple[int, ...], float] = {}
    rows = torch.cat([base[:, None], slopes], 1).tolist()
    changing = (slopes != 0).any(1).tolist()
    first = 0
    for part in shapes.parts:
        places = range(first, first + len(part.sizes))
        first += len(part.sizes)
        dense = constant = part.value(part.sizes)
        factors = []
        varying = [tuple(rows[place]) for place in places if changing[place] and dense]
        for row in dict.fromkeys(varying):
            same = [tuple(rows[place]) == row for place in places]
            doubled = [2 * n if one else n for n, one in zip(part.sizes, same, strict=True)]
            power = round(torch.log2(torch.tensor(part.value(doubled) / dense)).item())
            number = widths.setdefault(row, len(widths))
            factors += [number] * power
            constant /= part.sizes[same.index(True)] ** power
        for name in part.within:
            alive = [0.0] * (slopes.shape[1] + 1)
            alive[1 + int(kinds[modules[name]])] = 1.0
            factors.append(widths.setdefault(tuple(alive), len(widths)))
        key = tuple(sorted(factors))
        products[key] = products.get(key, 0.0) + constant
    one = len(widths)
    most = max(1, *(len(key) for key in products)) if products else 1
    forms = torch.tensor([*widths, (1.0, *[0.0] * slopes.shape[1])], dtype=torch.float64)
    return SlimSize(
        unit=UNITS[shapes.measure],
        kinds=kinds,
        base=forms[:, 0],
        slopes=forms[:, 1:],
        coefficients=torch.tensor(list(products.values()), dtype=torch.float64),
        factors=torch.tensor(
            [[*key, *[one] * (most - len(key))] for key in products], dtype=torch.long
        ).view(-1, most),
        dense=None if shapes.dense is None else torch.tensor(shapes.dense, dtype=torch.float64),
    )


def _check(
    size: SlimSize, shapes: _Shapes, counts: list[int], layers: Sequence[GroupedLayer]
) -> None:
    """Take out half of all groups at once: what comes out must be what was foretold."""
    generator = torch.Generator().manual_seed(0)
    gone = torch.cat([torch.randperm(n, generator=generator) >= (n + 1) // 2 for n in counts])
    try:
        found = shapes.count(gone)
    except ValueError as error:
        raise ValueError(
            f"the network does not run without half of the groups of "
            f"{', '.join(x.name for x in layers)}: {reason_of(error)}; leave some out with "
            "exclude"
        ) from error
    foretold = float(size.of(~gone))
    if abs(foretold - found) > 1e-9 * found:
        raise ValueError(
            f"the size of the slim network cannot be told from widths: with half of the groups of "
            f"{', '.join(x.name for x in layers)} it has {found:g} {size.unit}, not {foretold:g}; "
            "leave some out with exclude, or give costs as tensors"
        )
    cheap = torch.split_with_sizes(size.costs(torch.ones_like(gone)), counts)
    free = [x.name for x, own in zip(layers, cheap, strict=True) if not bool((own > 0).all())]
    if free:
        raise ValueError(
            f"groups of {', '.join(map(repr, free))} cost no {size.unit}, so that taking them out "
            f"saves nothing; leave them out with exclude={free}, or take another size"
        )
