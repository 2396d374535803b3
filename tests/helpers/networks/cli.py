"""Networks and bad files that the tests of the command line name."""

from __future__ import annotations

import os
from pathlib import Path

import pytorch_lightning as pl
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_wgsef.network.surgery import RemovalPlan
from lightning_wgsef.slimming.files import save_slim
from lightning_wgsef.slimming.slim import Slimming

HERE = __name__
IMAGES = ["--model", f"{HERE}.Images"]
DENSE = ["--model", f"{HERE}.Dense", "--example-input", "1,4"]


class Images(pl.LightningModule):
    """Layers conv1, norm, conv2, hidden and head; images of 6 x 6 pixels."""

    def __init__(self, width: int, rate: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.example_input_array = torch.ones(2, 1, 6, 6)
        self.conv1 = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 32, 3)
        self.hidden = nn.Linear(32, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, images):
        features = self.conv2(torch.relu(self.norm(self.conv1(images))))
        return self.head(torch.relu(self.hidden(features.mean((2, 3)))))

    def training_step(self, batch):
        return self(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.rate)


class Dense(nn.Module):
    """Layers a and b."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, width), nn.Linear(width, 32)

    def forward(self, inputs):
        return self.b(torch.relu(self.a(inputs)))


class ReadTwice(Dense):
    """What its first layer makes is also an output."""

    def forward(self, inputs):
        hidden = self.a(inputs)
        return self.b(torch.relu(hidden)), hidden


class OneSample(Dense):
    """Takes no batch."""

    def forward(self, inputs):
        return super().forward(inputs.reshape(4))


class Random(Dense):
    """Another output every time."""

    def forward(self, inputs):
        return super().forward(inputs) + torch.rand(32)


class Branching(Dense):
    """Goes another way for other numbers, which no program of torch.export can."""

    def forward(self, inputs):
        return super().forward(inputs if inputs.sum() > 0 else -inputs)


class Wrapped(Dense):
    """Returns what the graph cannot see into."""

    def forward(self, inputs):
        return super().forward(inputs).tolist()


class Configured(pl.LightningModule):
    """Makes its layers late, from arguments that it takes as one."""

    def __init__(self, sizes: dict[str, int]) -> None:
        super().__init__()
        self.save_hyperparameters(sizes)
        self.sizes = sizes

    def configure_model(self):
        self.layer = nn.Linear(self.sizes["inputs"], self.sizes["outputs"])

    def forward(self, inputs):
        return self.layer(inputs)


class AnyArguments(Dense):
    """Takes what it is given."""

    def __init__(self, **given: int) -> None:
        super().__init__(given.pop("width"))
        self.given = given


class Labelled(pl.LightningDataModule):
    """Batches of four numbers and a label."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.size = size

    def setup(self, stage):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(5 * self.size, 4, generator=generator)

    def train_dataloader(self):
        labels = torch.arange(len(self.inputs)) % 32
        return list(zip(self.inputs.split(self.size), labels.split(self.size), strict=True))


def labelled():
    return [(torch.ones(8, 4), torch.zeros(8, 32))]


def worst(outputs, labels):
    return (outputs - labels).abs().max()


def unlabelled():
    return [torch.randn(8, 4)]


def no_module():
    return 3


NO_CLASS = 3


class Code:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def write_bad_files():
    """Files that a command must refuse, in the current directory."""
    Path("text.ckpt").write_text("no checkpoint")
    Path("empty.ckpt").touch()
    heads = Dense()
    heads.slimming = Slimming([RemovalPlan(heads={"a": [0]}, kept={"a.weight": {0: [0]}})])
    save_slim(heads, "heads.safetensors")
    Path("broken.py").write_text("1 / 0")
    torch.save([1, 2], "list.pt")
    torch.save({"state_dict": [1, 2]}, "list.ckpt")
    torch.save({1: torch.ones(2)}, "numbered.pt")
    torch.save({"state_dict": {}, "hyper_parameters": {"x": Code()}}, "code.ckpt")
    torch.save({**Dense().state_dict(), "c": torch.ones(2)}, "more.pt")
    torch.save({"state_dict": {}, "hyper_parameters": 3, "hparams_name": []}, "three.ckpt")
    torch.save({"c.weight": torch.ones(2)}, "other_masks.pt")
    torch.save({"b.weight": torch.ones(2, 2).to_sparse()}, "sparse.pt")
    torch.save({"a.weight": torch.ones(3, 4)}, "small_masks.pt")
    save_file({"a": torch.ones(2)}, "other.safetensors")


