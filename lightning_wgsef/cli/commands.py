"""Command line ``lightning-wgsef``: look at pruned networks, make them smaller, export them."""

from __future__ import annotations

import io
import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from json import dumps
from typing import Any

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import PositiveInt, extend_base_type, restricted_string_type
from safetensors import SafetensorError
from torch import nn

from lightning_wgsef.cli.checkpoints import example_input as example_of
from lightning_wgsef.cli.checkpoints import (
    imported,
    load_batches,
    load_groupings,
    load_masks,
    load_model,
)
from lightning_wgsef.export.runtimes import export_onnx, export_program
from lightning_wgsef.export.sparse_storage import to_sparse
from lightning_wgsef.groupings.group_parameters import group_parameters
from lightning_wgsef.groupings.registry import DEFAULT_GROUPING, check_grouping
from lightning_wgsef.network.latency import measure_latency
from lightning_wgsef.reports.networks import network_report
from lightning_wgsef.reports.plots import plot_report
from lightning_wgsef.reports.sensitivity import sensitivity as measure_sensitivity
from lightning_wgsef.reports.sparsity import sparsity_report
from lightning_wgsef.slimming import slim as slimming
from lightning_wgsef.slimming.files import check_slim_path, save_slim
from lightning_wgsef.training.saved_grouping import said_of, saved_grouping
from lightning_wgsef.utils.files import atomic_write, write_json

_NAME = "lightning-wgsef"

# jsonargparse has one name space of types for everybody.
_SHAPE = restricted_string_type("ExampleShape", r"^[1-9]\d*(,[1-9]\d*)*$")

_PICTURE = restricted_string_type("PictureFile", r"^.+\.(png|pdf|svg)$")

_GROUPING = extend_base_type(
    "GroupingName", str, lambda _, value: check_grouping(value), register_key=(_NAME, "grouping")
)

_PARAGRAPH = "\n\n"

_EXPORTS = {"onnx": export_onnx, "pt2": export_program}


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the words after the program's name; None: those of this process.

    Returns:
        The exit code: 0, or 1 with a message on stderr if it failed.

    Raises:
        SystemExit: 0 after ``--help``, 2 for bad usage.

    >>> main(["report", "missing.ckpt", "--model", "torch.nn.Identity"])
    1
    """
    options = _parser().parse_args(arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        text = COMMANDS[options.command](**vars(options[options.command]))
    except (ModuleNotFoundError, OSError, SafetensorError, ValueError) as error:
        # Behind an empty line, torch explains how to debug torch.
        print(f"{_NAME}: error: {str(error).partition(_PARAGRAPH)[0]}", file=sys.stderr)
        return 1
    print(text)
    return 0


@contextmanager
def _step(what: str) -> Iterator[None]:
    """Say what takes its time, on a terminal only; the line is erased when it is done."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{what} ..", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def report(
    checkpoint: str,
    model: str,
    init: dict[str, Any],
    example_input: str | None,
    grouping: str | None,
    json: str | None,
) -> str:
    """Show how sparse a network is, layer by layer, and what is left without its zeros."""
    lines, smaller = [], None
    with _step("reading"):
        network = load_model(checkpoint, model, init)
        example = example_of(network, example_input, required=False)
        saved = [] if grouping is not None else load_groupings(checkpoint)
    lines += [f"pruned with {said_of(one)}" for one in saved]
    if example is not None:
        with _step("making smaller"):
            try:
                smaller = slimming.slim(network, example)
            except ValueError as error:
                lines.append(f"not made smaller: {error}")
    with _step("counting"):
        named = saved_grouping(saved) if saved else grouping or DEFAULT_GROUPING
        groups = group_parameters(network, named, example_input=example)
        found = sparsity_report(network, groups, example, slim=smaller)
    # A checkpoint does not say which budgets its network was trained to.
    found = replace(found, layers=tuple(replace(x, budget=None) for x in found.layers))
    if json is not None:
        write_json(found.as_dict(), json)
    return "\n".join([*lines, str(found)])


