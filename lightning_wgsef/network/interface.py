"""Interface of a network: which layers read its inputs, and which make its outputs."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_wgsef.network.attention import attention_blocks
from lightning_wgsef.network.example_input import (
    add_call_hook,
    add_return_hook,
    evaluation,
    mapped,
    observed,
    on_device_of,
    tensors,
)
from lightning_wgsef.network.layers import WeightedLayer, canonical_name, is_lazy, weighted_layers

INPUT = "its channels are the network's input"

OUTPUT = "its filters are the network's outputs"

# Functions that make each feature of several, where one of their operands is a matrix of weights.
_MIXING = re.compile(
    "linear|conv|matmul|mm$|mv$|dot$|einsum|embedding|lstm|gru|rnn|attention|transformer"
)

_LOOK_UP = re.compile("getitem|index|gather|take")

_JOINING = re.compile("cat$|concat|stack$")


@dataclass(frozen=True)
class Interface:
    """Layers at the two ends of a network.

    Attributes:
        inputs: why the input channels of a layer are the network's, by name of the layer.
        outputs: why the filters of a layer are the network's outputs, by name of the layer.
        other_inputs: what speaks for further layers that may read an input, where none was seen.
        other_outputs: what speaks for further layers that may make an output.
        unseen: why no forward pass was seen; "" if one was.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)
    other_inputs: Mapping[str, str] = field(default_factory=dict)
    other_outputs: Mapping[str, str] = field(default_factory=dict)
    unseen: str = ""


def network_interface(model: nn.Module, example_input: Any | None) -> Interface:
    """Find what reads the network's inputs and what makes its outputs.

    Seen in a forward pass on ``example_input``, else on the model's own ``example_input_array``;
    where there is none, or it cannot be run, taken from the order of definition.

    >>> network = nn.ModuleDict({"time": nn.Linear(2, 4), "image": nn.Linear(3, 4)})
    >>> network_interface(network, None).inputs
    {'time': "first layer: its channels are the network's input"}
    """
    example = example_input
    if example is None:
        example = getattr(model, "example_input_array", None)
        if example is None:
            return interface_by_order(model)
        types = [p.dtype for p in model.parameters() if p.is_floating_point()]
        example = mapped(partial(_in_type, types[0] if types else torch.float32), example)
    if any(map(is_lazy, model.parameters())):
        return replace(interface_by_order(model), unseen="it has lazy layers without a shape")
    observer = InterfaceObserver(model)
    try:
        with ExitStack() as stack:
            stack.enter_context(evaluation(model))
            stack.enter_context(observed({}))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.random.fork_rng([]))
            inputs = on_device_of(model, example)
            observer.reads(inputs)
            with observer.watching():
                returned = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
            observer.returns(returned)
    except Exception as error:  # somebody's forward may raise anything
        reason = f"{type(model).__name__} does not run on it: {type(error).__name__}: {error}"
        return replace(interface_by_order(model), unseen=f"example_input: {reason}")
    return observer.interface()


def interface_of_batch(model: nn.Module, batch: Any) -> Interface:
    """Find the `network_interface` on a batch of training, or on the first parts of one.

    What comes last, such as labels, ``forward`` may not take.

    >>> batch = [torch.ones(1, 2), torch.tensor([0])]
    >>> interface_of_batch(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)), batch).unseen
    ''
    """
    example = tuple(batch) if isinstance(batch, list | tuple) else batch
    interface = network_interface(model, example)
    while interface.unseen and isinstance(example, tuple) and len(example) > 1:
        example = example[:-1]
        interface = network_interface(model, example)
    return interface