def slimmed(checkpoint="dense.pt", options=DENSE, output="new.safetensors"):
    return ["slim", checkpoint, *options, "--output", output]


def exported(kind, checkpoint="dense.pt", options=DENSE, output="new"):
    return ["export", checkpoint, *options, "--format", kind, "--output", output]


def sensitive(data="Labelled", *more):
    return ["sensitivity", "dense.pt", *DENSE, "--data", f"{HERE}.{data}", *more]


def of(name, shape="1,4"):
    return ["--model", name, "--example-input", shape]


NO_FOLDER = "path must be a file that can be written, got '{}': No such file or directory"
A_FOLDER = "path must be a file that can be written, got '{}': it is a directory"
NO_ENDING = "path must end in .safetensors, the format of slim networks, got '{}'"
BAD = {
    "missing": (slimmed("no.ckpt"), ["there is no file no.ckpt"]),
    "a folder": (slimmed("."), ["there is no file ."]),
    "text": (slimmed("text.ckpt"), ["text.ckpt is truncated or no checkpoint"]),
    "empty": (slimmed("empty.ckpt"), ["empty.ckpt is truncated or no checkpoint"]),
    "a list": (slimmed("list.pt"), ["list.pt holds no state_dict"]),
    "a list inside": (slimmed("list.ckpt"), ["list.ckpt holds no state_dict"]),
    "numbers for names": (slimmed("numbered.pt"), ["numbered.pt holds no state_dict"]),
    "code": (slimmed("code.ckpt"), ["code.ckpt", "to read its posix.mkdir, code from the file"]),
    "odd arguments": (slimmed("three.ckpt"), ["hyper_parameters must be a dict", "are 3"]),
    "other safetensors": (slimmed("other.safetensors"), ["must be a file of save_slim"]),
    "of another model": (
        slimmed("last.ckpt"),
        [
            f"last.ckpt is not of {HERE}.Dense",
            "missing a.weight, a.bias, b.weight and 1 more; "
            "not in the model conv1.weight, conv1.bias, norm.weight and 10 more",
        ],
    ),
    "one name more": (slimmed("more.pt"), ["missing nothing; not in the model c"]),
    "slim, of a model with attention": (
        slimmed("heads.safetensors"),
        ["another network than the Dense", "'a' is a Linear, which has no heads"],
    ),
    "slim, of another model": (slimmed("last.safetensors"), ["another network than the Images"]),
    "another width": (
        slimmed(options=[*DENSE, "--init.width", "16"]),
        [
            f"dense.pt is not of {HERE}.Dense",
            "size mismatch for a.weight",
            "[32, 4]",
        ],
    ),
    "no arguments": (
        slimmed("last.safetensors", IMAGES),
        [f"{HERE}.Images() fails", "'width'", "--init '{\"width\": 8}'"],
    ),
    "unknown arguments": (
        slimmed(options=[*DENSE, "--init.depth=3"]),
        [f"{HERE}.Dense(depth=3) fails", "'depth'"],
    ),
    "no module": (slimmed(options=of("no_package.Net")), ["--model", "'no_package'"]),
    "no class": (
        slimmed(options=of(f"{HERE}.No")),
        ["--model", "no attribute 'No'"],
    ),
    "no dot": (slimmed(options=of("Net")), ["--model must be a class", "my_package"]),
    "broken module": (slimmed(options=of("broken.Net")), ["broken.Net", "ZeroDivisionError"]),
    "not callable": (
        slimmed(options=of(f"{HERE}.NO_CLASS")),
        ["NO_CLASS is a int"],
    ),
    "no data": (sensitive("No"), ["--data", "no attribute 'No'"]),
    "data with other arguments": (
        sensitive("Labelled", "--data-init.width=3"),
        ["--data", "Labelled must make a LightningDataModule or batches", "{'width': 3}"],
    ),
    "data that is none": (sensitive("no_module"), ["--data", "no_module", "batches", "int"]),
    "data without labels": (sensitive("unlabelled"), ["batches[0] must be a pair", "got Tensor"]),
    "no loss": (
        sensitive("Labelled", "--loss", "torch.nn.functional.no_loss"),
        ["--loss", "no attribute 'no_loss'"],
    ),
    "an unknown unit": (
        sensitive("Labelled", "--k", "5 miles", "--json", "new.json"),
        ["got '5 miles'", "units: FLOPs, params, B"],
    ),
    "a size that cannot be": (
        sensitive("Labelled", "--k", "0.001", "--plot", "new.png"),
        ["k = 0.001", "must lie between"],
    ),
    "makes no module": (
        slimmed(options=of(f"{HERE}.no_module")),
        ["must make a torch.nn.Module", "int"],
    ),
    "masks of other names": (
        [*slimmed(), "--masks", "other_masks.pt"],
        ["masks: Dense has no parameter 'c.weight'"],
    ),
    "masks of other shapes": (
        [*slimmed(), "--masks", "small_masks.pt"],
        ["masks: 'a.weight' must have the shape of the parameter, (32, 4), got (3, 4)"],
    ),
    "no masks": (
        [*slimmed(), "--masks", "last.ckpt"],
        ["last.ckpt must hold a dict of dense tensors"],
    ),
    "sparse masks": (
        [*slimmed(), "--masks", "sparse.pt"],
        ["sparse.pt must hold a dict of dense tensors"],
    ),
    "random outputs, exported": (
        [*exported("pt2", options=of(f"{HERE}.Random")), "--slim"],
        ["the exported Random differs", "random"],
    ),
    "structure that is hidden": (
        [
            "report",
            "dense.pt",
            *of(f"{HERE}.Wrapped"),
            "--grouping=structure",
            "--json=new",
        ],
        ["Wrapped", "cannot be followed"],
    ),
    "a branch": (
        exported("pt2", options=of(f"{HERE}.Branching")),
        ["Branching cannot be exported"],
    ),
    "nothing to group": (
        [
            "report",
            "last.ckpt",
            "--model",
            f"{HERE}.Images",
            "--grouping=head",
            "--json=new",
        ],
        ["Images has no layer that grouping='head' can group"],
    ),
}
WRONG_EXAMPLE = "example_input must be what Dense takes"
for command in (
    slimmed(options=of(f"{HERE}.Dense", "1,5")),
    *(exported(kind, options=of(f"{HERE}.Dense", "1,5")) for kind in ("onnx", "pt2", "bsr")),
    ["latency", "dense.pt", *of(f"{HERE}.Dense", "1,5")],
    ["report", "dense.pt", *of(f"{HERE}.Dense", "1,5"), "--json", "new"],
):
    name = " ".join([command[0], *command[6:8]])
    BAD[f"wrong shape, {name}"] = (command, [WRONG_EXAMPLE, "(1, 5)"])
    if command[0] != "report":
        without = [*command[:4], *command[6:]]
        BAD[f"no shape, {name}"] = (without, ["Dense has no example_input_array", "1,3,32,32"])
    paths = {"no/new": NO_FOLDER, ".": A_FOLDER}
    if command[0] == "slim":
        paths = {"no/new.safetensors": NO_FOLDER, ".": NO_ENDING, "new.pt": NO_ENDING}
    for path, words in paths.items():
        if command[-1].startswith("new"):
            to = [*command[:5], "1,4", *command[6:-1], path]
            BAD[f"{name} to {path}"] = (to, [words.format(path)])
