"""What `slim` makes of well-known architectures: outputs, sizes and times, as a table.

python -m tests.benchmarks.tables.slim [network ...]

Weights are random, and which groups are zero is, too: it is about sizes and not about accuracy. All
times are ratios of alternating runs on two threads. Some ten minutes; what was measured before is
in tests/benchmarks/results/slim.json and not measured again.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from examples.models.lenet import LeNet5
from examples.models.resnet import ResNet18
from lightning_wgsef import Groups, group_parameters
from lightning_wgsef.export.runtimes import export_onnx
from lightning_wgsef.network.example_input import with_batch_size
from lightning_wgsef.network.flops import layer_flops
from lightning_wgsef.network.latency import measure_latency
from lightning_wgsef.slimming.slim import slim
from tests.helpers.networks.real import VGG16, DenseNet40, UNet, images

SHARES = (0.5, 0.1)
BATCHES = (1, 64)
FILE = Path(__file__).parents[1] / "results" / "slim.json"
ATTENTION = {"*attention": "head", "*mlp.fc1": "hidden"}
DECODER = {"*self_attn": "head", "*mlp.gate_proj": "hidden"}
INTRODUCTION = """# Slim networks

Made by `python -m tests.benchmarks.tables.slim`: networks in usual widths, with random weights.
The share k of every set of groups stays (`structure`; heads and hidden units of the transformers),
the others are zero and taken out by `slim`. Difference: the largest of the outputs of the masked
and the slim network, as a share of the largest output, in evaluation and in training mode. ONNX:
largest difference that was accepted between onnxruntime and the slim network. Speed-up: median time
of the dense network over that of the slim one, two threads, alternating runs. Share: speed-up over
the ratio of the FLOPs.
"""


def mobile(version: str) -> nn.Module:
    """MobileNet of Hugging Face, in its usual width."""
    config = getattr(transformers, f"MobileNet{version}Config")(num_labels=10, image_size=64)
    return getattr(transformers, f"MobileNet{version}ForImageClassification")(config)


def vision_transformer() -> nn.Module:
    """ViT-S, half as deep, for images of 32 pixels in 64 patches."""
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=6, image_size=32, patch_size=4)
    return transformers.ViTForImageClassification(config)


def llama() -> nn.Module:
    """Llama with four layers, and two heads of queries for each of keys and values."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4}
    config = transformers.LlamaConfig(**sizes, **heads, vocab_size=1000, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def words() -> torch.Tensor:
    """Two texts of 32 tokens."""
    return torch.randint(3, 1000, (2, 32), generator=torch.Generator().manual_seed(1))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, Any]] = {
    "LeNet-5": (LeNet5, images(28, 1), "structure"),
    "VGG16-BN": (lambda: VGG16((64, 128, 256, 512, 512), (512, 512)), images(32), "structure"),
    "ResNet18": (ResNet18, images(32), "structure"),
    "MobileNetV1": (lambda: mobile("V1"), images(64), "structure"),
    "MobileNetV2": (lambda: mobile("V2"), images(64), "structure"),
    "DenseNet40": (lambda: DenseNet40(24, 12, 12), images(32), "structure"),
    "UNet": (lambda: UNet(16, 32, 64), images(64), "structure"),
    "ViT": (vision_transformer, images(32), ATTENTION),
    "Llama": (llama, words(), DECODER),
}


def masked(network: nn.Module, groups: Groups, share: float) -> nn.Module:
    """The network with all groups but a random share of every set at zero, and random biases."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)
    factors, start = torch.ones(len(groups)), 0
    for count in groups.counts:
        order = torch.randperm(count, generator=generator)
        factors[start + order[max(1, round(share * count)) :]] = 0
        start += count
    groups.scale_(factors)
    return network


def measure(name: str, share: float) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    make, example, grouping = NETWORKS[name]
    network = make().eval()
    traced = example if grouping == "structure" else None
    groups = group_parameters(network, grouping, example_input=traced)
    masked(network, groups, share)
    start = time.perf_counter()
    small = slim(network, example)
    seconds = time.perf_counter() - start
    record = small.slimming
    flops = [layer_flops(x, with_batch_size(example, 2))[1] // 2 for x in (network, small)]
    row: dict[str, Any] = {
        "network": name,
        "k": share,
        "difference": record.difference,
        "kept": record.kept,
        "seconds": seconds,
        "parameters": record.parameters,
        "flops": flops,
        "onnx": onnx_difference(small, example),
        "speed_up": {},
    }
    for batch in BATCHES:
        turns = {"repeats": 30, "warmup": 5} if batch == 1 else {"repeats": 5, "warmup": 1}
        report = measure_latency(
            network, example, against=small, batch_sizes=[batch], threads=2, **turns
        )
        ratio = report.batches[0].ratio
        assert ratio is not None
        row["speed_up"][str(batch)] = [ratio.lower, ratio.median, ratio.upper]
    return row


def onnx_difference(small: nn.Module, example: torch.Tensor) -> str:
    """The smallest power of ten that the check of the exported file passes, or what is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        for tolerance in (1e-6, 1e-5, 1e-4):
            try:
                export_onnx(small, Path(folder) / "small.onnx", example, tolerance=tolerance)
            except ValueError as error:
                reason = str(error)
            else:
                return f"{tolerance:.0e}"
    return f"refused: {reason}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| network | k | difference (evaluation, training) | parameters | FLOPs | ONNX | "
        "speed-up, batch 1 | batch 64 | share, batch 64 | slim, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        differences = ", ".join("-" if x is None else f"{x:.0e}" for x in row["difference"])
        parameters, flops = (after / before for before, after in (row["parameters"], row["flops"]))
        one, many = (row["speed_up"][str(batch)][1] for batch in BATCHES)
        cells = [row["network"], row["k"], differences, f"{parameters:.1%}", f"{flops:.1%}"]
        cells += [row["onnx"], f"{one:.2f}", f"{many:.2f}", f"{many * flops:.2f}"]
        lines.append(f"| {' | '.join(map(str, cells))} | {row['seconds']:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, and write the table."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    rows = json.loads(FILE.read_text()) if FILE.exists() else []
    for name in sys.argv[1:] or NETWORKS:
        for share in SHARES:
            if not any((row["network"], row["k"]) == (name, share) for row in rows):
                rows.append(measure(name, share))
                temporary = FILE.with_suffix(".part")
                temporary.write_text(json.dumps(rows, indent=1) + "\n")
                os.replace(temporary, FILE)
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    order = list(NETWORKS)
    rows.sort(key=lambda row: (order.index(row["network"]), -row["k"]))
    text = f"{INTRODUCTION}\n{table(rows)}\n"
    FILE.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
