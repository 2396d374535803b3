"""Networks as files for other runtimes, checked before they get their name."""

from __future__ import annotations

import importlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.network.equivalence import TOLERANCE, relative_difference
from lightning_wgsef.network.example_input import (
    mapped,
    model_copy,
    run_example,
    tensors,
    with_batch_size,
)
from lightning_wgsef.utils.files import atomic_write
from lightning_wgsef.utils.validation import check_model, check_number

# Without it, on x86 that has no VNNI, onnxruntime adds products of int8 in 16 bits: they overflow.
_EXACT_INT8 = {"session.x64quantprecision": "1"}
# Batch sizes: that of the trace (1 would be taken for a constant), and another to check with.
_TRACED, _OTHER = 2, 3


def export_onnx(
    model: nn.Module, path: str | os.PathLike[str], example_input: Any, *, tolerance: float = 1e-4
) -> None:
    """Write a model as one ONNX file with a batch axis of any length.

    The file is run by onnxruntime on the example and on random numbers of another batch size, in
    evaluation mode. It gets its name only when the outputs are those of the model. Where they are
    only if the runtime is told to add products of int8 exactly, a warning says so.

    Args:
        model: any module but one of `to_sparse`, whose layers torch cannot export; a copy of it is
            exported, on the CPU.
        path: the file.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them. The
            first axis of the first tensor is the batch, and of every tensor that is as long there.
        tolerance: largest difference of an output, as a share of the largest of its tensor.

    Raises:
        ValueError: a path that cannot be written, a missing package, a model that cannot be
            exported or run, or outputs that differ.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(nn.Linear(3, 2), f"{folder}/model.onnx", torch.ones(1, 3))
    ...     print(os.listdir(folder))
    ['model.onnx']
    """
    check_number("tolerance", tolerance)
    with atomic_write(path) as temporary:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _imported(package)

        def write(network: nn.Module, args: Any, named: dict[str, Any], shapes: Any) -> None:
            with warnings.catch_warnings():
                # Said of every second argument with a batch axis, which is what is wanted.
                warnings.filterwarnings("ignore", message=".*axis name: batch will not be used")
                torch.onnx.export(
                    network,
                    args,
                    temporary,
                    kwargs=named,
                    dynamo=True,
                    dynamic_shapes=shapes,
                    external_data=False,
                    verbose=False,
                )

        loads = [partial(_onnx_outputs, temporary, x) for x in ({}, _EXACT_INT8)]
        failed = _export(model, example_input, write, loads, tolerance)
    if failed:
        ((name, value),) = _EXACT_INT8.items()
        warnings.warn(
            f"{os.fspath(path)} gives what {type(model).__name__} does where products of int8 are "
            f"added without overflow. On this processor onnxruntime does so only by its session "
            f"option {name!r}: {value!r}, and differs by {failed[0]:.3g} of the largest "
            f"output without it: options = onnxruntime.SessionOptions(); "
            f"options.add_session_config_entry({name!r}, {value!r})",
            stacklevel=2,
        )


def export_program(model: nn.Module, path: str | os.PathLike[str], example_input: Any) -> None:
    """Write a model as a `torch.export` program with a batch axis of any length.

    As `export_onnx`; the file is for `torch.export.load`, and checked with it.

    Raises:
        ValueError: a path that cannot be written, a model that cannot be exported or run, or
            outputs that differ.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_program(nn.Linear(3, 2), f"{folder}/model.pt2", torch.ones(1, 3))
    ...     torch.export.load(f"{folder}/model.pt2").module()(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """
    with atomic_write(path) as temporary:

        def write(network: nn.Module, args: Any, named: dict[str, Any], shapes: Any) -> None:
            program = torch.export.export(network, args, named, dynamic_shapes=shapes)
            # In memory: torch needs a name in .pt2 otherwise, and aborts when the disk is full.
            buffer = io.BytesIO()
            torch.export.save(program, buffer)
            temporary.write_bytes(buffer.getvalue())

        def load() -> Callable[[Any], list[Tensor]]:
            with temporary.open("rb") as file:
                network = torch.export.load(file).module()
            return lambda inputs: tensors(run_example(network, inputs))

        _export(model, example_input, write, [load], TOLERANCE)


