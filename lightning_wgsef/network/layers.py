"""Layers of a model whose weights can be grouped, and how those weights are laid out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_wgsef.network.look_alikes import acts_like

_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_Transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_Norm = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
)

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_WRAPPED = re.compile(rf"(^|\.)({'|'.join(_WRAPPERS)})(?=\.|$)")

# The names under which modules hold every parameter, by its id.
Homes = dict[int, list[str]]

GROUPABLE = "Conv1d/2d/3d, ConvTranspose1d/2d/3d and Linear"


@dataclass(frozen=True, eq=False)
class WeightedLayer:
    """A convolution or dense layer.

    Attributes:
        name: canonical name.
        module: the layer.
        norm: name and module of the norm that follows it and scales its outputs, if any.
        problem: why its weights cannot be trained as groups; "" if they can.
    """

    name: str
    module: nn.Module
    norm: tuple[str, nn.Module] | None = None
    problem: str = ""

    @property
    def weight(self) -> Tensor:
        """The weight: (out, in, ...), or (in, out, ...) for a transposed convolution."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]  # nn.Module: Tensor | Module
        return weight

    def path(self, parameter: str) -> str:
        """Canonical name of one of its parameters."""
        return f"{self.name}.{parameter}" if self.name else parameter

    @property
    def transposed(self) -> bool:
        """True where the weight's first axis is the input's."""
        return isinstance(self.module, _Transposed)

    @property
    def split(self) -> int:
        """Number of independent parts of a grouped convolution, 1 elsewhere."""
        return int(getattr(self.module, "groups", 1))

    @property
    def inputs(self) -> int:
        """Number of input channels or features."""
        shape = self.weight.shape
        return shape[0] if self.transposed else shape[1] * self.split

    @property
    def outputs(self) -> int:
        """Number of output channels or features."""
        shape = self.weight.shape
        return shape[1] * self.split if self.transposed else shape[0]

    def output_slices(self) -> tuple[tuple[int, ...], Tensor | None]:
        """Axes and index of the weight's slices by output, as a `Member` takes them."""
        if not self.transposed:
            return (0,), None
        return self._second_axis()

    def input_slices(self) -> tuple[tuple[int, ...], Tensor | None]:
        """Axes and index of the weight's slices by input, as a `Member` takes them."""
        if self.transposed:
            return (0,), None
        return self._second_axis()

    def _second_axis(self) -> tuple[tuple[int, ...], Tensor | None]:
        if self.split == 1:
            return (1,), None
        # Part p of a grouped convolution holds rows p*n/split.. and its own channels: the second
        # axis counts channels within the part.
        rows, columns = self.weight.shape[:2]
        part = torch.arange(rows, device=self.weight.device).div(
            rows // self.split, rounding_mode="floor"
        )
        within = torch.arange(columns, device=self.weight.device)
        return (0, 1), (part[:, None] * columns + within[None, :]).flatten()


def canonical_name(name: str) -> str:
    """A module or parameter name without the prefixes that wrappers add.

    >>> canonical_name("_orig_mod.encoder._orig_mod.conv1.weight")
    'encoder.conv1.weight'
    """
    return _WRAPPED.sub("", name).lstrip(".")


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside what torch.compile, FSDP and checkpointing wrap around it.

    >>> layer = nn.Linear(2, 2)
    >>> unwrap(torch.compile(layer, backend="eager")) is layer
    True
    """
    for wrapper in _WRAPPERS:
        inside = getattr(module, wrapper, None)
        if isinstance(inside, nn.Module):
            return unwrap(inside)
    return module


def parameter_homes(model: nn.Module) -> Homes:
    """List the names of every parameter in the modules that hold it; a shared one has several.

    >>> network = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    >>> network[1].weight = network[0].weight
    >>> list(parameter_homes(network).values())
    [['0.weight', '1.weight']]
    """
    homes: Homes = {}
    for raw, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            homes.setdefault(id(parameter), []).append(canonical_name(f"{raw}.{name}"))
    return homes


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by canonical name; of a module and its wrapper, the module.

    >>> list(modules_by_name(nn.Sequential(nn.ReLU())))
    ['', '0']
    """
    return {canonical_name(name): module for name, module in model.named_modules()}


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by canonical name; a shared one has its first.

    >>> list(tensors_by_name(nn.BatchNorm1d(2)))[:3]
    ['weight', 'bias', 'running_mean']
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    return {canonical_name(name): tensor for name, tensor in named}


def weighted_layers(model: nn.Module) -> Iterator[WeightedLayer]:
    """Every convolution and dense layer of ``model``, in the order in which they are defined.

    >>> network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> [(layer.name, layer.norm[0]) for layer in weighted_layers(network)]
    [('0', '1')]
    """
    norms, homes = _following_norms(model), parameter_homes(model)
    found = weighted_modules(model)
    for name, module in found.items():
        yield WeightedLayer(name, module, norms.get(name), _problem(name, module, homes, found))


