"""The command line: what it prints and writes, and that bad input leaves no file behind."""

import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_wgsef import WGSEFCallback, sensitivity
from lightning_wgsef.cli import commands as cli
from lightning_wgsef.cli.commands import main
from lightning_wgsef.export.sparse_storage import SparseLinear, load_sparse
from lightning_wgsef.network import surgery as removal_plan
from lightning_wgsef.slimming import slim as slimming
from lightning_wgsef.slimming.files import load_slim, save_slim
from lightning_wgsef.slimming.slim import slim
from tests.helpers.networks import cli as cli_networks
from tests.helpers.networks.cli import (
    BAD,
    DENSE,
    IMAGES,
    Dense,
    Images,
    Labelled,
    OneSample,
    exported,
    sensitive,
    slimmed,
    write_bad_files,
)
from tests.helpers.trainers import make_trainer

NETWORKS = cli_networks.__name__


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder with a checkpoint of training, a plain state_dict, and slim copies of both."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    images = Images(width=6, rate=0.05)
    callback = WGSEFCallback(k={"conv2": 2, "hidden": 8}, lam=1e-2)
    trainer = make_trainer([callback])
    trainer.fit(images, DataLoader(torch.randn(80, 1, 6, 6), batch_size=8))
    trainer.save_checkpoint(folder / "last.ckpt")
    save_slim(slim(images, images.example_input_array), folder / "last.safetensors")
    torch.save(dense().state_dict(), folder / "dense.pt")
    return folder


@pytest.fixture
def folder(files, tmp_path, monkeypatch):
    """A copy of it, as the current directory."""
    for path in files.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def dense():
    """Units 16 to 31 of its first layer are read by nobody."""
    torch.manual_seed(1)
    network = Dense()
    network.b.weight.data[:, 16:] = 0
    return network.eval()


def trained(folder):
    model = Images(width=6)
    model.load_state_dict(torch.load(folder / "last.ckpt", weights_only=True)["state_dict"])
    return model.eval()


