"""Small versions of well-known architectures: complete in structure, tiny in width.

Where Hugging Face has the architecture its own classes are used, with all weights drawn at random.
Each entry of `NETWORKS` gives a network and an example of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

Example = Tensor | tuple[Tensor, ...] | dict[str, Tensor]
CLASSES = 5
VOCABULARY = 30


def images(size: int, channels: int = 3) -> Tensor:
    """Two images, always the same."""
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def tokens(length: int) -> Tensor:
    """Two sentences without padding, always the same."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (2, length), generator=generator)


# --- without a library ----------------------------------------------------------------------------


class LeNet5(nn.Module):
    """LeCun et al., 1998, with ReLU and max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5, padding=2), nn.Conv2d(4, 6, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(150, 10), nn.Linear(10, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool2d(relu(self.conv1(x)), 2)
        x = max_pool2d(relu(self.conv2(x)), 2)
        return self.fc3(relu(self.fc2(relu(self.fc1(x.flatten(1))))))


class VGG16(nn.Module):
    """Simonyan and Zisserman, 2014, with BatchNorm, laid out as in torchvision."""

    def __init__(
        self, widths: tuple[int, ...] = (4, 6, 8, 10, 10), hidden: tuple[int, int] = (12, 10)
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for repeats, width in zip((2, 2, 3, 3, 3), widths, strict=True):
            for _ in range(repeats):
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(inputs * 4, hidden[0]),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden[0], hidden[1]),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(hidden[1], CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


class DenseLayer(nn.Module):
    """Adds channels to all channels before."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(relu(self.norm(x)))], 1)


class Transition(nn.Module):
    """Between two dense blocks."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, inputs, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(relu(self.norm(x))))


class DenseNet40(nn.Module):
    """Huang et al., 2017, for small images; three layers a block instead of twelve."""

    def __init__(self, width: int = 6, growth: int = 4, repeats: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
        for block in range(3):
            if block:
                layers.append(Transition(width))
            for _ in range(repeats):
                layers.append(DenseLayer(width, growth))
                width += growth
        self.features = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(relu(self.norm(self.features(x))).mean((2, 3)))


def twice(inputs: int, width: int) -> nn.Sequential:
    """Convolution, BatchNorm and ReLU, two times."""
    layers: list[nn.Module] = []
    for channels in (inputs, width):
        convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Ronneberger et al., 2015, two levels deep, with padding and BatchNorm."""

    def __init__(self, a: int = 4, b: int = 6, c: int = 8) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = twice(3, a), twice(a, b), twice(b, c)
        self.up2, self.join2 = nn.ConvTranspose2d(c, b, 2, stride=2), twice(2 * b, b)
        self.up1, self.join1 = nn.ConvTranspose2d(b, a, 2, stride=2), twice(2 * a, a)
        self.out = nn.Conv2d(a, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(max_pool2d(first, 2))
        x = self.up2(self.middle(max_pool2d(second, 2)))
        x = self.up1(self.join2(torch.cat([second, x], 1)))
        return self.out(self.join1(torch.cat([first, x], 1)))


# --- of Hugging Face ------------------------------------------------------------------------------

_RESNET = {"embedding_size": 4, "num_labels": CLASSES}
_MOBILE = {"tf_padding": True, "num_labels": CLASSES, "min_depth": 2}
_TRANSFORMER = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
_ENCODER = {**_TRANSFORMER, "intermediate_size": 12, "num_labels": CLASSES}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
# Class of the network, class of its configuration, and that configuration.
_CONFIGURED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ResNet18": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            **_RESNET,
            "layer_type": "basic",
            "hidden_sizes": [4, 6, 8, 10],
            "depths": [2, 2, 2, 2],
        },
    ),
    "ResNet50": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {
            **_RESNET,
            "layer_type": "bottleneck",
            "hidden_sizes": [8, 12, 16, 20],
            "depths": [3, 4, 6, 3],
        },
    ),
    "MobileNetV1": (
        "MobileNetV1ForImageClassification",
        "MobileNetV1Config",
        {**_MOBILE, "depth_multiplier": 1 / 16},
    ),
    "MobileNetV2": (
        "MobileNetV2ForImageClassification",
        "MobileNetV2Config",
        {
            **_MOBILE,
            "depth_multiplier": 1 / 8,
            "depth_divisible_by": 2,
            "expand_ratio": 2,
            "finegrained_output": False,
        },
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 2, 1], "num_labels": CLASSES},
    ),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        {**_ENCODER, "image_size": 8, "patch_size": 4},
    ),
    "BERT": (
        "BertForSequenceClassification",
        "BertConfig",
        {**_ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 16},
    ),
    "GPT-2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_SPECIAL, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_inner": 12, "n_positions": 16},
    ),
    "Llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {
            **_SPECIAL,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 24,
            "max_position_embeddings": 16,
        },
    ),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 8,
            "d_kv": 4,
            "d_ff": 12,
            "num_heads": 2,
            "num_layers": 2,
            "decoder_start_token_id": 0,
        },
    ),
}


def _configured(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    network, configuration, sizes = _CONFIGURED[name]
    return getattr(transformers, network)(getattr(transformers, configuration)(**sizes))


# --- all of them ----------------------------------------------------------------------------------

_OWN: dict[str, Callable[[], nn.Module]] = {
    "LeNet-5": LeNet5,
    "VGG16-BN": VGG16,
    "DenseNet40": DenseNet40,
    "UNet": UNet,
}
_INPUTS: dict[str, Callable[[], Example]] = {
    "LeNet-5": lambda: images(28, channels=1),
    "VGG16-BN": lambda: images(32),
    "ResNet18": lambda: images(32),
    "ResNet50": lambda: images(32),
    "MobileNetV1": lambda: (images(32),),
    "MobileNetV2": lambda: {"pixel_values": images(32)},
    "DenseNet40": lambda: images(8),
    "UNet": lambda: images(8),
    "ConvNeXt": lambda: {"pixel_values": images(32)},
    "ViT": lambda: images(8),
    "BERT": lambda: {"input_ids": tokens(6), "attention_mask": torch.ones(2, 6)},
    "GPT-2": lambda: {"input_ids": tokens(6)},
    "Llama": lambda: (tokens(6),),
    "T5": lambda: {"input_ids": tokens(6), "decoder_input_ids": tokens(4)},
}
NETWORKS = tuple(_INPUTS)


def real_network(name: str) -> tuple[nn.Module, Example]:
    """The network, with weights that are always the same, and an example of its inputs."""
    torch.manual_seed(0)
    network = _OWN[name]() if name in _OWN else _configured(name)
    return network, _INPUTS[name]()


def run_network(network: nn.Module, example: Example) -> Tensor:
    """The network's answer: logits, or an image."""
    if isinstance(example, dict):
        output = network(**example)
    else:
        output = network(*(example if isinstance(example, tuple) else (example,)))
    return output if isinstance(output, Tensor) else output.logits
