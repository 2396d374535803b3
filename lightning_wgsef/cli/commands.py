"""The command line ``lightning-wgsef``: look at pruned networks, make them smaller, export them."""

from __future__ import annotations

import io
import json
import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace
from jsonargparse.typing import PositiveInt, extend_base_type, restricted_string_type
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_wgsef.cli.checkpoints import example_input, load_masks, load_model
from lightning_wgsef.export.runtimes import export_onnx, export_program
from lightning_wgsef.export.sparse_storage import to_sparse
from lightning_wgsef.groupings.group_parameters import group_parameters
from lightning_wgsef.groupings.registry import check_grouping
from lightning_wgsef.network.latency import measure_latency
from lightning_wgsef.reports.networks import network_report
from lightning_wgsef.reports.sparsity import SparsityReport, sparsity_report
from lightning_wgsef.slimming.files import check_slim_path, save_slim
from lightning_wgsef.slimming.slim import Slimming, slim
from lightning_wgsef.utils.files import atomic_write

_NAME = "lightning-wgsef"

# jsonargparse has one name space of types for everybody.
_SHAPE = restricted_string_type("ExampleShape", r"^[1-9]\d*(,[1-9]\d*)*$")

_GROUPING = extend_base_type(
    "GroupingName", str, lambda _, value: check_grouping(value), register_key=(_NAME, "grouping")
)

_PARAGRAPH = "\n\n"

_EXPORTS = {"onnx": export_onnx, "pt2": export_program}

Step = Callable[[str], Any]


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
    run, steps = _COMMANDS[options.command]
    try:
        with tqdm(total=steps, disable=None, leave=False) as bar:
            text = run(options[options.command], partial(_step, bar))
    except (OSError, SafetensorError, ValueError) as error:
        # Behind an empty line, torch explains how to debug torch.
        print(f"{_NAME}: error: {str(error).partition(_PARAGRAPH)[0]}", file=sys.stderr)
        return 1
    print(text)
    return 0


@contextmanager
def _step(bar: Any, what: str) -> Iterator[None]:
    """One of the steps that the bar counts; without a terminal nothing is shown."""
    bar.set_description(what)
    yield
    bar.update()


def _report(options: Namespace, step: Step) -> str:
    with step("reading"):
        model = load_model(options.checkpoint, options.model, options.init)
        example = example_input(model, options.example_input, required=False)
    with step("counting"):
        groups = group_parameters(model, options.grouping, example_input=example)
        report = _without_budgets(sparsity_report(model, groups, example))
    if options.json is not None:
        with atomic_write(options.json) as temporary:
            temporary.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    return str(report)


def _slim(options: Namespace, step: Step) -> str:
    check_slim_path(options.output)
    # A path that cannot be written is noticed before the work.
    with atomic_write(options.output) as temporary:
        with step("reading"):
            model = load_model(options.checkpoint, options.model, options.init)
            example = example_input(model, options.example_input)
            masks = None if options.masks is None else load_masks(options.masks)
        with step("making smaller"):
            smaller = slim(model, example, masks)
        with step("comparing"):
            comparison = _comparison({"checkpoint": model, "slim": smaller}, example)
        with step("saving"):
            save_slim(smaller, temporary)
    return "\n".join([_summary(smaller), comparison, f"saved: {options.output}"])


def _export(options: Namespace, step: Step) -> str:
    lines = []
    with atomic_write(options.output) as temporary:
        with step("reading"):
            model = load_model(options.checkpoint, options.model, options.init)
            example = example_input(model, options.example_input)
        with step("making smaller"):
            if options.slim:
                model = slim(model, example)
                lines.append(_summary(model))
        with step("exporting and checking"):
            if options.format in _EXPORTS:
                _EXPORTS[options.format](model, temporary, example)
            else:
                model = to_sparse(model, options.format, example)
                temporary.write_bytes(_saved(model))
                lines.append(str(model.storage))
    return "\n".join([*lines, f"saved: {options.output}"])


