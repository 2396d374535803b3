"""The size that was named and the size that came out, as tables.

python -m tests.benchmarks.tables.sizes [network ...]

Weights are random: they are projected onto the budget, as at the end of a training, made smaller by
`slim` and counted anew. What was measured before is in tests/benchmarks/results/sizes.json and not
measured again. About half an hour.
"""

from __future__ import annotations

import copy
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from examples.models.lenet import LeNet5
from examples.models.resnet import CifarResNet
from examples.models.vit import VisionTransformer
from examples.models.yolo import YOLO
from lightning_wgsef import Groups, group_parameters, slim
from lightning_wgsef.groupings.budget import size_limit
from lightning_wgsef.network import latency
from lightning_wgsef.network.example_input import with_batch_size
from lightning_wgsef.network.flops import layer_flops
from lightning_wgsef.slimming.prune import projected
from lightning_wgsef.utils.files import atomic_write
from tests.helpers.networks.real import VGG16, DenseNet40, UNet, images
from tests.helpers.removal import drawn

SHARES = (0.7, 0.4, 0.15)
MEASURES = ("flops", "params")
MULTIPLES = (1, 8)
FILE = Path(__file__).parents[1] / "results" / "sizes.json"
INTRODUCTION = """# Sizes: named, and what came out

Made by `python -m tests.benchmarks.tables.sizes`: random weights, projected onto the budget, made
smaller by `slim`, and the network that comes out counted by itself. A cell has the share of the
dense network that came out, and in brackets how far below the budget that is, in units of what the
cheapest step costs that could still be added, a group or with `multiple_of=8` eight channels: from
0 to 1 the budget is used as far as it can be. "least" says what is left where every layer keeps one
group (or one multiple), if that is more than was asked for, which is refused with these words. Of
LeNet-5's first layer, with six channels, any number may stay. FLOPs of the LSTM, which torch does
not count, are two a weight and step.
"""


class Recurrent(nn.Module):
    """Two layers of an LSTM, and what reads the last of them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 48)
        self.first, self.second = (nn.LSTM(n, 64, batch_first=True) for n in (48, 64))
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores (batch, 5)."""
        return self.fc(self.second(self.first(self.embed(x))[0])[0][:, -1])


def hugging(kind: str, task: str, **sizes: Any) -> nn.Module:
    """Make a network of Hugging Face."""
    config = getattr(transformers, f"{kind}Config")(**sizes)
    network: nn.Module = getattr(transformers, f"{kind}{task}")(config)
    return network


def resnet(kind: str, depths: list[int], widths: list[int]) -> nn.Module:
    """Make a ResNet of blocks of this kind."""
    shape = {"layer_type": kind, "depths": depths, "hidden_sizes": widths}
    return hugging("ResNet", "ForImageClassification", **shape, embedding_size=32, num_labels=5)


def words() -> Tensor:
    """Two texts of 12 tokens."""
    return torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(1))


def mobile(version: str) -> nn.Module:
    """Make a MobileNet of half its width."""
    return hugging(
        f"MobileNet{version}", "ForImageClassification", depth_multiplier=0.5, num_labels=10
    )


ENCODER = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "vocab_size": 60}
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "LeNet-5": (LeNet5, images(28, 1), "structure"),
    "VGG16-BN": (lambda: VGG16((16, 32, 32, 64, 64), (64, 32)), images(32), "structure"),
    "ResNet18": (
        lambda: resnet("basic", [2, 2, 2, 2], [32, 48, 64, 96]),
        images(32),
        "structure",
    ),
    "ResNet20": (lambda: CifarResNet(20), images(32), "structure"),
    "ResNet50": (
        lambda: resnet("bottleneck", [3, 4, 6, 3], [64, 96, 128, 160]),
        images(32),
        "structure",
    ),
    "MobileNetV1": (lambda: mobile("V1"), images(32), "structure"),
    "MobileNetV2": (lambda: mobile("V2"), images(32), "structure"),
    "DenseNet40": (lambda: DenseNet40(16, 8, 4), images(16), "structure"),
    "UNet": (lambda: UNet(16, 24, 32), images(16), "structure"),
    "YOLO": (YOLO, images(64, 1), "structure"),
    "LSTM": (
        Recurrent,
        torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(1)),
        "structure",
    ),
    "ViT": (
        VisionTransformer,
        images(32),
        {"*attention*": "head", "*mlp*": "hidden"},
    ),
    "BERT": (
        lambda: hugging("Bert", "ForSequenceClassification", **ENCODER, intermediate_size=256),
        words(),
        {"*attention*": "head", "*intermediate*": "hidden", "*": "hidden"},
    ),
    "GPT-2": (
        lambda: hugging("GPT2", "LMHeadModel", n_embd=64, n_layer=3, n_head=8, vocab_size=60),
        words(),
        {"*attn*": "head", "*mlp*": "hidden"},
    ),
}