def _export(
    model: nn.Module,
    example_input: Any,
    write: Callable[[nn.Module, Any, dict[str, Any], Any], None],
    loads: Sequence[Callable[[], Callable[[Any], list[Tensor]]]],
    tolerance: float,
) -> list[float]:
    """Write a copy of the model, and load it in one way after another until the outputs agree.

    Returns:
        what outputs differ by with the ways that came before.
    """
    check_model("model", model)
    network = model_copy(model).cpu().eval()
    example = mapped(lambda x: x.cpu() if isinstance(x, Tensor) else x, example_input)
    traced = with_batch_size(example, _TRACED)
    other = mapped(_Drawn(), with_batch_size(example, _OTHER))
    with torch.no_grad():
        # Before the export, which fails in harder words on a wrong example.
        expected = [tensors(run_example(network, inputs)) for inputs in (example, other)]
        named = traced if isinstance(traced, dict) else {}
        args = () if isinstance(traced, dict) else traced
        try:
            write(network, args, named, _batch_axes(example, traced))
            tried: list[float] = []
            for load in loads:
                run = load()
                found = [run(inputs) for inputs in (example, other)]
                differences = list(map(relative_difference, found, expected))
                if max(differences) <= tolerance:
                    return tried
                tried.append(max(differences))
        except Exception as error:
            raise ValueError(
                f"{type(model).__name__} cannot be exported; its forward must take batches of any "
                f"length and not branch on values: {type(error).__name__}: {error}"
            ) from error
    what = "random inputs" if differences[0] <= tolerance else "the example"
    raise ValueError(
        f"the exported {type(model).__name__} differs on {what} by {max(differences):.3g} of the "
        f"largest output, tolerance is {tolerance:g}; does its forward branch on values or draw "
        "random numbers?"
    )


def _batch_axes(example: Any, traced: Any) -> Any:
    """For every argument, which of its axes is the batch."""
    batch = torch.export.Dim("batch")
    first = next(x for x in _values(example) if isinstance(x, Tensor))

    def axes(value: Any) -> Any:
        has_batch = isinstance(value, Tensor) and value.dim() and len(value) == len(first)
        return {0: batch} if has_batch else None

    return mapped(axes, example)


def _values(inputs: Any) -> list[Any]:
    return list(inputs.values() if isinstance(inputs, dict) else inputs)


class _Drawn:
    """Random numbers in place of a tensor: integers between the lowest and highest, no others."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.numel() or value.dtype == torch.bool:
            return value
        if value.is_floating_point() or value.is_complex():
            return torch.empty_like(value).normal_(generator=self.generator)
        low, high = int(value.min()), int(value.max())
        return torch.randint(
            low, high + 1, value.shape, generator=self.generator, dtype=value.dtype
        )


def _onnx_outputs(path: Path, settings: dict[str, str]) -> Callable[[Any], list[Tensor]]:
    """Load a file into onnxruntime with settings of the session."""
    runtime = _imported("onnxruntime")
    options = runtime.SessionOptions()
    for name, value in settings.items():
        options.add_session_config_entry(name, value)
    session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        if isinstance(inputs, dict):
            feed = {name: inputs[name].detach().numpy() for name in names}
        else:
            arrays = [x.detach().numpy() for x in inputs if isinstance(x, Tensor)]
            feed = dict(zip(names, arrays, strict=True))
        return [torch.from_numpy(array) for array in session.run(None, feed)]

    return run


def _imported(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"export_onnx needs {package}: pip install 'lightning-wgsef[onnx]'"
        ) from error
