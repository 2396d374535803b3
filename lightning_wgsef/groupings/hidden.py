"""Hidden units of MLP blocks as groups, gated or not: the grouping `hidden`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.groupings.experts import expert_units
from lightning_wgsef.groupings.layout_proof import proved_layouts
from lightning_wgsef.groups.grouped_layer import GroupedLayer
from lightning_wgsef.groups.groups import Groups
from lightning_wgsef.groups.members import Member, input_member, output_members
from lightning_wgsef.network.attention import (
    DenseLayer,
    attention_blocks,
    dense_layers,
    parameter_problem,
)
from lightning_wgsef.network.layers import (
    canonical_name,
    is_lazy,
    modules_by_name,
    parameter_homes,
    unwrap,
)
from lightning_wgsef.network.recurrent import recurrent_layers, unit_indices

_GATED = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), ("wi_0", "wi_1", "wo"))

_BatchNorm = nn.modules.batchnorm._BatchNorm

_IN_ORDER = (nn.Sequential, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

_ACROSS_UNITS = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, nn.GLU)

_PER_UNIT = tuple(f"torch.nn.modules.{file}" for file in ("activation", "dropout", "container"))

Layers = dict[nn.Module, DenseLayer]


@dataclass(frozen=True, eq=False)
class _Step:
    """Module that is run: a dense layer, or something between dense layers."""

    name: str
    module: nn.Module
    layer: DenseLayer | None


@dataclass(frozen=True, eq=False)
class _Block:
    """Dense layers that make the hidden units, the one that reads them, and what lies between.

    Attributes:
        problem: why they cannot be grouped; "" if they can.
        doubt: what is not known of them without a trial; "" if nothing.
    """

    ups: tuple[DenseLayer, ...]
    down: DenseLayer
    between: tuple[_Step, ...]
    problem: str
    doubt: str

    @property
    def layers(self) -> tuple[DenseLayer, ...]:
        """All its dense layers."""
        return (*self.ups, self.down)


def hidden_groups(model: nn.Module, example_input: Any | None = None) -> Groups:
    """Group what makes and what reads one hidden unit of an MLP block.

    That is a row of the first dense layer with its bias, and a column of the second; in gated
    blocks (as in Llama) a row of the gate and one of the other first layer. A BatchNorm between
    the two adds its scale and shift. The bias of the second layer belongs to no unit. A unit that
    is zero adds nothing to the output, whatever the activation makes of zero.

    A block is two dense layers in one module, or in its children that hold one dense layer each, of
    which the second reads as many features as the first has outputs. In `nn.Sequential` they follow
    each other. Elsewhere the order of execution is unknown: layers are taken in order of
    definition, and the first must not be square, so that the two cannot read the same input. Blocks
    do not overlap: where they would, the first counts and the next is left out. Layers of attention
    modules are no hidden layers. Experts that share weights of three axes are a layer each, and
    keep as many units each. A fused gate, a first layer with twice as many outputs as the
    second reads, such weights of experts, and what the order of definition leaves open need an
    example input, on which the units are proved: with the columns of half of them at zero, their
    rows may be anything.

    A hidden unit of `nn.LSTM`, `nn.GRU`, `nn.RNN` or a cell is its rows of all gates with
    their biases, in all layers and directions at once, since these are of one width. A unit that is
    zero stays zero in every state, unless a state that is given has something there.

    Args:
        model: any module; it is copied, not touched.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them.

    >>> groups = hidden_groups(nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4)))
    >>> print(groups)
    layer  grouping  groups  weights each  budget  removable
    0        hidden      16             9       -        yes
    """
    hidden = dense_layers(model)
    for attention in attention_blocks(model):
        # A module that holds more than attention lends only its projections.
        whole = attention.problem or "attention" in type(attention.module).__name__.lower()
        projections = [layer.module for layer in attention.layers.values()]
        for module in attention.module.modules() if whole else projections:
            hidden.pop(module, None)
    found: dict[str, GroupedLayer] = {}
    pending: dict[str, list[GroupedLayer]] = {}
    left_out: dict[str, str] = {}
    owners: dict[DenseLayer, str] = {}
    for raw, parent in model.named_modules():
        for block in _blocks(_steps(canonical_name(raw), parent, hidden), parent):
            name = block.ups[0].name
            shared = [owners[x] for x in block.layers if x in owners]
            if shared:
                left_out[name] = f"its units would share weights with those of '{shared[0]}'"
                continue
            if block.problem or (block.doubt and example_input is None):
                left_out[name] = block.problem or block.doubt
                continue
            if block.doubt:
                pending[name] = _layouts(block)
                left_out[name] = block.doubt  # until it is proved
            else:
                found[name] = _units(block)
            owners.update(dict.fromkeys(block.layers, name))
    if pending:
        proved, wrong = proved_layouts(model, example_input, pending)
        found.update(proved)
        left_out.update({name: why or f"{left_out[name]}, {_TRIED}" for name, why in wrong.items()})
    recurrent, problems = _recurrent_units(model)
    found.update({layer.name: layer for layer in recurrent})
    left_out.update(problems)
    order = [name for name in modules_by_name(model) if name in found]
    inside, unknown = expert_units(model, example_input)
    left_out = {n: x for n, x in left_out.items() if n not in found}
    return Groups([found[name] for name in order] + inside, {**left_out, **unknown})


_TRIED = "and on example_input it acts like no layer of hidden units"


def _layouts(block: _Block) -> list[GroupedLayer]:
    """Groups of the units where a fused gate holds both halves one after another, or in turn."""
    width, rows = block.down.inputs, torch.arange(block.ups[0].outputs)
    if len(rows) == width:
        return [_units(block)]
    device = block.ups[0].weight.device
    return [_units(block, index.to(device)) for index in (rows % width, rows // 2)]


def _steps(name: str, parent: nn.Module, hidden: Layers) -> list[_Step]:
    """List the children of ``parent``; for one that holds a single dense layer, its children."""
    steps = []
    for path, child in _children(name, parent):
        within = _children(path, child)
        inside = [module for module in child.modules() if module in hidden]
        is_around_one = len(inside) == 1 and inside[0] in [module for _, module in within]
        for step, module in within if is_around_one else [(path, child)]:
            steps.append(_Step(step, module, hidden.get(module)))
    return steps


def _children(name: str, parent: nn.Module) -> list[tuple[str, nn.Module]]:
    children = [(f"{name}.{path}".lstrip("."), child) for path, child in parent.named_children()]
    return [(canonical_name(path), unwrap(child)) for path, child in children]


def _blocks(steps: list[_Step], parent: nn.Module) -> Iterator[_Block]:
    """Yield every candidate for a block among the steps."""
    layers = [step.layer for step in steps if step.layer is not None]
    gated: list[DenseLayer] = []
    for ups, down in [] if isinstance(parent, nn.Sequential) else _gated(layers):
        gated += [*ups, down]
        yield _block(ups, down, steps, parent)
    for up, down in pairwise(layers):
        if up in gated or not _has_shapes(up, down):
            continue
        if up.outputs in (down.inputs, 2 * down.inputs):
            yield _block([up], down, steps, parent)


def _gated(layers: list[DenseLayer]) -> Iterator[tuple[list[DenseLayer], DenseLayer]]:
    """Yield two layers of the same shape and one that reads as many features as they make."""
    named = {layer.name.rpartition(".")[2]: layer for layer in layers}
    for names in _GATED:
        if all(name in named for name in names):
            gate, up, down = (named[name] for name in names)
            if _is_gated(gate, up, down):
                yield [gate, up], down
                layers = [layer for layer in layers if layer not in (gate, up, down)]
    for gate, up, down in zip(layers, layers[1:], layers[2:], strict=False):
        # The second does not read the first, and both fit the third.
        if _is_gated(gate, up, down) and gate.inputs != gate.outputs:
            yield [gate, up], down


def _is_gated(gate: DenseLayer, up: DenseLayer, down: DenseLayer) -> bool:
    if not _has_shapes(gate, up, down):
        return False
    return gate.weight.shape == up.weight.shape and up.outputs == down.inputs


def _has_shapes(*layers: DenseLayer) -> bool:
    return not any(is_lazy(layer.weight) for layer in layers)


def _block(
    ups: list[DenseLayer], down: DenseLayer, steps: list[_Step], parent: nn.Module
) -> _Block:
    width, places = down.inputs, [step.layer for step in steps]
    ends = sorted(places.index(layer) for layer in (*ups, down))
    between = [step for step in steps[ends[0] : ends[-1]] if step.layer is None]
    if not isinstance(parent, _IN_ORDER) and ups[0].inputs != width:
        # Wherever it is defined, a norm of the hidden width can only be here.
        others = [step for step in steps if step not in between and _is_norm(step.module)]
        between += [step for step in others if _norm_width(step.module) == width]
    between = [x for x in between if not _is_norm(x.module) or _norm_width(x.module) in (0, width)]
    problem = next((f"'{x.name}': {x.problem}" for x in (*ups, down) if x.problem), "")
    doubt = ""
    if len(ups) == 1 and not isinstance(parent, _IN_ORDER) and ups[0].inputs == width:
        doubt = (
            f"'{down.name}' may read its outputs or its inputs: both are {width}, and outside of "
            "nn.Sequential nothing tells which"
        )
    if ups[0].outputs != width:
        doubt = f"its {ups[0].outputs} outputs are twice what '{down.name}' reads (a fused gate)"
    for step in between:
        if not _is_norm(step.module) and not _acts_per_unit(step.module, width):
            doubt = doubt or (
                f"between it and '{down.name}' is {type(step.module).__name__} '{step.name}', "
                "which may not act on every unit alone"
            )
        if is_lazy(getattr(step.module, "weight", None)):
            problem = problem or f"'{step.name}' has no shape yet: run one forward pass first"
    return _Block(tuple(ups), down, tuple(between), problem, doubt)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _norm_width(module: nn.Module) -> int:
    """Count the features that the norm has a scale for; 0 where it does not say."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and not is_lazy(weight):
        return weight.numel()
    return int(getattr(module, "num_features", 0))