def slim(
    checkpoint: str,
    model: str,
    init: dict[str, Any],
    example_input: str | None,
    output: str,
    masks: str | None,
    multiple_of: int,
) -> str:
    """Take zero groups out of a network, with the same outputs, and compare."""
    check_slim_path(output)
    # A path that cannot be written is noticed before the work.
    with atomic_write(output) as temporary:
        with _step("reading"):
            network = load_model(checkpoint, model, init)
            example = example_of(network, example_input)
            zeros = None if masks is None else load_masks(masks)
        with _step("making smaller"):
            smaller = slimming.slim(network, example, zeros, multiple_of=multiple_of)
        with _step("comparing"):
            comparison = _comparison({"checkpoint": network, "slim": smaller}, example)
        with _step("saving"):
            save_slim(smaller, temporary)
    return "\n".join([_summary(smaller), comparison, f"saved: {output}"])


def export(
    checkpoint: str,
    model: str,
    init: dict[str, Any],
    example_input: str | None,
    format: str,
    output: str,
    slim: bool,
) -> str:
    """Write a network for other runtimes, checked to have the same outputs."""
    lines = []
    with atomic_write(output) as temporary:
        with _step("reading"):
            network = load_model(checkpoint, model, init)
            example = example_of(network, example_input)
        if slim:
            with _step("making smaller"):
                network = slimming.slim(network, example)
                lines.append(_summary(network))
        with _step("exporting and checking"):
            if format in _EXPORTS:
                _EXPORTS[format](network, temporary, example)
            else:
                network = to_sparse(network, format, example)
                temporary.write_bytes(_saved(network))
                lines.append(str(network.storage))
    return "\n".join([*lines, f"saved: {output}"])


def latency(
    checkpoint: str,
    model: str,
    init: dict[str, Any],
    example_input: str | None,
    against: str | None,
    batch_sizes: list[int],
    threads: int | None,
) -> str:
    """Time forward passes on the CPU, of one network or of two in turn."""
    with _step("reading"):
        network = load_model(checkpoint, model, init)
        example = example_of(network, example_input)
        other = None if against is None else load_model(against, model, init)
    with _step("measuring"):
        found = measure_latency(
            network, example, against=other, batch_sizes=batch_sizes, threads=threads
        )
    return str(found)


def sensitivity(
    checkpoint: str,
    model: str,
    init: dict[str, Any],
    example_input: str | None,
    data: str,
    data_init: dict[str, Any],
    batches: int,
    loss: str | None,
    k: float | str,
    grouping: str,
    json: str | None,
    plot: str | None,
) -> str:
    """Measure the loss without the weakest groups of every layer, and propose a k for each."""
    with _step("reading"):
        network = load_model(checkpoint, model, init)
        pairs = load_batches(data, data_init, batches)
        of_outputs = None if loss is None else imported("--loss", loss)
        shape = example_input
        example = {} if shape is None else {"example_input": example_of(network, shape)}
    # Paths that cannot be written are noticed before the work.
    with ExitStack() as files:
        written = {path: files.enter_context(atomic_write(path)) for path in (json, plot) if path}
        found = measure_sensitivity(network, pairs, of_outputs, k, grouping=grouping, **example)
        if json is not None:
            written[json].write_text(dumps(found.as_dict(), indent=2) + "\n", encoding="utf-8")
        if plot is not None:
            plot_report(found).savefig(written[plot], format=plot.rpartition(".")[2])
    return str(found)


COMMANDS: dict[str, Callable[..., str]] = {
    "report": report,
    "slim": slim,
    "export": export,
    "latency": latency,
    "sensitivity": sensitivity,
}


def _saved(model: nn.Module) -> bytes:
    """What `torch.save` writes; on a full disk, torch itself would abort the process."""
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    return content.getvalue()


def _comparison(networks: dict[str, nn.Module], example: Any) -> str:
    try:
        return str(network_report(networks, example))
    except ValueError as error:  # it needs another batch size, which making smaller did not
        return f"not compared: {error}"


