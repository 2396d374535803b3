"""Attention modules of a model, and the weights that project queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from lightning_wgsef.network.layers import (
    Homes,
    canonical_name,
    computed_weight,
    is_lazy,
    parameter_homes,
    unwrap,
)
from lightning_wgsef.network.look_alikes import acts_like

ROLES = ("query", "key", "value")

_TORCH_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")

_TORCH_PARAMETERS = (*_TORCH_WEIGHTS, "in_proj_bias", "bias_k", "bias_v")


@dataclass(frozen=True)
class ProjectionNames:
    """Where an attention module keeps its dense layers, as paths from the module.

    One path for several of query, key and value is a fused layer. With an example input it is tried
    how its outputs lie: all heads of the queries, then all of the keys, then all of the values, or
    the three of every head (or of some of them) side by side. Without one, ``by_kind`` says whether
    the first may be taken for granted.
    """

    query: str
    key: str
    value: str
    output: str
    by_kind: bool = True


def _fused(projection: str, output: str, *, by_kind: bool = True) -> ProjectionNames:
    return ProjectionNames(projection, projection, projection, output, by_kind)


# The names that are tried on every module, the first that fit count.
PROJECTIONS: list[ProjectionNames] = [
    ProjectionNames("q_proj", "k_proj", "v_proj", "o_proj"),  # Llama, Mistral, Qwen, ViT
    ProjectionNames("q_proj", "k_proj", "v_proj", "out_proj"),  # OPT, CLIP, Whisper, BART
    ProjectionNames("q_proj", "k_proj", "v_proj", "dense"),  # Phi
    ProjectionNames("self.query", "self.key", "self.value", "output.dense"),  # BERT, RoBERTa
    ProjectionNames("attention.query", "attention.key", "attention.value", "output.dense"),
    ProjectionNames("query", "key", "value", "dense"),  # ALBERT
    ProjectionNames("query", "key", "value", "proj"),  # PVT
    ProjectionNames(
        "self.query_proj", "self.key_proj", "self.value_proj", "output.dense"
    ),  # DeBERTa
    ProjectionNames("self.in_proj", "self.in_proj", "self.in_proj", "output.dense", by_kind=False),
    ProjectionNames("q", "k", "v", "o"),  # T5
    ProjectionNames("q_lin", "k_lin", "v_lin", "out_lin"),  # DistilBERT
    ProjectionNames("wq", "wk", "wv", "wo"),  # Llama as first published
    _fused("qkv", "proj"),  # timm
    _fused("qkv_proj", "o_proj"),  # Phi-3
    _fused("Wqkv", "Wo"),  # ModernBERT
    _fused("Wqkv", "out_proj"),  # MPT
    ProjectionNames("q_attn", "c_attn", "c_attn", "c_proj"),  # GPT-2, cross-attention
    _fused("c_attn", "c_proj"),  # GPT-2
    _fused("query_key_value", "dense", by_kind=False),  # GPT-NeoX, Falcon, BLOOM, Persimmon
    _fused("qkv_proj", "out_proj", by_kind=False),  # CodeGen
    _fused("qkv", "out_proj", by_kind=False),  # monai
    _fused("to_qkv", "to_out.0", by_kind=False),  # vit-pytorch
    _fused("to_qkv", "to_out", by_kind=False),
    ProjectionNames("to_q", "to_kv", "to_kv", "to_out.0", by_kind=False),
    ProjectionNames("to_q", "to_kv", "to_kv", "to_out", by_kind=False),
    ProjectionNames("to_q", "to_k", "to_v", "to_out.0"),  # diffusers
    ProjectionNames("to_q", "to_k", "to_v", "to_out"),  # x-transformers
    ProjectionNames("q_b_proj", "kv_b_proj", "kv_b_proj", "o_proj", by_kind=False),  # DeepSeek
    ProjectionNames("q_proj", "kv_b_proj", "kv_b_proj", "o_proj", by_kind=False),
]


def register_projections(names: ProjectionNames) -> None:
    """Let attention modules with these names be found; they are tried before all others.

    Raises:
        ValueError: a path is empty, or the output is a layer of the queries, keys or values.

    >>> register_projections(ProjectionNames("to_q", "to_k", "to_v", "to_out.0"))
    >>> PROJECTIONS.pop(0).output
    'to_out.0'
    """
    inputs = [names.query, names.key, names.value]
    if not all([*inputs, names.output]) or names.output in inputs:
        raise ValueError(
            "names must be four paths of layers, of which output differs from the others, "
            f"got {names}"
        )
    PROJECTIONS.insert(0, names)


@dataclass(frozen=True, eq=False)
class DenseLayer:
    """A dense layer: whatever computes x Wᵀ + b, or x W + b as the `Conv1D` of GPT-2 does.

    Attributes:
        name: canonical name.
        module: the layer.
        problem: why its weights cannot be grouped; "" if they can.
    """

    name: str
    module: nn.Module
    problem: str

    @property
    def weight(self) -> Tensor:
        """The weight: (out, in), or (in, out) where it is transposed."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]  # nn.Module: Tensor | Module
        return weight

    @property
    def output_axis(self) -> int:
        """The axis of the weight along which its outputs lie."""
        return int(_is_transposed(self.module))

    @property
    def outputs(self) -> int:
        """Number of output features."""
        return self.weight.shape[self.output_axis]

    @property
    def inputs(self) -> int:
        """Number of input features."""
        return self.weight.shape[1 - self.output_axis]

    def path(self, parameter: str) -> str:
        """Canonical name of one of its parameters."""
        return f"{self.name}.{parameter}" if self.name else parameter