def given(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def close(found, expected):
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run(capsys, *arguments):
    """What a command that succeeds prints."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == 0
    return capsys.readouterr().out


# --- report ------------------------------------------------------------------------------------


def test_report_of_a_checkpoint(folder, capsys):
    text = run(capsys, "report", "last.ckpt", *IMAGES, "--json", "report.json")
    report = json.loads((folder / "report.json").read_text())
    rows = {row["name"]: row for row in report["layers"]}
    alive = {name: (row["groups_alive"], row["groups"]) for name, row in rows.items()}
    assert alive == {"conv1": (0, 0), "conv2": (2, 6), "hidden": (8, 32), "head": (0, 0)}
    weights = trained(folder).named_parameters()
    nonzero = {name: int(torch.count_nonzero(value)) for name, value in weights}
    assert report["parameters_alive"] == sum(nonzero.values()) < report["parameters"]
    assert rows["conv2"]["parameters_alive"] == nonzero["conv2.weight"] + nonzero["conv2.bias"]
    # 2 x 2 positions, 9 places of the kernel, a multiplication and an addition.
    assert rows["conv2"]["flops_alive"] == 4 * 9 * 2 * (2 * 32)
    small = slim(trained(folder), Images(width=6).example_input_array)
    assert report["parameters_slim"] == sum(p.numel() for p in small.parameters())
    assert report["parameters_slim"] < report["parameters_alive"]
    assert text.startswith("pruned with grouping='channel', k={'conv2': 2, 'hidden': 8}\n")
    assert all(row["budget"] is None for row in rows.values())
    assert re.search(r"^hidden +8 / 32 +- ", text, re.MULTILINE)


@pytest.mark.parametrize("grouping", ["structure", "filter", "element"])
def test_report_counts_what_the_checkpoint_was_pruned_by(grouping, folder, capsys):
    torch.manual_seed(0)
    images = Images(width=6, rate=0.05)
    callback = WGSEFCallback(k=0.5, grouping=grouping)
    trainer = make_trainer([callback])
    trainer.fit(images, DataLoader(torch.randn(80, 1, 6, 6), batch_size=8))
    trainer.save_checkpoint("own.ckpt")
    text = run(capsys, "report", "own.ckpt", *IMAGES)
    assert f"grouping='{grouping}', k=0.5" in text
    masks = callback.regularizer.masks
    assert len(masks) >= 3
    for name, mask in masks.items():
        assert re.search(rf"^{name} +{mask.sum()} / {len(mask)} ", text, re.MULTILINE)
    assert "not made smaller" not in text
    assert re.search("^after slim +[0-9,]+ / ", text, re.MULTILINE)


def test_report_counts_the_groups_of_a_grouping(folder, capsys):
    text = run(
        capsys,
        "report",
        "dense.pt",
        "--model",
        f"{NETWORKS}.Dense",
        "--grouping=element",
    )
    assert re.search(r"^b +512 / 1024 +- +544 / 1,056 +-$", text, re.MULTILINE)
    text = run(capsys, "report", "dense.pt", *DENSE, "--grouping", "block:16x16")
    assert re.search(r"^b +2 / 4 +- +544 / 1,056 +1,024 / 2,048$", text, re.MULTILINE)


def test_report_of_a_slim_file(folder, capsys):
    text = run(capsys, "report", "last.safetensors", *IMAGES, "--init.width", "6")
    assert re.search(r"^conv2 +2 / 2 ", text, re.MULTILINE)
    assert re.search(r"^hidden +8 / 8 ", text, re.MULTILINE)


# --- slim --------------------------------------------------------------------------------------


def test_slim_takes_out_what_is_zero_and_nothing_else(folder, capsys):
    text = run(capsys, "slim", "dense.pt", *DENSE, "--output", "small.safetensors")
    small, network = load_slim("small.safetensors", Dense), dense()
    assert torch.equal(small.a.weight, network.a.weight[:16])
    assert torch.equal(small.a.bias, network.a.bias[:16])
    assert torch.equal(small.b.weight, network.b.weight[:, :16])
    assert torch.equal(small.b.bias, network.b.bias)
    assert "smaller, a: out_features 16\nsmaller, b: in_features 16\n" in text
    assert "1,216 -> 624 parameters (51.3%)\nlargest difference of outputs: " in text
    assert re.search(r"^checkpoint +1,216 +704 +2,304 ", text, re.MULTILINE)
    assert re.search(r"^slim +624 +624 +1,152 ", text, re.MULTILINE)
    assert text.endswith("saved: small.safetensors\n")


def test_slim_of_a_checkpoint_does_what_the_checkpoint_does(folder, capsys):
    text = run(capsys, "slim", "last.ckpt", *IMAGES, "--output", "small.safetensors")
    small = load_slim("small.safetensors", lambda: Images(6))
    assert (small.conv1.out_channels, small.norm.num_features, small.hidden.in_features) == (
        2,
        2,
        8,
    )
    images = given(3, 1, 6, 6)
    assert close(small(images), trained(folder)(images))
    assert "smaller, conv1: out_channels 2\n" in text


def test_slim_of_a_slim_file(folder, capsys):
    run(capsys, "slim", "dense.pt", *DENSE, "--output", "small.safetensors")
    torch.save({"b.weight": torch.ones(32, 16).index_fill(1, torch.tensor([3]), 0)}, "masks.pt")
    run(
        capsys,
        *("slim", "small.safetensors", *DENSE),
        *("--masks", "masks.pt", "--output", "smaller.safetensors"),
    )
    smaller, network = load_slim("smaller.safetensors", Dense), dense()
    kept = [unit for unit in range(16) if unit != 3]
    assert torch.equal(smaller.a.weight, network.a.weight[kept])
    assert torch.equal(smaller.b.weight, network.b.weight[:, kept])


def test_slim_says_what_else_it_took_out():
    network = nn.Identity()
    plan = removal_plan.RemovalPlan(
        heads={"attention": [0, 2]}, biases=["layer"], skipped=["block.1"]
    )
    network.slimming = slimming.Slimming([plan], {}, (8, 4), (0.0, None))
    assert cli._summary(network) == (
        "taken out: block.1\nsmaller, attention: 2 heads\nwith a bias now: layer\n"
        "8 -> 4 parameters (50.0%)\nlargest difference of outputs: 0.0e+00 in evaluation"
    )


def test_slim_says_what_it_keeps(folder, capsys):
    text = run(
        capsys,
        *(
            "slim",
            "dense.pt",
            "--model",
            f"{NETWORKS}.ReadTwice",
            "--example-input",
            "1,4",
        ),
        *("--output", "small.safetensors"),
    )
    assert "1,216 -> 1,216 parameters (100.0%)" in text
    assert "\nkept, a: " in text


def test_slim_without_a_batch_to_compare(folder, capsys):
    options = ["--model", f"{NETWORKS}.OneSample", "--example-input", "1,4"]
    text = run(capsys, *slimmed(options=options, output="small.safetensors"))
    assert "1,216 -> 624 parameters" in text
    assert "not compared: example_input must be what OneSample takes" in text
    small = load_slim("small.safetensors", OneSample)
    assert torch.equal(small.a.weight, dense().a.weight[:16])


# --- export and latency ------------------------------------------------------------------------


def program(path):
    return torch.export.load(path).module()


def session(path):
    runtime = importlib.import_module("onnxruntime").InferenceSession(path)
    name = runtime.get_inputs()[0].name
    return lambda inputs: torch.from_numpy(runtime.run(None, {name: inputs.numpy()})[0])


@pytest.mark.parametrize(("kind", "load"), [("pt2", program), ("onnx", session)])
def test_exported_programs(folder, capsys, kind, load):
    arguments = ["export", "last.ckpt", *IMAGES, "--format", kind, "--output"]
    text = run(capsys, *arguments, "small", "--slim")
    assert "smaller, conv1: out_channels 2\n" in text
    images = given(3, 1, 6, 6)
    assert close(load("small")(images), trained(folder)(images))
    if kind == "pt2":
        assert text.endswith("saved: small\n")
        assert program("small").get_parameter("conv1.weight").shape == (2, 1, 3, 3)
        assert run(capsys, *arguments, "whole") == "saved: whole\n"
        assert program("whole").get_parameter("conv1.weight").shape == (6, 1, 3, 3)


@pytest.mark.parametrize("layout", ["bsr", "csr"])
def test_exported_sparse_states(folder, capsys, layout):
    text = run(capsys, "export", "dense.pt", *DENSE, "--format", layout, "--output", "sparse.pt")
    network = load_sparse(Dense(), torch.load("sparse.pt", weights_only=True))
    stored = torch.count_nonzero(network.b.values) if isinstance(network.b, SparseLinear) else 0
    if layout == "bsr":
        assert stored == 512
        assert re.search(r"^b +bsr +0.500 +4,096 +2,068 ", text, re.MULTILINE)
    else:  # with an index for each, half of the weights take as much as all of them
        assert isinstance(network.b, nn.Linear)
        assert "b: csr would take 4,228 bytes, not less than 4,096" in text
    assert close(network(given(3, 4)), dense()(given(3, 4)))


def test_latency_of_two_networks(folder, capsys):
    text = run(
        capsys,
        *("latency", "last.safetensors", *IMAGES, "--init", '{"width": 6}'),
        *("--against", "last.ckpt", "--batch-sizes", "1", "64", "--threads", "2"),
    )
    header, *rows, how, _ = text.splitlines()
    assert header.startswith("batch size")
    assert "against" in header
    cells = [re.split(" {2,}", row) for row in rows]
    assert [row[0] for row in cells] == ["1", "64"]
    peaks = [[int(row[column].replace(",", "")) for column in (2, 4)] for row in cells]
    assert all(slim_bytes < dense_bytes for slim_bytes, dense_bytes in peaks)
    assert how.startswith("cpu, 2 threads, ")
    alone = run(capsys, "latency", "dense.pt", *DENSE)
    assert "against" not in alone
    assert [row.split()[0] for row in alone.splitlines()[1:2]] == ["1"]


# --- checkpoints and arguments -----------------------------------------------------------------


def test_arguments_come_before_those_of_the_checkpoint(folder, capsys):
    torch.save(
        {"state_dict": Dense(16).state_dict(), "hyper_parameters": {"width": 8, "other": 1}},
        "other.ckpt",
    )
    assert main(["report", "other.ckpt", *DENSE]) == 1
    assert "torch.Size([16, 4])" in capsys.readouterr().err
    assert "-           80 / 80" in run(capsys, "report", "other.ckpt", *DENSE, "--init.width=16")


def test_late_layers_and_arguments_that_are_taken_as_one(folder, capsys):
    model = cli_networks.Configured({"inputs": 4, "outputs": 3})
    model.configure_model()
    make_trainer([], max_epochs=0).strategy.connect(model)
    content = {
        "state_dict": model.state_dict(),
        "hparams_name": model._hparams_name,
        "hyper_parameters": dict(model.hparams),
    }
    assert content["hparams_name"] == "sizes"
    torch.save(content, "late.ckpt")
    text = run(
        capsys,
        "report",
        "late.ckpt",
        "--model",
        f"{NETWORKS}.Configured",
        "--grouping=element",
    )
    assert re.search(r"^all +15 / 15", text, re.MULTILINE)


def test_private_arguments_of_lightning_cli_are_not_passed_on(folder, capsys):
    hyper_parameters = {"width": 32, "depth": 2, "_instantiator": "os.system"}
    torch.save({"state_dict": dense().state_dict(), "hyper_parameters": hyper_parameters}, "x.ckpt")
    model = cli.load_model("x.ckpt", f"{NETWORKS}.AnyArguments", {})
    assert model.given == {"depth": 2}


def test_a_state_of_a_compiled_model(folder):
    torch.save(torch.compile(dense(), backend="eager").state_dict(), "compiled.pt")
    model = cli.load_model("compiled.pt", f"{NETWORKS}.Dense", {})
    assert not model.training
    assert torch.equal(model(given(3, 4)), dense()(given(3, 4)))


def test_an_example_has_the_precision_of_the_model(folder, capsys):
    assert cli.example_of(dense().double(), "2,4").dtype == torch.float64
    assert cli.example_of(nn.Flatten(), "2,4").shape == (2, 4)


# --- bad input ---------------------------------------------------------------------------------


def test_sensitivity_of_a_checkpoint(folder, capsys):
    written = ["--json", "found.json", "--plot", "found.png"]
    text = run(capsys, *sensitive(), "--k", "0.6", "--batches", "3", *written)
    found = json.loads((folder / "found.json").read_text())
    batches = Labelled()
    batches.setup("fit")
    expected = sensitivity(dense(), batches.train_dataloader()[:3], k=0.6)
    assert found == json.loads(json.dumps(expected.as_dict()))
    assert text == f"{expected}\n"
    assert found["samples"] == 24
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")
    text = run(capsys, *sensitive("labelled"), "--loss", f"{NETWORKS}.worst", "--k", "700 params")
    assert "of 1,216 parameters" in text


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_no_file(folder, capsys, case):
    arguments, words = BAD[case]
    write_bad_files()
    before = contents(folder)
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert [word for word in words if word not in printed.err] == [], printed.err
    assert re.search("^lightning-wgsef: error: ", printed.err, re.MULTILINE)
    assert "Traceback" not in printed.err
    assert printed.out == ""
    assert contents(folder) == before
    assert not (folder / "executed").exists()


@pytest.mark.parametrize("name", ["last.ckpt", "last.safetensors", "dense.pt"])
def test_truncated_files(folder, capsys, name):
    model = DENSE if name == "dense.pt" else [*IMAGES, "--init.width=6"]
    content = (folder / name).read_bytes()
    for share in (0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98):
        (folder / name).write_bytes(content[: int(share * len(content))])
        before = contents(folder)
        assert main(slimmed(name, model)) == 1
        assert f"{name} is truncated or no " in capsys.readouterr().err
        assert contents(folder) == before
    (folder / name).write_bytes(content)
    assert main(slimmed(name, model)) == 0


def test_a_network_cut_in_the_wrong_places_is_not_saved(folder, capsys, monkeypatch):
    plan = removal_plan.RemovalPlan
    cut = plan._cut
    monkeypatch.setattr(plan, "_cut", lambda own, name, x: cut(own, name, x).flip(0))
    monkeypatch.setattr(slimming._Slimmer, "_differing", lambda *_: "")
    (folder / "new.safetensors").write_text("from before")
    before = contents(folder)
    assert main(slimmed()) == 1
    assert "the outputs of Dense in evaluation differ" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize("command", [slimmed(), exported("bsr")], ids=["slim", "bsr"])
def test_a_full_disk(folder, capsys, command):
    resource = pytest.importorskip("resource")
    before, limits = contents(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        code = main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "File too large" in capsys.readouterr().err
    assert contents(folder) == before


# --- usage -------------------------------------------------------------------------------------


def stopped(capsys, *arguments):
    """Exit code and what was printed when the parser ends the program."""
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    printed = capsys.readouterr()
    return caught.value.code, printed.out, printed.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "command"),
        (["shrink", "last.ckpt"], "shrink"),
        (["report", "last.ckpt"], "model"),
        (["report", *IMAGES], "checkpoint"),
        (["slim", "last.ckpt", *IMAGES], "output"),
        (["report", "last.ckpt", *IMAGES, "--grouping", "chanel"], "'chanel'"),
        (["report", "last.ckpt", *IMAGES, "--example-input", "1,x"], "1,x"),
        (["report", "last.ckpt", *IMAGES, "--example-input", "1,0"], "1,0"),
        (["report", "last.ckpt", *IMAGES, "--init", "{"], "init"),
        (["report", "last.ckpt", *IMAGES, "--init", "[6]"], "init"),
        (["report", "last.ckpt", *IMAGES, "--colour"], "--colour"),
        (exported("tflite"), "'tflite'"),
        (["latency", "last.ckpt", *IMAGES, "--batch-sizes", "0"], "batch_sizes"),
        (["latency", "last.ckpt", *IMAGES, "--threads", "1.5"], "threads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_bad_usage(folder, capsys, arguments, words):
    before = contents(folder)
    code, out, err = stopped(capsys, *arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert contents(folder) == before


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_shows_examples_that_are_accepted(capsys, command):
    code, out, _ = stopped(capsys, command, "--help")
    assert code == 0
    examples = re.findall(r"^  lightning-wgsef (.*)$", out.partition("\nexample:\n")[2], re.M)
    assert examples
    for example in examples:
        options = cli._parser().parse_args(shlex.split(example))
        assert options.command == command
        assert options[command].model == "my_package.Net"


def test_help_names_every_command(capsys):
    code, out, _ = stopped(capsys, "--help")
    assert code == 0
    assert re.findall(r"^    (\w+) ", out, re.M) == list(cli.COMMANDS)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_progress_is_shown_on_a_terminal_only(folder, capsys, monkeypatch, kind):
    stderr = kind()
    monkeypatch.setattr(sys, "stderr", stderr)
    run(capsys, *slimmed(output="small.safetensors"))
    steps = ("reading", "making smaller", "comparing", "saving")
    shown = "".join(f"{step} ..\r\033[K" for step in steps)
    assert stderr.getvalue() == (shown if kind is Terminal else "")


def test_as_a_program_in_another_folder(folder):
    """A model of the current directory, a file that cannot be read: exit code 1 and one line."""
    (folder / "mine.py").write_text("from torch.nn import Identity as Net\n")
    (folder / "text.ckpt").write_text("no checkpoint")
    command = [sys.executable, "-m", "lightning_wgsef.cli", "report", "text.ckpt"]
    root = str(Path(cli.__file__).parents[2])
    found = subprocess.run(
        [*command, "--model", "mine.Net"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith("lightning-wgsef: error: text.ckpt is truncated")
    assert found.stderr.count("\n") == 1