def _latency(options: Namespace, step: Step) -> str:
    with step("reading"):
        model = load_model(options.checkpoint, options.model, options.init)
        example = example_input(model, options.example_input)
        against = None
        if options.against is not None:
            against = load_model(options.against, options.model, options.init)
    with step("measuring"):
        report = measure_latency(
            model,
            example,
            against=against,
            batch_sizes=options.batch_sizes,
            threads=options.threads,
        )
    return str(report)


_COMMANDS: dict[str, tuple[Callable[[Namespace, Step], str], int]] = {
    "report": (_report, 2),
    "slim": (_slim, 4),
    "export": (_export, 3),
    "latency": (_latency, 2),
}
"""What runs, and in how many steps."""


def _saved(model: nn.Module) -> bytes:
    """What `torch.save` writes; on a full disk, torch itself would abort the process."""
    content = io.BytesIO()
    torch.save(model.state_dict(), content)
    return content.getvalue()


def _without_budgets(report: SparsityReport) -> SparsityReport:
    """A checkpoint does not say which budgets its network was trained to."""
    return replace(report, layers=tuple(replace(x, budget=None) for x in report.layers))


def _comparison(networks: dict[str, nn.Module], example: Any) -> str:
    try:
        return str(network_report(networks, example))
    except ValueError as error:  # it needs another batch size, which making smaller did not
        return f"not compared: {error}"


def _summary(smaller: nn.Module) -> str:
    """What was taken out of a network that `slim` returned, and what was kept and why."""
    record = smaller.slimming
    assert isinstance(record, Slimming)
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

    def command(name: str, what: str, examples: Sequence[str]) -> ArgumentParser:
        shown = "\n".join(f"  {_NAME} {name} {example}" for example in examples)
        own = ArgumentParser(description=f"{what}.", epilog=f"example:\n{shown}")
        _add_shared(own)
        commands.add_subcommand(name, own, help=what)
        return own

    report = command(
        "report",
        "Show how sparse a network is, layer by layer",
        ["last.ckpt --model my_package.Net --grouping channel --json report.json"],
    )
    report.add_argument(
        "--grouping", type=_GROUPING, default="channel", help="which groups are counted"
    )
    report.add_argument("--json", metavar="FILE", help="write the numbers to this file")

    smaller = command(
        "slim",
        "Take zero groups out of a network, with the same outputs, and compare",
        ["last.ckpt --model my_package.Net --output small.safetensors"],
    )
    smaller.add_argument("--output", required=True, metavar="FILE", help="ends in .safetensors")
    smaller.add_argument(
        "--masks",
        metavar="FILE",
        help="of torch.save: tensors shaped like parameters, by name; where they are zero, so "
        "becomes the weight",
    )

    export = command(
        "export",
        "Write a network for other runtimes, checked to have the same outputs",
        [
            "last.ckpt --model my_package.Net --format onnx --output net.onnx --slim",
            "last.ckpt --model my_package.Net --format bsr --output net.pt",
        ],
    )
    export.add_argument(
        "--format",
        required=True,
        choices=[*_EXPORTS, "bsr", "csr"],
        help="ONNX, a program of torch.export, or the state_dict of a copy whose dense layers "
        "store only blocks (bsr) or weights (csr) that are not zero, for load_sparse",
    )
    export.add_argument("--output", required=True, metavar="FILE", help="the file to write")
    export.add_argument("--slim", action="store_true", help="take zero groups out first")

    latency = command(
        "latency",
        "Time forward passes on the CPU, of one network or of two in turn",
        [
            "small.safetensors --model my_package.Net --init '{\"width\": 8}' --against last.ckpt "
            "--batch-sizes 1 64 --threads 2"
        ],
    )
    latency.add_argument("--against", metavar="CKPT2", help="a second checkpoint of the class")
    latency.add_argument(
        "--batch-sizes", nargs="+", type=PositiveInt, default=[1], help="numbers of samples"
    )
    latency.add_argument("--threads", type=PositiveInt, help="threads of torch; as set if not")
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
