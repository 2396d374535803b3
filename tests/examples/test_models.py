"""The networks of the examples: sizes, shapes, training, groups, and what `slim` makes of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import BinaryJaccardIndex

from examples.data.batches import Batches
from examples.data.modules import FashionMNIST
from examples.models.densenet import DenseNet40
from examples.models.mobilenet import MobileNetV1
from examples.models.resnet import CifarResNet, ResNet18
from examples.models.unet import Segmenter, UNet
from examples.models.vgg import VGG
from examples.models.vit import VisionTransformer
from lightning_wgsef import group_parameters, slim

# pytorch-lightning 2.6 under torch 2.13, in every fit

HEADS_AND_UNITS = {"*attention*": "head", "*mlp*": "hidden"}


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: VGG(16), 15_253_578),
        (lambda: VGG(19), 20_565_834),
        (lambda: VGG(16, batch_norm=False), 15_245_130),
        (lambda: VGG(16, batch_norm=False).features, 14_714_688),  # that of ImageNet
        (lambda: VGG(19, batch_norm=False).features, 20_024_384),  # that of ImageNet
        (ResNet18, 11_173_962),
        (lambda: CifarResNet(20), 272_474),
        (lambda: CifarResNet(56), 855_770),
        (MobileNetV1, 3_217_226),
        (lambda: MobileNetV1(classes=1000), 4_231_976),  # that of ImageNet
        (DenseNet40, 1_019_722),
        (VisionTransformer, 207_946),
        (UNet, 117_073),
    ],
)
def test_numbers_of_weights(make: Callable[[], nn.Module], expected: int) -> None:
    with torch.device("meta"):
        assert count(make()) == expected


@pytest.mark.parametrize(("depth", "published"), [(20, 269_722), (56, 853_018)])
def test_only_projections_are_added_to_the_published_residual_networks(
    depth: int, published: int
) -> None:
    with torch.device("meta"):
        network = CifarResNet(depth)
        assert count(network) - sum(count(block.shortcut) for block in network.blocks) == published


@pytest.mark.parametrize(
    ("make", "millions"),  # of multiplications for an image of 32 x 32, as others counted them
    [
        (lambda: VGG(16), 313.73),
        (ResNet18, 555.42),
        (lambda: CifarResNet(20), 40.81),
        (lambda: CifarResNet(56), 125.75),
        (MobileNetV1, 46.35),
        (DenseNet40, 264.81),
    ],
)
def test_images_shrink_where_they_should(make: Callable[[], nn.Module], millions: float) -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        make()(torch.empty(1, 3, 32, 32))
    assert counter.get_total_flops() / 2e6 == pytest.approx(millions, abs=0.005)


SMALL: dict[str, Callable[[int, int], nn.Module]] = {
    "VGG16-BN": lambda _, channels: VGG(16, channels, width=1 / 16),
    "VGG19": lambda _, channels: VGG(19, channels, batch_norm=False, width=1 / 8),
    "ResNet20": lambda _, channels: CifarResNet(20, channels, width=4),
    "MobileNetV1": lambda _, channels: MobileNetV1(channels, width=1 / 8),
    "DenseNet40": lambda _, channels: DenseNet40(channels, growth=4),
    "ViT": lambda size, channels: VisionTransformer(size, channels, width=16, depth=2),
    "UNet": lambda _, channels: UNet(channels, width=4),
}
CASES = [
    *[
        (name, "structure", sets)
        for name, sets in zip(SMALL, (15, 18, 12, 14, 39, 2, 12), strict=True)
    ],
    ("ViT", "head", 2),
    ("ViT", "hidden", 2),
    ("ViT", HEADS_AND_UNITS, 4),
]


def images(n: int, size: int, channels: int) -> Tensor:
    """Coarse patterns: the mean of fine noise hardly differs between images."""
    generator = torch.Generator().manual_seed(1)
    return interpolate(torch.randn(n, channels, 4, 4, generator=generator), size, mode="bilinear")


def small(name: str, size: int, channels: int) -> nn.Module:
    torch.manual_seed(0)
    network = SMALL[name](size, channels)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # statistics of all images that were seen
    return network


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3)])
def test_logits_of_grey_and_colour_images(name: str, size: int, channels: int) -> None:
    logits = small(name, size, channels)(images(2, size, channels))
    assert logits.shape == ((2, 1, size, size) if name == "UNet" else (2, 10))
    assert not torch.equal(logits[0], logits[1])


def loss_of(network: nn.Module) -> Tensor:
    shown = images(8, 28, 1)
    logits = network(shown)
    if logits.dim() == 4:
        return binary_cross_entropy_with_logits(logits, (shown > 0).float())
    return cross_entropy(logits, torch.arange(8))


@pytest.mark.parametrize("name", SMALL)
def test_a_step_against_the_gradient_lowers_the_loss_as_it_predicts(name: str) -> None:
    network = small(name, 28, 1)
    before = loss_of(network)
    gradient = torch.autograd.grad(before, list(network.parameters()))
    assert all(part.any() for part in gradient if part.dim() > 1)
    square = sum(part.square().sum() for part in gradient)
    predicted = 0.001 * before
    with torch.no_grad():
        for parameter, part in zip(network.parameters(), gradient, strict=True):
            parameter -= predicted / square * part
    assert 0.5 * predicted < before - loss_of(network) < 1.5 * predicted


def half_zero(name: str, grouping: object) -> tuple[nn.Module, list[int]]:
    """A network with half of the groups of every set at zero, and how many groups there were."""
    network = small(name, 28, 1)
    groups = group_parameters(network, grouping, 0.5, example_input=images(2, 28, 1))
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randperm(count, generator=generator) >= count // 2 for count in groups.counts]
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:  # biases and norms are not all alike
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            else:  # what goes through half of the groups does not fade
                parameter *= 2**0.5
        groups.scale_(torch.cat(factors).float())
        network(images(8, 28, 1))  # BatchNorm has seen images
    return network, groups.counts


def answers(network: nn.Module, training: bool) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(network).train(training)(images(4, 28, 1))


def apart(one: Tensor, other: Tensor) -> float:
    """Largest difference, in units of how much the answers to different images differ."""
    return float((one - other).abs().max() / one.std(0).max())


@pytest.mark.parametrize(("name", "grouping", "sets"), CASES)
def test_half_of_every_set_can_go(name: str, grouping: object, sets: int) -> None:
    network, counts = half_zero(name, grouping)
    assert len(counts) == sets
    slimmed = slim(network, images(2, 28, 1))
    left = group_parameters(slimmed, grouping, 1.0, example_input=images(2, 28, 1))
    assert left.counts == [count - count // 2 for count in counts]
    assert bool(left.alive().all())
    without_one = copy.deepcopy(slimmed)
    removed = torch.ones(len(left))
    removed[-1] = 0
    group_parameters(without_one, grouping, 1.0, example_input=images(2, 28, 1)).scale_(removed)
    for training in (False, True):
        expected = answers(network, training)
        assert apart(expected, answers(slimmed, training)) < 1e-4
        assert apart(expected, answers(without_one, training)) > 1e-2


def test_zero_channels_of_the_vision_transformer_may_go() -> None:
    network, counts = half_zero("ViT", "channel")
    assert len(counts) == 13
    slimmed = slim(network, images(2, 28, 1))
    assert count(slimmed) < count(network)
    for training in (False, True):
        assert apart(answers(network, training), answers(slimmed, training)) < 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VGG(11), "depth must be 16 or 19, got 11"),
        (lambda: CifarResNet(18), "depth must be 6 n"),
        (lambda: CifarResNet(2), "depth must be 6 n"),
        (lambda: VisionTransformer(30), "size must be a multiple of 4, got 30"),
        (lambda: VisionTransformer(heads=5), "width must be a multiple of heads = 5, got 64"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- segmentation ------------------------------------------------------------------------------


def quiet_trainer(**arguments: object) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def test_the_target_is_where_the_clean_image_is_above_a_tenth_of_white() -> None:
    clean = torch.arange(256) / 255
    normal = (clean - FashionMNIST.mean[0]) / FashionMNIST.std[0]
    assert torch.equal(Segmenter(UNet(width=2)).target(normal), torch.arange(256) >= 26)


class Constant(nn.Module):
    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, shown: Tensor) -> Tensor:
        return torch.full_like(shown, self.logit)


class Threshold(nn.Module):
    """Marks what is above the threshold of the target, in what is shown."""

    def forward(self, shown: Tensor) -> Tensor:
        return shown - (0.1 - 0.2860) / 0.3530


@pytest.mark.parametrize("validate", [False, True])
def test_intersection_over_union_counts_the_pixels_of_the_whole_set(validate: bool) -> None:
    shown = images(6, 8, 1)
    shown[:2] += 3
    trainer, name = quiet_trainer(), "val/iou" if validate else "test/iou"

    def iou(network: nn.Module, noise: float) -> float:
        run = trainer.validate if validate else trainer.test
        batches = Batches(shown, torch.zeros(6), 4)
        (metrics,) = run(Segmenter(network, noise=noise), batches, verbose=False)
        return metrics[name]

    garment = shown > (0.1 - 0.2860) / 0.3530
    assert iou(Threshold(), 0.0) == 1
    assert iou(Constant(-1.0), 0.0) == 0
    # A logit between 0 and 1 is no probability.
    assert iou(Constant(0.3), 0.0) == pytest.approx(float(garment.float().mean()))
    noisy = iou(Threshold(), 1.0)
    assert 0.2 < noisy < 0.9
    assert iou(Threshold(), 1.0) == noisy  # the noise of every evaluation is the same


def test_the_unet_learns_to_find_garments(fashion_mnist: Path) -> None:
    data = FashionMNIST(fashion_mnist, batch_size=32)
    data.setup()
    pl.seed_everything(0)
    model = Segmenter(UNet(width=8), lr=0.01)
    trainer = quiet_trainer(
        max_epochs=1, limit_train_batches=40, limit_val_batches=0, limit_test_batches=1
    )

    def iou() -> float:
        return trainer.test(model, data, verbose=False)[0]["test/iou"]

    before = iou()
    trainer.fit(model, data)
    shown = data.test_set[0][:500]
    noisy = shown + torch.randn(shown.shape, generator=torch.Generator().manual_seed(0))
    thresholds = [
        BinaryJaccardIndex()((noisy > cut).int(), model.target(shown).int())
        for cut in torch.linspace(-1, 1, 21)
    ]
    assert iou() > max(before, *map(float, thresholds)) + 0.1