def _acts_per_unit(module: nn.Module, width: int) -> bool:
    if isinstance(module, nn.PReLU):
        return module.num_parameters in (1, width)
    if any(True for _ in module.children()):
        return all(_acts_per_unit(child, width) for child in module.children())
    if isinstance(module, _ACROSS_UNITS) or any(True for _ in module.parameters()):
        return False
    # Other modules without weights are taken for activations.
    file = type(module).__module__
    return not file.startswith("torch.nn.") or file in _PER_UNIT or isinstance(module, nn.Identity)


def _units(block: _Block, index: Tensor | None = None) -> GroupedLayer:
    width, obstacle = block.down.inputs, ""
    members = [member for layer in block.ups for member in output_members(layer, index)]
    for step in block.between:
        if _is_norm(step.module) and not isinstance(step.module, _BatchNorm):
            kind = type(step.module).__name__
            obstacle = f"{kind} '{step.name}' normalises over the hidden units"
            continue
        for name, parameter in step.module.named_parameters():
            # The scale and shift of BatchNorm, the slopes of PReLU.
            if parameter.numel() == width and width in parameter.shape:
                axis = list(parameter.shape).index(width)
                members.append(Member(f"{step.name}.{name}", parameter, (axis,)))
    members.append(input_member(block.down))
    return GroupedLayer(
        block.ups[0].name,
        "hidden",
        width,
        tuple(members),
        removable=not obstacle,
        obstacle=obstacle,
        has_reader=True,
    )


def _recurrent_units(model: nn.Module) -> tuple[list[GroupedLayer], dict[str, str]]:
    """Group the hidden units of recurrent layers; of those that cannot be, say why."""
    layers, homes = [], parameter_homes(model)
    left_out = {
        canonical_name(name): f"{type(module).__name__} has a forward of its own"
        for name, module in model.named_modules()
        if isinstance(module, nn.RNNBase | nn.RNNCellBase)
    }
    for name, module in recurrent_layers(model):
        indices = unit_indices(module)
        if problem := parameter_problem(module, indices, homes):
            left_out[name] = problem
            continue
        left_out.pop(name)
        members = [
            Member(f"{name}.{parameter}".lstrip("."), getattr(module, parameter), (0,), index)
            for parameter, index in indices.items()
        ]
        count = int(module.hidden_size)  # type: ignore[arg-type]  # nn.Module: Tensor | Module
        layers.append(GroupedLayer(name, "hidden", count, tuple(members), removable=True))
    return layers, left_out