def counted(network: nn.Module, example: Any, measure: str) -> float:
    """Count a network by itself."""
    if measure == "flops":
        return layer_flops(network, with_batch_size(example, 2))[1] / 2
    return float(sum(p.numel() for p in network.parameters()))


def cheapest(groups: Groups, alive: Tensor) -> float:
    """What the cheapest step costs that could still be taken; 0 where there is none."""
    size, limits = groups.size, groups.limits
    assert size is not None
    places, before, found = limits.ranks(alive.double()), float(size.of(alive)), []
    for kind in range(int(size.kinds.max()) + 1):
        own = ((size.kinds == kind) & ~alive).nonzero().flatten()
        layer = int(limits.owner[size.kinds == kind][0])
        step = int(limits.multiple[layer])
        room = int(limits.most[layer]) - int((alive & (limits.owner == layer)).sum())
        if min(len(own), room) >= step:
            more = alive.clone()
            more[own[places[own].argsort()[:step]]] = True
            found.append(float(size.of(more)) - before)
    return min(found, default=0.0)


def multiples(name: str, number: int) -> Any:
    """Multiples by layer: six channels are none of eight."""
    return {"conv1": 1, "*": number} if name == "LeNet-5" else number


def measure(name: str, what: str, multiple_of: int) -> list[dict[str, Any]]:
    """Cells of all shares."""
    torch.manual_seed(0)
    make, example, grouping = NETWORKS[name]
    network = drawn(make().eval())
    whole = copy.deepcopy(network.state_dict())
    asked, dense = multiples(name, multiple_of), counted(network, example, what)
    options = {"scope": "global", "costs": what, "multiple_of": asked}
    found = []
    try:
        all_groups = group_parameters(network, grouping, 1.0, example_input=example, **options)
    except ValueError as error:
        return [_cell(name, what, share, multiple_of, refused=str(error)) for share in SHARES]
    size, layers = all_groups.size, all_groups.layers
    assert size is not None
    for share in SHARES:
        try:
            groups = Groups(layers, budget=size_limit(size, layers, share), size=size)
        except ValueError as error:
            found.append(_cell(name, what, share, multiple_of, refused=str(error)))
            continue
        network.load_state_dict(whole)
        alive = projected(groups)
        groups.scale_(alive.to(groups.dtype))
        small = slim(network, example, multiple_of=asked)
        left, step = counted(small, example, what), cheapest(groups, alive)
        steps = (share * dense - left) / step if step else 0.0
        found.append(_cell(name, what, share, multiple_of, left=left / dense, steps=steps))
    return found


def _cell(name: str, what: str, share: float, multiple_of: int, **more: Any) -> dict[str, Any]:
    return {"network": name, "measure": what, "k": share, "multiple_of": multiple_of, **more}


WIDE = "MobileNetV2, full width"
LATENCIES = ("VGG16-BN", "ResNet20", "MobileNetV1", "ViT")
BATCH = 8


def measure_latency(name: str, multiple_of: int) -> list[dict[str, Any]]:
    """Half of the time: asked, foretold, and measured on the slim network beside the dense one."""
    torch.manual_seed(0)
    make, example, grouping = NETWORKS[name]
    (example,) = with_batch_size(example, BATCH)
    network = drawn(make().eval())
    options = {"scope": "global", "costs": "latency", "multiple_of": multiple_of}
    try:
        groups = group_parameters(network, grouping, 0.5, example_input=example, **options)
    except ValueError as error:
        return [_cell(name, "latency", 0.5, multiple_of, refused=str(error))]
    alive = projected(groups)
    assert groups.size is not None
    foretold, total = float(groups.size.of(alive)), float(groups.size.total)
    groups.scale_(alive.to(groups.dtype))
    small = slim(network, example, multiple_of=multiple_of)
    dense, found = (x.whole for x in latency.pass_times([network, small], example))
    times = {"foretold": foretold / total, "left": found / dense, "ms": 1000 * dense}
    return [_cell(name, "latency", 0.5, multiple_of, **times)]