def interface_by_order(model: nn.Module) -> Interface:
    """Take the layer that is defined first for the one that reads the input, the last for outputs.

    A frozen first layer that hands on as many features as the first trained one reads stands for
    both (a teacher before its student, a fixed normalisation). So does a frozen last layer. What is
    behind an embedding or a recurrent layer of its width reads no input.

    >>> interface_by_order(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))).inputs
    {}
    """
    layers = [layer for layer in weighted_layers(model) if not is_lazy(_weight(layer))]
    first_of_all = next(weighted_layers(model), None)
    if first_of_all is not None and is_lazy(_weight(first_of_all)):
        layers = []
    if not layers:
        ends = list(weighted_layers(model))
        return Interface(
            {x.name: f"first layer: {INPUT}" for x in ends[:1]},
            {x.name: f"last layer: {OUTPUT}" for x in ends[-1:]},
        )
    trained = [layer for layer in layers if not layer.problem and _is_trained(layer)] or layers
    first, last = layers[0], layers[-1]
    inputs = (
        {} if first.inputs in _looked_up(model, first) else {first.name: f"first layer: {INPUT}"}
    )
    if not _is_trained(first) and trained[0].inputs == first.inputs:
        inputs[trained[0].name] = f"first trained layer: {INPUT}"
    outputs = {last.name: f"last layer: {OUTPUT}"}
    if not _is_trained(last):
        outputs[trained[-1].name] = f"last trained layer: {OUTPUT}"
    unseen = "there is no example_input"
    if any(is_lazy(_weight(layer)) for layer in weighted_layers(model)):
        return Interface(inputs, outputs, unseen=unseen)  # widths tell nothing yet
    known = {_width(module) for module in model.modules()} - {0}
    inside = {x.module for block in attention_blocks(model) for x in block.layers.values()}
    others_in, others_out = {}, {}
    for layer in trained:
        place = layers.index(layer)
        if layer.name not in inputs and not _is_made(layer, layers[:place], known):
            others_in[layer.name] = f"no layer before it makes the {layer.inputs} that it reads"
        read = layer.module in inside or _is_read(layer, layers[place + 1 :])
        if layer.name not in outputs and not read:
            others_out[layer.name] = f"no layer after it reads the {layer.outputs} that it makes"
    return Interface(inputs, outputs, others_in, others_out, unseen)


def _is_made(layer: WeightedLayer, before: list[WeightedLayer], known: set[int]) -> bool:
    """Tell whether layers before it make as many features as this one reads.

    They may be flattened, split, or concatenated with others.
    """
    made, width = {x.outputs for x in before} | known, layer.inputs
    sums = {one + other for one in made for other in made | {x.inputs for x in before}}
    if width in made or width in sums:
        return True
    if before and width == before[0].inputs:  # only a gate or a fused projection explains it
        return bool(made & {2 * width, 3 * width})
    return any(width % x == 0 or x % width == 0 for x in made)


def _is_read(layer: WeightedLayer, after: list[WeightedLayer]) -> bool:
    """Tell whether layers after it read as many features as this one makes."""
    read, width = {x.inputs for x in after}, layer.outputs
    if width in read or (layer.inputs + width) in read:
        return True
    if after and layer.inputs == after[-1].inputs:  # a second head
        return False
    return any(width % x == 0 or x % width == 0 for x in read)


def _weight(layer: WeightedLayer) -> object:
    return getattr(layer.module, "weight", None)


def _is_trained(layer: WeightedLayer) -> bool:
    return layer.weight.requires_grad


