"""Slim, then int8: accuracy, bytes and time of a network, of half of it, and of that in eight bits.

    python -m examples.quantise
    python -m examples.quantise --weights resnet20.safetensors --data-dir data

A finished network loses half of its operations (`prune`), is trained on, and then stores its
weights as int8 and multiplies them as such: once with ranges that a few batches show
(post-training), and once trained with rounded numbers (quantisation-aware). Both are torchao's,
whose graphs torch.compile turns into kernels for a CPU. On the digits of scikit-learn in two
minutes, most of which is torch.compile's; or with weights of ResNet-20, such as the benchmark's
suite resnet20 leaves. What is measured is printed, and kept in figures.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.benchmark.records import Records, origin
from examples.data.modules import CIFAR10, Digits, InMemory
from examples.models.lenet import SmallConvNet
from examples.models.resnet import CifarResNet
from examples.training import Classifier, accuracy, quiet_trainer
from lightning_wgsef import measure_latency, prune
from lightning_wgsef.network.flops import layer_flops

CALIBRATION = 8


def prepared(network: nn.Module, example: Tensor, *, training: bool = False) -> Any:
    """A graph of a network that watches the ranges of its tensors, for `converted`.

    Args:
        network: is not changed.
        example: images; any number of them can be given to the graph.
        training: round while it trains, too; else it only watches.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    try:
        from torchao.quantization.pt2e import allow_exported_model_train_eval
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("int8 needs torchao: pip install torchao") from error
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=training))
    shapes = ({0: torch.export.Dim("batch")},)
    traced = torch.export.export(
        copy.deepcopy(network).train(training), (example,), dynamic_shapes=shapes
    )
    graph = (prepare_qat_pt2e if training else prepare_pt2e)(traced.module(), quantizer)
    return allow_exported_model_train_eval(graph)


def converted(graph: Any) -> nn.Module:
    """The network in int8 of a graph that has seen batches: its tensors are those it needs."""
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    graph.eval()
    small = convert_pt2e(graph)
    needed = {node.target for node in small.graph.nodes if node.op == "get_attr"}
    for name in small.state_dict().keys() - needed:  # the weights before they were rounded
        parent, _, tensor = name.rpartition(".")
        delattr(small.get_submodule(parent), tensor)
    return allow_exported_model_train_eval(small)


@torch.no_grad()
def post_training(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> nn.Module:
    """A network in int8, with ranges that the first batches show."""
    few = [images for images, _ in itertools.islice(batches, CALIBRATION)]
    graph = prepared(network, few[0])
    for images in few:
        graph(images)
    return converted(graph)


def quantisation_aware(
    network: nn.Module, data: InMemory, lr: float, epochs: int, limit: int | float
) -> nn.Module:
    """A network in int8 that was trained on with rounded numbers."""
    example = next(iter(data.train_dataloader()))[0]
    graph = prepared(network, example, training=True)
    fit(graph, data, lr, epochs, limit)
    return converted(graph)


def fit(network: nn.Module, data: InMemory, lr: float, epochs: int, limit: int | float) -> None:
    """Train on, with momentum and weight decay, at a rate that falls along a cosine."""
    pl.seed_everything(0, verbose=False)
    network.train()  # Lightning leaves networks in the mode that they are in
    quiet_trainer(epochs, [], limit).fit(Falling(network, lr, "sgd", weight_decay=5e-4), data)


class Falling(Classifier):
    """Its learning rate falls along a cosine."""

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and its learning rate over the run."""
        optimizer = super().configure_optimizers()
        steps = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]


def stored(network: nn.Module) -> int:
    """Bytes of a network's tensors."""
    return sum(x.numel() * x.element_size() for x in network.state_dict().values())


def main() -> None:
    """Make a network smaller, quantise it, and print what became of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="of ResNet-20; none: train on digits")
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--operations", type=float, default=0.5, help="the share that stays")
    parser.add_argument("--epochs", type=int, help="of fine-tuning, and with rounded numbers")
    parser.add_argument("--batches", type=int, help="of an epoch, at most")
    parser.add_argument("--folder", type=Path, default=Path("quantise"))
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    limit = options.batches or 1.0
    pl.seed_everything(0, verbose=False)
    digits = options.weights is None
    data: InMemory = Digits() if digits else CIFAR10(options.data_dir)
    dense: nn.Module = SmallConvNet() if digits else CifarResNet(20)
    epochs, lr = options.epochs or (10 if digits else 1), 0.02 if digits else 0.01
    try:
        if not digits:
            dense.load_state_dict(load_file(options.weights))
        data.prepare_data()
    except (OSError, RuntimeError, SafetensorError) as error:  # no such file, or of another network
        sys.exit(f"{options.weights}, {options.data_dir}: {error}")
    data.setup()
    if digits:
        fit(dense, data, 0.1, 20, 1.0)
    dense.eval()
    small = prune(dense, data.train_dataloader(), options.operations)
    print(small.slimming)
    fit(small, data, lr, epochs, limit)
    small.eval()
    networks = {
        "dense": dense,
        "slim": small,
        "dense, int8": post_training(dense, data.train_dataloader()),
        "slim, int8": post_training(small, data.train_dataloader()),
        "slim, int8, trained": quantisation_aware(small, data, lr / 10, epochs, limit),
    }
    example = torch.zeros(2, *data.image_shape)
    records = Records(options.folder / "figures.jsonl")
    torch._inductor.config.freezing = True  # weights are packed once, for the kernels of int8
    # Where the number of images may vary, torch 2.13 packs int8 for other strides than it reads.
    compiled = {name: torch.compile(x, dynamic=False) for name, x in networks.items()}
    for name, network in networks.items():
        figures: dict[str, Any] = {
            "accuracy": accuracy(network, data.test_dataloader()),
            "bytes": stored(network),
        }
        if name in ("dense", "slim"):
            figures["flops"] = layer_flops(network, example)[1] / len(example)
        if name != "slim, int8, trained":  # the kernels of the one before
            sizes = {"against": compiled["dense"], "batch_sizes": (1, 64)}
            times = measure_latency(compiled[name], example, **sizes)
            figures["latency"] = [batch.ratio.median for batch in times.batches if batch.ratio]
        print(f"{name}: {figures}")
        records.append({"name": name, **figures, **origin()})


if __name__ == "__main__":
    main()
