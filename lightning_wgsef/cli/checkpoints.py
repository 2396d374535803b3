"""Models from checkpoints, for the command line: numbers are read, nothing stored is executed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_wgsef.network.layers import canonical_name
from lightning_wgsef.slimming.files import load_slim
from lightning_wgsef.training.saved_grouping import saved_groupings
from lightning_wgsef.utils.files import read_checkpoint

# How many names a message lists.
_SHOWN = 3


def load_model(path: str, make: str, init: Mapping[str, Any]) -> nn.Module:
    """The model of a checkpoint, on the CPU, in evaluation mode.

    Args:
        path: a Lightning checkpoint, a plain ``state_dict``, or a file of `save_slim`, which ends
            in .safetensors.
        make: dotted name of what makes the model, such as its class.
        init: its arguments; they come before the ``hyper_parameters`` of a Lightning checkpoint.

    Raises:
        ValueError: a file or a name that cannot be read, or that are of different models.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(nn.Linear(4, 2).state_dict(), f"{folder}/weights.pt")
    ...     sizes = {"in_features": 4, "out_features": 2}
    ...     print(load_model(f"{folder}/weights.pt", "torch.nn.Linear", sizes))
    Linear(in_features=4, out_features=2, bias=True)
    """
    maker = imported("--model", make)
    if Path(path).suffix == ".safetensors":
        return load_slim(path, partial(_made, maker, make, init))
    content = read_checkpoint(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"{path} holds no state_dict: take a Lightning checkpoint, or a file of "
            "torch.save(model.state_dict(), ..)"
        )
    model = _made(maker, make, {**_hyper_parameters(maker, content), **init})
    _fill(model, state, f"{path} is not of {make} with these arguments (--init sets them)")
    return model.eval()


def load_groupings(path: str) -> list[Mapping[str, Any]]:
    """Return what a checkpoint says of how it was pruned, of every callback; [] if it does not."""
    if Path(path).suffix == ".safetensors":
        return []
    return list(saved_groupings(read_checkpoint(path)))


def load_masks(path: str) -> dict[str, Tensor]:
    """Tensors by name, from a file of `torch.save`.

    Raises:
        ValueError: a file of something else.
    """
    content = read_checkpoint(path)
    if not isinstance(content, dict) or not all(
        isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta
        for x in content.values()
    ):
        raise ValueError(f"masks: {path} must hold a dict of dense tensors by name of parameter")
    return content


def example_input(model: nn.Module, shape: str | None, *, required: bool = True) -> Any:
    """Random numbers of a shape such as "1,3,32,32", or the model's own ``example_input_array``.

    Raises:
        ValueError: there is neither, and it is required.

    >>> example_input(nn.Linear(4, 2), "1,4").shape
    torch.Size([1, 4])
    """
    if shape is not None:
        types = (p.dtype for p in model.parameters() if p.is_floating_point())
        sizes = [int(size) for size in shape.split(",")]
        numbers = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
        return numbers.to(next(types, torch.float32))
    own = getattr(model, "example_input_array", None)
    if own is None and required:
        raise ValueError(
            f"{type(model).__name__} has no example_input_array: give the shape of an input, such "
            "as --example-input 1,3,32,32"
        )
    return own


def load_batches(make: str, init: Mapping[str, Any], number: int) -> list[Any]:
    """The first training batches of what a dotted name makes.

    Args:
        make: dotted name of a LightningDataModule, of another class with a ``train_dataloader``, or
            of a function that returns batches.
        init: its arguments.
        number: how many batches.

    Raises:
        ValueError: what cannot be imported or made, or makes no batches.
    """
    maker = imported("--data", make)
    try:
        data = maker(**init)
        if hasattr(data, "train_dataloader"):
            for prepare, arguments in (("prepare_data", ()), ("setup", ("fit",))):
                getattr(data, prepare, lambda *_: None)(*arguments)
            data = data.train_dataloader()
        return list(islice(data, number))
    except Exception as error:  # making data runs the user's code
        raise ValueError(
            f"--data: {make} must make a LightningDataModule or batches, with the arguments "
            f"--data-init {dict(init)}: {type(error).__name__}: {error}"
        ) from error


def imported(option: str, name: str) -> Callable[..., Any]:
    """What a dotted name stands for, which can be called.

    Raises:
        ValueError: names the option and what went wrong.
    """
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # importing runs the user's code
        raise ValueError(
            f"{option} must be a class that can be imported, such as my_package.my_module.MyClass, "
            f"got {name}: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ValueError(f"{option} must be a class, {name} is a {type(found).__name__}")
    return found  # type: ignore[no-any-return]  # mypy forgets what callable() says of Any


def _made(maker: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        model = maker(**arguments)
        if hasattr(model, "configure_model"):  # where Lightning lets a module make its layers
            model.configure_model()
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise ValueError(
            f"{name}({given}) fails: {type(error).__name__}: {error}; arguments that the "
            "checkpoint does not have are given as --init '{\"width\": 8}'"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model must make a torch.nn.Module, {name} makes {type(model)}")
    return model


def _hyper_parameters(maker: Callable[..., Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a Lightning checkpoint that ``maker`` takes, as Lightning itself passes them on."""
    saved = content.get("hyper_parameters", {})
    if not isinstance(saved, dict):
        raise ValueError(f"hyper_parameters must be a dict, the checkpoint's are {saved!r}")
    parameters = inspect.signature(maker).parameters.values()
    named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if (name := str(content.get("hparams_name"))) in named:
        return {name: saved}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    # LightningCLI adds private entries of its own.
    return {
        name: value
        for name, value in saved.items()
        if name in named or (takes_any and not name.startswith("_"))
    }


def _fill(model: nn.Module, state: Mapping[str, Any], foreign: str) -> None:
    """Load a state_dict, whatever compiled modules it or the model was in."""
    own = {canonical_name(name): name for name in model.state_dict()}
    state = {own.get(canonical_name(name), name): value for name, value in state.items()}
    missing = [name for name in own.values() if name not in state]
    unexpected = [name for name in state if name not in own.values()]
    if missing or unexpected:
        raise ValueError(
            f"{foreign}: missing {_listed(missing)}; not in the model {_listed(unexpected)}"
        )
    try:
        model.load_state_dict(state)
    except Exception as error:
        _, *reasons = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"{foreign}: {' '.join(reasons[:_SHOWN]) or error}") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "nothing") + more