def _width(module: nn.Module) -> int:
    """Return the number of features that an embedding or a recurrent layer makes, 0 for others."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return module.embedding_dim
    if isinstance(module, nn.RNNBase):
        return (module.proj_size or module.hidden_size) * (1 + module.bidirectional)
    return module.hidden_size if isinstance(module, nn.RNNCellBase) else 0


def _looked_up(model: nn.Module, first: WeightedLayer) -> set[int]:
    """Return the widths of embeddings and recurrent layers that are defined before a layer."""
    widths = set()
    for module in model.modules():
        if module is first.module:
            break
        widths.add(_width(module))
    return widths - {0}


@dataclass(frozen=True)
class _Origin:
    """Where the features of a tensor come from.

    Attributes:
        raw: are they features of the network's input, which no matrix of weights has mixed?
        mixed: did weights make them?
        weight: is it a matrix of weights, or made of one?
        makers: names of the layers whose filters, or weights, they are.
    """

    raw: bool = False
    mixed: bool = False
    weight: bool = False
    makers: frozenset[str] = frozenset()


_NOWHERE = _Origin()


class InterfaceObserver(TorchFunctionMode):
    """Follows the features of tensors through the functions of torch that a forward pass calls.

    What reads them is seen at the layers, not at the values, so that nothing is computed twice:
    any forward pass may be observed, that of training, too.

    Args:
        model: the network.

    >>> network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> observer, inputs = InterfaceObserver(network), torch.ones(1, 3)
    >>> observer.reads(inputs)
    >>> with observer.watching():
    ...     outputs = network(inputs)
    >>> observer.returns(outputs)
    >>> observer.interface().outputs
    {'2': "last layer: its filters are the network's outputs"}
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.layers = {x.name: x for x in weighted_layers(model) if not is_lazy(_weight(x))}
        self.readers: set[str] = set()
        self.makers: set[str] = set()
        self.to_frozen: dict[str, str] = {}
        self.ran: set[str] = set()
        self._running: list[str] = []
        self._origins: Any = WeakTensorKeyDictionary()
        owners: dict[int, set[str]] = {}
        for name, layer in self.layers.items():
            for parameter in layer.module.parameters():
                owners.setdefault(id(parameter), set()).add(name)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                makers = frozenset(owners.get(id(parameter), ()))
                self._origins[parameter] = _Origin(weight=True, makers=makers)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follow everything that is called within."""
        with ExitStack() as undo:
            for raw, module in self.model.named_modules():
                name = canonical_name(raw)
                is_layer = name in self.layers and self.layers[name].module is module
                before = partial(self._enter, name, is_layer)
                after = partial(self._leave, name, is_layer)
                undo.callback(add_call_hook(module, before).remove)
                undo.callback(add_return_hook(module, after).remove)
            undo.enter_context(self)
            yield

    def reads(self, inputs: Any) -> None:
        """Note these tensors as the network's inputs."""
        for tensor in _all_tensors(inputs):
            self._origins[tensor] = _Origin(raw=True)

    def returns(self, outputs: Any) -> None:
        """Note these tensors as the network's outputs."""
        for tensor in tensors(outputs):
            self.makers |= self._origin(tensor).makers

    def interface(self) -> Interface:
        """Tell which layers read inputs and make outputs, as observed.

        Layers that did not run are in parts of the model that are networks by themselves, such as a
        discriminator or an auxiliary head: the first of each is taken for an input, the last for an
        output.
        """
        names = list(self.layers)
        inputs = {n: _with_order(n, names[:1], "first", INPUT) for n in names if n in self.readers}
        outputs = {n: _with_order(n, names[-1:], "last", OUTPUT) for n in names if n in self.makers}
        for name, reader in self.to_frozen.items():
            outputs.setdefault(name, f"the frozen network '{reader}' reads its filters")
        for part, own in idle_parts(names, self.ran):
            inputs[own[0]] = f"first layer of '{part}', which the example does not run: {INPUT}"
            outputs[own[-1]] = f"last layer of '{part}', which the example does not run: {OUTPUT}"
        return Interface(inputs, outputs)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run a function, and note where the features of its result come from."""
        kwargs = kwargs or {}
        operands = _all_tensors((args, kwargs))
        known = [(x, self._origins[x]) for x in operands if x in self._origins]
        result = func(*args, **kwargs)
        if not known:
            return result
        returned = _all_tensors(result)
        name = getattr(func, "__name__", "")
        if not returned and name != "__setitem__":
            return result
        origin = self._combined(name, known, returned)
        for tensor in returned:
            self._origins[tensor] = origin
        if args and isinstance(args[0], Tensor) and _writes(name):
            base = args[0] if args[0]._base is None else args[0]._base
            for written in (args[0], base):
                self._origins[written] = _joined([self._origin(written), origin])
        return result

    def _combined(
        self, name: str, known: list[tuple[Tensor, _Origin]], returned: list[Tensor]
    ) -> _Origin:
        weights = [x for x, origin in known if origin.weight]
        owners = frozenset().union(*(origin.makers for _, origin in known if origin.weight))
        origins = [origin for _, origin in known if not origin.weight]
        if weights and (_MIXING.search(name) or (_LOOK_UP.search(name) and origins)):
            inputs = [x for x, origin in known if not origin.weight]
            separate = any(_keeps_channels(x, inputs, returned) for x in weights)
            return self._mixed(name, owners, origins, separate=separate)
        if not origins:
            return _Origin(weight=True, makers=owners)
        if not any(origin.mixed for origin in origins) or _JOINING.search(name):
            return _joined(origins)
        if name.strip("_i") in ("mul", "div", "multiply"):
            # Gated features of the input are features of the input; a mask is not.
            size = max((x.numel() for x in returned), default=0)
            whole = [origin.raw and x.numel() == size for x, origin in known if not origin.weight]
            return replace(_joined(origins), raw=any(whole))
        return replace(_joined(origins), raw=False)

    def _mixed(
        self, name: str, owners: frozenset[str], origins: list[_Origin], *, separate: bool
    ) -> _Origin:
        current = self._running[-1:]  # weights may be shared, or computed from others
        if current and (not owners or current[0] in owners):
            owners = frozenset(current)
        self.ran |= owners
        if "attention" not in name and any(origin.raw for origin in origins):
            self.readers |= owners
        before = _joined(origins)
        if separate:
            return replace(before, makers=before.makers | owners)
        return _Origin(mixed=True, makers=owners)

    def _origin(self, tensor: Tensor) -> _Origin:
        found: _Origin = self._origins.get(tensor, _NOWHERE)
        return found

    def _enter(self, name: str, is_layer: bool, module: nn.Module, given: Any, named: Any) -> None:
        if is_layer:
            self._running.append(name)
            self.ran.add(name)
        if name and "." not in name and self._is_frozen_network(name):
            for tensor in _all_tensors((given, named)):
                makers = [x for x in self._origin(tensor).makers if not x.startswith(f"{name}.")]
                self.to_frozen.update(dict.fromkeys(makers, name))

    def _leave(
        self, name: str, is_layer: bool, module: nn.Module, given: Any, named: Any, returned: Any
    ) -> None:
        if is_layer:
            self._running.pop()
        lost = [x for x in _all_tensors(returned) if x not in self._origins]
        origins = [self._origins[x] for x in _all_tensors((given, named)) if x in self._origins]
        if not lost or not origins:
            return
        # Code that is not Python, or is differentiated by hand, calls no function that is seen.
        origin = _joined(origins)
        if any(parameter.dim() > 1 for parameter in module.parameters()):
            inside = [own for own in self.layers if own == name or own.startswith(f"{name}.")]
            origin = _Origin(mixed=True, makers=frozenset(inside[-1:]))
            if any(x.raw for x in origins):
                self.readers.update(inside[:1])
        for tensor in lost:
            self._origins[tensor] = origin

    def _is_frozen_network(self, name: str) -> bool:
        own = [x for path, x in self.layers.items() if path.startswith(f"{name}.")]
        return len(own) > 1 and not any(map(_is_trained, own))


def idle_parts(layers: Sequence[str], ran: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the largest modules of which no layer ran, by name, with their layers.

    >>> list(idle_parts(["net.a", "net.b", "aux.a", "aux.b"], {"net.a"}))
    [('net.b', ['net.b']), ('aux', ['aux.a', 'aux.b'])]
    """
    left = [name for name in layers if name not in ran]
    while left:
        steps, part, inside = left[0].split("."), "", [left[0]]
        for end in range(1, len(steps) + 1):
            part = ".".join(steps[:end])
            inside = [x for x in layers if x == part or x.startswith(f"{part}.")]
            if not any(name in ran for name in inside):
                break
        yield part, inside
        left = [name for name in left if name not in inside]