def measure_speed(multiple_of: int) -> list[dict[str, Any]]:
    """MobileNetV2 of half the operations: how much faster, on two threads, in turn with dense."""
    torch.manual_seed(0)
    network = drawn(hugging("MobileNetV2", "ForImageClassification", num_labels=10).eval())
    example = images(96)
    options = {"scope": "global", "costs": "flops", "multiple_of": multiple_of}
    groups = group_parameters(network, "structure", 0.5, example_input=example, **options)
    groups.scale_(projected(groups).to(groups.dtype))
    small = slim(network, example, multiple_of=multiple_of)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    # The lowest wall clock: a thread that waits for the other one spends time of its own, too.
    latency.perf_counter = time.perf_counter
    ratios = {}
    for batch, repeats in ((1, 60), (64, 10)):
        inputs = with_batch_size(example, batch)
        with torch.no_grad():
            calls = [lambda own=own, inputs=inputs: own(*inputs) for own in (network, small)]
            times = latency.alternating_times(calls, repeats, 3)
        ratios[str(batch)] = min(times[0]) / min(times[1])
    torch.set_num_threads(threads)
    latency.perf_counter = time.thread_time
    left = counted(small, example, "flops") / counted(network, example, "flops")
    return [_cell(WIDE, "speed", 0.5, multiple_of, left=left, ratios=ratios)]


def jobs() -> Iterator[tuple[tuple[str, str, int], Callable[[], list[dict[str, Any]]]]]:
    """What there is to measure."""
    for name in NETWORKS:
        for key in ((name, what, number) for what in MEASURES for number in MULTIPLES):
            yield key, partial(measure, *key)
    for multiple_of in MULTIPLES:
        yield (WIDE, "speed", multiple_of), partial(measure_speed, multiple_of)
        for name in LATENCIES:
            yield (name, "latency", multiple_of), partial(measure_latency, name, multiple_of)


def shown(cell: dict[str, Any] | None) -> str:
    """A cell of the table."""
    if cell is None:
        return "not measured"
    if "refused" in cell:
        words = cell["refused"]
        least = words.partition("must lie between ")[2].partition("(")[2].partition(")")[0]
        return f"least {least}" if least else words
    return f"{cell['left']:.2%} ({cell['steps']:.2f})"


def document(found: list[dict[str, Any]]) -> str:
    """All tables as Markdown."""
    by_key = {(x["network"], x["measure"], x["k"], x["multiple_of"]): x for x in found}
    names = {"flops": "FLOPs", "params": "parameters"}
    lines = [INTRODUCTION]
    for multiple_of in MULTIPLES:
        lines.append(f"## {'Any width' if multiple_of == 1 else f'multiple_of={multiple_of}'}\n")
        heads = [f"{names[what]}, {share:.0%}" for what in MEASURES for share in SHARES]
        lines.append(f"| network | {' | '.join(heads)} |")
        lines.append(f"|---|{'--:|' * len(heads)}")
        for name in NETWORKS:
            row = [
                shown(by_key.get((name, what, share, multiple_of)))
                for what in MEASURES
                for share in SHARES
            ]
            lines.append(f"| {name} | {' | '.join(row)} |")
        lines.append("")
    lines += [
        "## Latency\n",
        f"Half of the time of a batch of {BATCH} on one thread. CPU time of that thread, the",
        "lowest of all turns: others used the machine. Both networks run in turn.\n",
        "| network | multiple_of | asked | foretold | measured | of the dense network, ms |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for cell in (x for x in found if x["measure"] == "latency"):
        if "refused" in cell:
            least = shown(cell)
            lines.append(f"| {cell['network']} | {cell['multiple_of']} | 50 % | {least} | - | - |")
            continue
        lines.append(
            f"| {cell['network']} | {cell['multiple_of']} | 50 % | {cell['foretold']:.1%} | "
            f"{cell['left']:.1%} | {cell['ms']:.1f} |"
        )
    lines += [
        "\n## MobileNetV2 at half the operations\n",
        "Images of 96 pixels, two threads; the lowest time of the dense network over that of the",
        "slim one, of runs in turn. Of these random weights the residual streams go (64 channels",
        "to 16), while the wide layers between keep theirs, whose depthwise convolutions, norms",
        "and clamps take half of the time: half of the operations is not half of the time.\n",
        "| multiple_of | FLOPs | speed-up, batch 1 | batch 64 |",
        "|--:|--:|--:|--:|",
    ]
    for cell in (x for x in found if x["measure"] == "speed"):
        one, many = cell["ratios"].values()
        lines.append(f"| {cell['multiple_of']} | {cell['left']:.1%} | {one:.2f} | {many:.2f} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure what is missing, and write the tables."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    # The time of this thread: that of others on the machine is none of its.
    latency.perf_counter = time.thread_time
    found = json.loads(FILE.read_text()) if FILE.exists() else []
    for key, run in jobs():
        known = [(x["network"], x["measure"], x["multiple_of"]) for x in found]
        if key in known or (sys.argv[1:] and key[0] not in sys.argv[1:]):
            continue
        found += run()
        with atomic_write(FILE) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n")
        FILE.with_suffix(".md").write_text(document(found))
        print(key, flush=True)


if __name__ == "__main__":
    main()