def weighted_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `weighted_layers`, by canonical name: norms and problems take longer to find.

    >>> list(weighted_modules(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))))
    ['1']
    """
    return {name: x for name, x in modules_by_name(model).items() if _is_weighted(x)}


def usable_layers(model: nn.Module) -> tuple[list[WeightedLayer], dict[str, str]]:
    """The layers whose weights can be grouped, and why the others cannot, by name."""
    layers = list(weighted_layers(model))
    left_out = {layer.name: layer.problem for layer in layers if layer.problem}
    return [x for x in layers if not x.problem], {**left_out, **other_layers(model)}


def other_layers(model: nn.Module) -> dict[str, str]:
    """Modules with matrices of weights that are neither convolutions nor dense, with the reason."""
    reasons = {}
    for raw, module in model.named_modules():
        if _is_weighted(module) or ".parametrizations." in f".{raw}.":
            continue
        parameters = module.parameters(recurse=False)
        if any(not is_lazy(parameter) and parameter.dim() > 1 for parameter in parameters):
            reason = f"{type(module).__name__} is none of {GROUPABLE}"
            if isinstance(module, torch.jit.ScriptModule):
                reason = "compiled by TorchScript, it stays as it is; compile the slim network"
            reasons[canonical_name(raw)] = reason
    return reasons


def is_lazy(parameter: object) -> bool:
    """Does the parameter wait for a first forward pass to get its shape?"""
    return isinstance(parameter, nn.parameter.UninitializedParameter)


def _is_weighted(module: nn.Module) -> bool:
    known = isinstance(module, (*_Convolution, *_Transposed, nn.Linear))
    return known or acts_like(module) is not None


def computed_weight(module: nn.Module, name: str = "weight") -> str:
    """Say that a weight is no parameter, and what makes it one.

    >>> layer = torch.nn.utils.prune.l1_unstructured(nn.Linear(4, 2), "weight", 0.5)
    >>> computed_weight(layer)[:70]
    'its weight is computed from other tensors (a mask of torch.nn.utils.pr'
    """
    said = f"its {name} is computed from other tensors"
    if hasattr(module, f"{name}_orig") and hasattr(module, f"{name}_mask"):
        remove = f"torch.nn.utils.prune.remove(module, '{name}')"
        return f"{said} (a mask of torch.nn.utils.prune); {remove} makes it permanent"
    if hasattr(module, f"{name}_g"):
        return f"{said} (weight_norm); torch.nn.utils.remove_weight_norm makes it a parameter"
    if is_parametrized(module, name):
        remove = f"torch.nn.utils.parametrize.remove_parametrizations(module, '{name}')"
        return f"{said} (a parametrisation); {remove} makes it a parameter"
    return f"{said}, not a parameter"


def _problem(name: str, module: nn.Module, homes: Homes, weighted: Mapping[str, nn.Module]) -> str:
    weight = getattr(module, "weight", None)
    if is_lazy(weight):
        return "its weight has no shape yet (lazy layer): run one forward pass first"
    if not isinstance(weight, nn.Parameter):
        return computed_weight(module)
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    # A shared weight belongs to what cannot be grouped, else to the first layer.
    sharing = [home.rpartition(".")[0] for home in homes[id(weight)]]
    owner = min(sharing, key=lambda path: path in weighted)
    if owner != name:
        return f"its weight is that of '{owner}' (tied)"
    if not weight.numel():
        return "its weight is empty"
    return ""


def _following_norms(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """The norm behind each layer: of its width, the next weighted module of the same parent.

    Where names carry numbers (conv1, conv2, bn1, bn2) the norm of the same number wins, so that the
    order of definition does not mislead.
    """
    found: dict[str, tuple[str, nn.Module]] = {}
    for parent_name, parent in model.named_modules():
        prefix = f"{canonical_name(parent_name)}." if canonical_name(parent_name) else ""
        children = [
            (name, unwrap(child))
            for name, child in parent.named_children()
            if any(True for _ in child.parameters())
        ]
        for name, layer in children:
            for inside, norm in layer.named_children() if _is_weighted(layer) else ():
                if _fits(norm, layer):  # a layer that holds its norm
                    path = canonical_name(f"{prefix}{name}")
                    found.setdefault(path, (f"{path}.{inside}", norm))
        taken: dict[str, str] = {}
        for adjacent in (True, False):
            for position, (name, layer) in enumerate(children):
                if not _is_weighted(layer):
                    continue
                end = position + 2 if adjacent else len(children)
                for norm_name, norm in children[position + 1 : end]:
                    free = name not in taken and norm_name not in taken.values()
                    if free and _fits(norm, layer) and _paired(name, norm_name, adjacent):
                        taken[name] = norm_name
                        path = canonical_name(f"{prefix}{norm_name}")
                        found.setdefault(canonical_name(f"{prefix}{name}"), (path, norm))
    return found


def _number(name: str) -> str | None:
    """The number at the end of a name like conv1; None for names without letters or number."""
    match = re.fullmatch(r"\D+(\d+)", name)
    return match.group(1) if match else None


def _paired(layer: str, norm: str, adjacent: bool) -> bool:
    """Do the names allow it: equal numbers, or neighbours of which one has none?"""
    numbers = _number(layer), _number(norm)
    if None in numbers:
        return adjacent
    return numbers[0] == numbers[1]


def _fits(norm: nn.Module, layer: nn.Module) -> bool:
    weight = getattr(norm, "weight", None)
    width = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None)
    if not isinstance(norm, _Norm) or not isinstance(weight, nn.Parameter) or is_lazy(weight):
        return False
    return len(weight) == width