@dataclass(frozen=True, eq=False)
class AttentionBlock:
    """An attention module and its projections.

    Attributes:
        name: canonical name of the module.
        module: the module.
        holder: the module in it (or itself) that holds the projection of the queries.
        problem: why its heads cannot be grouped; "" if nothing is known against it.
        layers: its dense layers by role: "query", "key", "value" (of torch's module these are
            parameters, not layers) and "output"; a fused layer has several roles.
        by_kind: whether a fused layer may be taken to hold all queries, then keys, then values.
    """

    name: str
    module: nn.Module
    holder: nn.Module
    problem: str = ""
    layers: dict[str, DenseLayer] = field(default_factory=dict)
    by_kind: bool = True


def dense_layers(model: nn.Module) -> dict[nn.Module, DenseLayer]:
    """Every dense layer of ``model``, in the order in which they are defined.

    >>> [layer.name for layer in dense_layers(nn.Sequential(nn.ReLU(), nn.Linear(3, 2))).values()]
    ['1']
    """
    homes = parameter_homes(model)
    return {
        module: DenseLayer(
            canonical_name(name), module, parameter_problem(module, ("weight", "bias"), homes)
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or _is_transposed(module) or acts_like(module) is nn.Linear
    }


def attention_blocks(model: nn.Module) -> Iterator[AttentionBlock]:
    """Every attention module of ``model``: torch's own, and those whose names are `PROJECTIONS`.

    >>> layer = nn.TransformerEncoderLayer(8, nhead=2)
    >>> [(block.name, block.layers["output"].name) for block in attention_blocks(layer)]
    [('self_attn', 'self_attn.out_proj')]
    """
    dense, homes = dense_layers(model), parameter_homes(model)
    used: set[nn.Module] = set()
    unknown = []
    for raw, module in model.named_modules():
        name = canonical_name(raw)
        if isinstance(module, nn.MultiheadAttention):
            yield _torch_block(name, module, dense, homes)
            used.update(module.modules())
            continue
        for names in PROJECTIONS if module._modules else ():
            layers = _projections(module, names)
            is_module = isinstance(layers.get("output"), nn.Sequential | nn.ModuleList)
            if layers and not is_module and not used.intersection(layers.values()):
                yield _named_block(name, module, names, layers, dense)
                used.update(layers.values())
                break
        else:
            if "attention" in type(module).__name__.lower():
                unknown.append((name, module))
    for name, module in unknown:
        inside = [layer for layer in dense if layer in set(module.children())]
        if inside and not used.intersection(module.modules()):
            names_inside = ", ".join(dense[layer].name for layer in inside)
            yield AttentionBlock(
                name,
                module,
                module,
                f"which of {names_inside} are its query, key, value and output is not known: "
                "say it with lightning_wgsef.groupings.register_projections",
            )


def parameter_problem(module: nn.Module, names: Iterable[str], homes: Homes) -> str:
    """Why parameters of ``module`` cannot be grouped; "" if they can."""
    for name in names:
        parameter = getattr(module, name, None)
        if parameter is None:
            continue
        if not isinstance(parameter, nn.Parameter):
            return computed_weight(module, name)
        if is_lazy(parameter):
            return f"its {name} has no shape yet (lazy layer): run one forward pass first"
        if not parameter.is_floating_point():
            return f"its {name} is {parameter.dtype}"
        if len(homes[id(parameter)]) > 1:
            return f"its {name} is shared (tied): {', '.join(homes[id(parameter)])}"
        if not parameter.numel():
            return f"its {name} is empty"
    return ""


def _is_transposed(module: nn.Module) -> bool:
    # transformers is not imported for it, so the class is known by name and attribute.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _projections(module: nn.Module, names: ProjectionNames) -> dict[str, nn.Module]:
    """The modules at the paths, by role; none where one is missing, as almost everywhere."""
    found = {}
    for role in (*ROLES, "output"):
        layer = _inner(module, getattr(names, role))
        if layer is None:
            return {}
        found[role] = layer
    return found


def _inner(module: nn.Module, path: str) -> nn.Module | None:
    """The module at ``path``, without wrappers; None if there is none."""
    for part in path.split("."):
        if part not in module._modules:  # of TorchScript it is no dict, and has no get
            return None
        child = module._modules[part]
        if child is None:
            return None
        module = unwrap(child)
    return module


def _torch_block(
    name: str, module: nn.MultiheadAttention, dense: dict[nn.Module, DenseLayer], homes: Homes
) -> AttentionBlock:
    problem = parameter_problem(module, _TORCH_PARAMETERS, homes)
    output = unwrap(module.out_proj)
    problem = problem or _layer_problem("out_proj", output, dense)
    layers = {} if problem else {"output": dense[output]}
    return AttentionBlock(name, module, module, problem, layers)


def _named_block(
    name: str,
    module: nn.Module,
    names: ProjectionNames,
    found: dict[str, nn.Module],
    dense: dict[nn.Module, DenseLayer],
) -> AttentionBlock:
    problems = [_layer_problem(getattr(names, role), x, dense) for role, x in found.items()]
    problem = next(filter(None, problems), "")
    path, _, _ = names.query.rpartition(".")
    holder = (_inner(module, path) if path else None) or module
    layers = {} if problem else {role: dense[x] for role, x in found.items()}
    return AttentionBlock(name, module, holder, problem, layers, names.by_kind)


def _layer_problem(path: str, module: nn.Module, dense: dict[nn.Module, DenseLayer]) -> str:
    if module not in dense:
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if hasattr(module, "base_layer"):
            return (
                f"its {path} is a {kind} around a frozen layer: merge the adapter into it first "
                "(merge_and_unload of peft)"
            )
        return f"its {path} is a {kind}, which does not compute x Wᵀ + b when tried"
    return dense[module].problem and f"{path}: {dense[module].problem}"