def _joined(origins: Iterable[_Origin]) -> _Origin:
    origins = [origin for origin in origins if not origin.weight]
    return _Origin(
        raw=any(origin.raw for origin in origins),
        mixed=any(origin.mixed for origin in origins),
        makers=frozenset().union(*(origin.makers for origin in origins)),
    )


def _in_type(kind: torch.dtype, value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(kind) if is_float else value


def _with_order(name: str, at_end: list[str], place: str, reason: str) -> str:
    return f"{place} layer: {reason}" if name in at_end else reason


def _writes(name: str) -> bool:
    """Tell whether a function changes its first operand: add_, but not __add__."""
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name == "__setitem__" or re.fullmatch("__i[a-z]+__", name) is not None


def _keeps_channels(weight: Tensor, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Tell whether every filter of a weight reads one channel, its own.

    So do depthwise convolutions, and the fixed diagonal ones that shift means.
    """
    if weight.dim() < 2 or not inputs or not outputs or inputs[0].dim() < weight.dim() - 1:
        return False
    axis = 1 - weight.dim()
    read, made = inputs[0].shape[axis], outputs[0].shape[axis]
    if weight.dim() > 2 and weight.shape[1] == 1 and read > 1 and made > 1:
        return True
    if weight.shape[0] != weight.shape[1] or weight[0, 0].numel() != 1:
        return False
    if weight.requires_grad or weight.is_meta:
        return False
    matrix = weight.detach().flatten(1)
    return bool((matrix == matrix.diagonal().diag()).all())


def _all_tensors(value: Any) -> list[Tensor]:
    """List all tensors in nested arguments."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [x for part in value.values() for x in _all_tensors(part)]
    if isinstance(value, list | tuple):
        return [x for part in value for x in _all_tensors(part)]
    return []
