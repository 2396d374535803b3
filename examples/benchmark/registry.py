"""Networks and data sets by the names that suites use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from examples.data.modules import CIFAR10, CIFAR100, Digits, FashionMNIST, InMemory
from examples.models.densenet import DenseNet40
from examples.models.lenet import FiveLayerBatchNorm, LeNet5, LeNet5BatchNorm, SmallConvNet
from examples.models.mobilenet import MobileNetV1
from examples.models.resnet import CifarResNet, ResNet18
from examples.models.vgg import VGG
from examples.models.vit import VisionTransformer

NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "small-conv": SmallConvNet,
    "lenet5": LeNet5,
    "lenet5-batchnorm": LeNet5BatchNorm,
    "five-layer-batchnorm": FiveLayerBatchNorm,
    "vgg": VGG,
    "resnet18": ResNet18,
    "cifar-resnet": CifarResNet,
    "mobilenet": MobileNetV1,
    "densenet40": DenseNet40,
    "vit": VisionTransformer,
}
# From the folder that holds everybody's data, the size of a batch, and the device.
DATA: dict[str, Callable[[Path, int, str], InMemory]] = {
    "digits": lambda folder, size, device: Digits(size, device=device),
    "fashion-mnist": lambda folder, size, device: FashionMNIST(
        folder / "fashion-mnist", size, device=device
    ),
    "cifar10": lambda folder, size, device: CIFAR10(folder, size, device=device),
    "cifar100": lambda folder, size, device: CIFAR100(folder, size, device=device),
}
