"""The callback from a configuration file: what LightningCLI makes of its arguments, and back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from lightning_wgsef import (
    Constant,
    CubicRamp,
    GroupLasso,
    HalfSpace,
    Homotopy,
    Warmup,
    WGSEFCallback,
)
from lightning_wgsef.groupings.budget import Budget
from lightning_wgsef.groupings.registry import Grouping, Maker
from tests.helpers.trainers import NAMESPACES, namespace
from tests.scripts.lightning_cli import alive_columns, module_class

# Lightning calls the parser of its command line in a way that is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _no_words_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning warns where there are both arguments in Python and words of a command line."""
    monkeypatch.setattr("sys.argv", ["script.py"])


SCRIPT = Path(__file__).parents[1] / "scripts" / "lightning_cli.py"
CONFIG = """
seed_everything: 0
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""
ARGUMENTS = {
    "k: 3": 3,
    "k: 1": 1,
    "k: 1.0": 1.0,
    "k: 0.25": 0.25,
    "k: 120 MFLOPs": "120 MFLOPs",
    "k: {net.2: 3, net.*: 0.5}": {"net.2": 3, "net.*": 0.5},
    "k: {net.*: 1, net.4: 1.0}": {"net.*": 1, "net.4": 1.0},
    "k: {class_path: lightning_wgsef.CubicRamp, init_args: {k: 3, length: 0.4}}": CubicRamp(3, 0.4),
    "k: {class_path: lightning_wgsef.CubicRamp, init_args: {k: 1.0, length: 1}}": CubicRamp(1.0, 1),
    "k: {class_path: lightning_wgsef.CubicRamp, init_args: {k: {net.*: 2}, length: 9}}": CubicRamp(
        {"net.*": 2}, 9
    ),
    "lam: 0.01": 0.01,
    "lam: null": None,
    "lam: lightning_wgsef.Homotopy": Homotopy(),
    "lam: {class_path: lightning_wgsef.Homotopy, init_args: {start: 0.1, length: 1}}": Homotopy(
        0.1, 1
    ),
    "lam: {class_path: lightning_wgsef.Homotopy, init_args: {length: 1.0}}": Homotopy(length=1.0),
    "lam: {class_path: lightning_wgsef.Constant, init_args: {lam: 0.5}}": Constant(0.5),
    "lam: {class_path: lightning_wgsef.Warmup, init_args: {lam: 0.5, length: 5}}": Warmup(0.5, 5),
    "grouping: filter": "filter",
    "grouping: '2:4'": "2:4",
    "grouping: block:2x2": "block:2x2",
    "grouping: {net.0: filter, net.*: channel}": {"net.0": "filter", "net.*": "channel"},
    "freeze: converged": "converged",
    "freeze: 1": 1,
    "freeze: 1.0": 1.0,
    "freeze: null": None,
    "include: net.2": "net.2",
    "include: [net.2, net.4]": ["net.2", "net.4"],
    "exclude: net.2": "net.2",
    "exclude: [net.2]": ["net.2"],
    "weights: sqrt_size": "sqrt_size",
    "costs: params": "params",
    "masks: from_zeros": "from_zeros",
    "half_space: 0.1, freeze: 0.8": 0.1,
    "half_space: {class_path: lightning_wgsef.HalfSpace, init_args: {start: 5}}": HalfSpace(0.0, 5),
    "half_space: {epsilon: 0.1, start: 0.3}": HalfSpace(0.1, 0.3),
}


def configured(folder: Path, callbacks: str) -> list[str]:
    """A configuration file, and the words that name it."""
    path = folder / "config.yaml"
    path.write_text(f"{CONFIG}  callbacks: {callbacks}\n")
    return ["--config", str(path)]


def one(init_args: str) -> str:
    return f"{{class_path: lightning_wgsef.WGSEFCallback, init_args: {{{init_args}}}}}"


def command(name: str, words: list[str], **arguments: Any) -> Any:
    cli = namespace(f"{name}.cli").LightningCLI
    return cli(module_class(name), args=words, save_config_callback=None, **arguments)


def callback_of(cli: Any) -> WGSEFCallback:
    (callback,) = (c for c in cli.trainer.callbacks if isinstance(c, WGSEFCallback))
    return callback


def described(value: object) -> str:
    """A count and a share, and the order of patterns, differ; `==` alone would not see it."""
    return repr(value)


@pytest.mark.parametrize("text", ARGUMENTS)
def test_arguments_keep_their_types_there_and_back(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = configured(tmp_path, f"[{one(text)}]")
    argument, expected = text.partition(":")[0], ARGUMENTS[text]
    first = callback_of(command("pytorch_lightning", words, run=False))
    assert described(first.arguments[argument]) == described(expected)
    with pytest.raises(SystemExit) as exited:
        command("pytorch_lightning", [*words, "--print_config"], run=False)
    assert exited.value.code == 0
    shown = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(shown)
    again = callback_of(
        command("lightning.pytorch", ["--config", str(tmp_path / "again.yaml")], run=False)
    )
    assert described(again.arguments) == described(first.arguments)


def parsed(annotation: Any, value: Any) -> Any:
    """What a parser makes of a value, after it has written and read it once."""

    class Holder:
        def __init__(self, value: Any) -> None:
            self.value = value

    Holder.__init__.__annotations__["value"] = annotation
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "held")
    config = parser.parse_object({"held": {"value": value}})
    return parser.instantiate_classes(parser.parse_string(parser.dump(config))).held.value


def test_planted_fault_in_the_order_of_types() -> None:
    """In another order the parser takes a ramp for patterns, patterns for arguments of Groups."""
    ramp = {"class_path": "lightning_wgsef.CubicRamp", "init_args": {"k": 3, "length": 0.4}}
    assert described(parsed(CubicRamp | Budget, ramp)) == described(CubicRamp(3, 0.4))
    assert described(parsed(Budget | CubicRamp, ramp)) != described(CubicRamp(3, 0.4))
    patterns = {"net.0": "filter", "net.*": "channel"}
    assert described(parsed(Grouping, patterns)) == described(patterns)
    before = str | Maker | Mapping[str, str | Maker]
    assert described(parsed(before, patterns)) != described(patterns)
    assert described(parsed(float | int, 3)) != described(3)


@pytest.mark.parametrize("name", NAMESPACES)
@pytest.mark.parametrize("shape", ["{}", "[{}]"], ids=["single", "list"])
def test_fit_from_a_file(name: str, shape: str, tmp_path: Path) -> None:
    words = configured(tmp_path, shape.format(one("k: {net.2: 3, net.*: 0.25}")))
    cli = command(name, ["fit", *words])
    assert alive_columns(cli.model.net) == {"net.2": 3, "net.4": 2}
    assert callback_of(cli).regularizer.pruners[0].taken == 10  # half of training


@pytest.mark.filterwarnings("ignore:lam = .* had not reached the budget")
def test_penalty_with_a_number_as_lam(tmp_path: Path) -> None:
    text = "penalty: lightning_wgsef.GroupLasso, lam: 1, freeze: 5, include: net.4, k: 1"
    cli = command("pytorch_lightning", ["fit", *configured(tmp_path, one(text))])
    arguments = callback_of(cli).arguments
    assert (arguments["penalty"], arguments["lam"]) == (GroupLasso(), 1.0)
    assert alive_columns(cli.model.net) == {"net.2": 8, "net.4": 1}


@pytest.mark.parametrize("name", NAMESPACES)
def test_words_of_a_command_line(name: str, tmp_path: Path) -> None:
    added = ["--trainer.callbacks+=lightning_wgsef.WGSEFCallback", "--trainer.callbacks.k=3"]
    words = [*configured(tmp_path, "[]"), *added]
    homotopy = "--trainer.callbacks.lam=lightning_wgsef.Homotopy"
    more = [homotopy, "--trainer.callbacks.lam.length=4", "--trainer.callbacks.exclude=net.4"]
    cli = command(name, ["fit", *words, *more])
    assert described(callback_of(cli).arguments["k"]) == "3"
    assert callback_of(cli).arguments["lam"] == Homotopy(length=4)
    assert callback_of(cli).regularizer.pruners[0].taken == 4
    assert alive_columns(cli.model.net) == {"net.2": 3, "net.4": 8}
    named = command(name, [*words, "--trainer.callbacks.grouping=2:4"], run=False)
    assert callback_of(named).arguments["grouping"] == "2:4"


def run_script(*words: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        cwd=folder,
        env={"PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_script_and_the_configuration_that_it_saves(tmp_path: Path) -> None:
    """The saved file trains once more as the given one did."""
    ramp = "k: {class_path: lightning_wgsef.CubicRamp, init_args: {k: 3, length: 5}}"
    words = configured(tmp_path, one(f"{ramp}, lam: {{class_path: lightning_wgsef.Homotopy}}"))
    words.append("--trainer.logger=pytorch_lightning.loggers.CSVLogger")
    done = run_script(
        "pytorch_lightning", "fit", *words, f"--trainer.logger.save_dir={tmp_path}", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout.splitlines()[-1])
    assert first == {"alive": {"net.2": 3, "net.4": 3}, "taken": 10, "frozen": True}
    assert "lightning_wgsef" not in done.stderr  # no warning of ours
    (saved,) = tmp_path.glob("lightning_logs/*/config.yaml")
    cli = command("pytorch_lightning", ["fit", "--config", str(saved), "--trainer.logger=false"])
    assert callback_of(cli).arguments["k"] == CubicRamp(3, 5)
    assert alive_columns(cli.model.net) == first["alive"]


def test_help_lists_every_argument_with_its_description(tmp_path: Path) -> None:
    """In a process of its own: what other tests import adds kinds of tensors to the list."""
    words = ["fit", "--trainer.callbacks.help", "lightning_wgsef.WGSEFCallback"]
    done = run_script("pytorch_lightning", *words, folder=tmp_path)
    assert done.returncode == 0
    assert "lightning_wgsef/" not in done.stderr  # no warning of ours
    shown = done.stdout
    sections = shown.split("\n  --trainer.callbacks.")[1:]
    texts = {text.split()[0]: " ".join(text.split()) for text in sections}
    arguments = [*WGSEFCallback().arguments, "slim_to", "update_bn", "dashboard", "name"]
    assert {name for name in texts if not name.endswith(".help")} == set(arguments)
    described_in = WGSEFCallback.__doc__.partition("Args:")[2]
    for name in arguments:
        start = described_in.partition(f"    {name}: ")[2].split()[:3]
        assert " ".join(start) in texts[name].replace(f"{name} {name.upper()} ", ""), name
        assert "default:" in texts[name], name
        assert len(texts[name]) < 700, name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("k: {net.2: many}", ["WGSEFCallback", '"k"', "many"]),
        ("scope: all", ['"scope"', "'layer', 'global'", "all"]),
        ("metric: adam", ['"metric"', "'identity'", "adam"]),
        ("weights: large", ['"weights"', "'sqrt_size'", "large"]),
        ("costs: time", ['"costs"', "'latency'", "time"]),
        ("freeze: never", ['"freeze"', "'converged'", "never"]),
        ("kay: 3", ["WGSEFCallback", "'kay' is not accepted"]),
        ("lam: {class_path: lightning_wgsef.Homotopi}", ['"lam"', "no attribute 'Homotopi'"]),
        (
            "lam: {class_path: lightning_wgsef.Homotopy, init_args: {begin: 1}}",
            ["'begin' is not accepted"],
        ),
        ("grouping: 2:4", ['"grouping"', "124"]),  # YAML's minutes and seconds: it needs quotes
    ],
)
def test_mistakes_that_the_parser_finds(
    text: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Usage and one paragraph, no stack trace."""
    with pytest.raises(SystemExit) as exited:
        command("pytorch_lightning", ["fit", *configured(tmp_path, one(text))])
    assert exited.value.code == 2
    message = capsys.readouterr().err.partition("error: ")[2]
    assert [word for word in words if word not in message] == []
    assert "Traceback" not in message
    assert message.strip().count("\n\n") <= 1


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lam: -1", "lam must be a finite number, at least 0, got -1.0"),
        (
            "k: many",
            "k must be a number of groups (int >= 1) or a share (float in (0, 1]), or a size",
        ),
        ("k: 1.5", "k must be a number of groups (int >= 1) or a share (float in (0, 1]), got 1.5"),
        ("grouping: chanel", "got 'chanel'"),
        ("grouping: {net.2: chanel}", "got 'chanel'"),
        ("freeze: 1.5", "freeze must be a number of steps (int >= 1) or a share"),
        ("half_space: 2", "half_space must be None, an epsilon in [0, 1) or HalfSpace(...), got 2"),
    ],
)
def test_mistakes_that_the_callback_finds(text: str, says: str, tmp_path: Path) -> None:
    """The parser puts the callback's own line into its message."""
    with pytest.raises(ValueError, match="Union subtypes") as caught:
        command("pytorch_lightning", ["fit", *configured(tmp_path, one(text))])
    (line,) = (line for line in str(caught.value).splitlines() if says in line)
    assert line.startswith("  - ")
    assert callback_of(command("pytorch_lightning", configured(tmp_path, one("k: 2")), run=False))