def _summary(smaller: nn.Module) -> str:
    """What was taken out of a network that `slim` returned, and what was kept and why."""
    record = smaller.slimming
    assert isinstance(record, slimming.Slimming)
    lines = []
    for plan in record.plans:
        lines += [f"taken out: {name}" for name in plan.skipped]
        lines += [f"smaller, {name}: {len(heads)} heads" for name, heads in plan.heads.items()]
        for name, sizes in plan.sizes.items():
            values = (f"{attribute} {value}" for attribute, value in sizes.items())
            lines.append(f"smaller, {name}: {', '.join(values)}")
        lines += [f"with a bias now: {name}" for name in plan.biases]
    return "\n".join([*lines, str(record)])


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Types and defaults are shown, and the examples are not wrapped."""


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=_NAME,
        description="Look at networks pruned with lightning_wgsef, make them smaller, export them.",
        formatter_class=_Formatter,
    )
    commands = parser.add_subcommands(dest="command")

    def command(name: str, *examples: str) -> ArgumentParser:
        shown = "\n".join(f"  {_NAME} {name} {example}" for example in examples)
        what = COMMANDS[name].__doc__ or ""
        own = ArgumentParser(description=what, epilog=f"example:\n{shown}")
        _add_shared(own)
        commands.add_subcommand(name, own, help=what.rstrip("."))
        return own

    own = command("report", "last.ckpt --model my_package.Net --json report.json")
    own.add_argument(
        "--grouping",
        type=_GROUPING,
        help="which are counted; if not given, those that the checkpoint was pruned by, or channel",
    )
    own.add_argument("--json", metavar="FILE", help="write the numbers to this file")

    own = command("slim", "last.ckpt --model my_package.Net --output small.safetensors")
    own.add_argument("--output", required=True, metavar="FILE", help="ends in .safetensors")
    own.add_argument(
        "--masks",
        metavar="FILE",
        help="of torch.save: tensors shaped like parameters, by name; where they are zero, so "
        "becomes the weight",
    )
    own.add_argument(
        "--multiple-of",
        type=PositiveInt,
        default=1,
        help="widths that come out are multiples of this number of channels",
    )

    own = command(
        "export",
        "last.ckpt --model my_package.Net --format onnx --output net.onnx --slim",
        "last.ckpt --model my_package.Net --format bsr --output net.pt",
    )
    own.add_argument(
        "--format",
        required=True,
        choices=[*_EXPORTS, "bsr", "csr"],
        help="ONNX, a program of torch.export, or the state_dict of a copy whose dense layers "
        "store only blocks (bsr) or weights (csr) that are not zero, for load_sparse",
    )
    own.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    own.add_argument("--slim", action="store_true", help="take zero groups out first")

    own = command(
        "latency",
        "small.safetensors --model my_package.Net --init '{\"width\": 8}' --against last.ckpt "
        "--batch-sizes 1 64 --threads 2",
    )
    own.add_argument("--against", metavar="CKPT2", help="a second checkpoint of the class")
    own.add_argument(
        "--batch-sizes", nargs="+", type=PositiveInt, default=[1], help="numbers of samples"
    )
    own.add_argument("--threads", type=PositiveInt, help="threads of torch; as set if not")

    own = command(
        "sensitivity", "last.ckpt --model my_package.Net --data my_package.MyData --k 0.4"
    )
    own.add_argument(
        "--data",
        required=True,
        metavar="CLASS",
        help="a LightningDataModule, whose training batches are taken, or a function that returns "
        "batches, pairs of inputs and labels",
    )
    own.add_argument(
        "--data-init", type=dict[str, Any], default={}, metavar="JSON", help="its arguments"
    )
    own.add_argument("--batches", type=PositiveInt, default=8, help="how many are used, at most 32")
    own.add_argument(
        "--loss", metavar="FUNCTION", help="of outputs and labels; cross entropy if not given"
    )
    own.add_argument(
        "--k",
        type=int | float | str,
        default=0.5,
        help="the size to propose for: a share of the FLOPs, or such as '4 MB'",
    )
    own.add_argument("--grouping", type=_GROUPING, default="structure", help="what is cut")
    own.add_argument("--json", metavar="FILE", help="write the numbers to this file")
    own.add_argument("--plot", type=_PICTURE, metavar="FILE", help="draw them: .png, .pdf or .svg")
    return parser


def _add_shared(parser: ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        metavar="CKPT",
        help="a Lightning checkpoint, a plain state_dict, or a .safetensors file of slim",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="CLASS",
        help="my_package.my_module.MyClass; the current directory can be imported from",
    )
    parser.add_argument(
        "--init",
        type=dict[str, Any],
        default={},
        metavar="JSON",
        help="arguments of the class; they come before the checkpoint's hyper_parameters",
    )
    parser.add_argument(
        "--example-input",
        type=_SHAPE,
        metavar="SHAPE",
        help="of a float tensor, such as 1,3,32,32; the model's example_input_array if not given",
    )
