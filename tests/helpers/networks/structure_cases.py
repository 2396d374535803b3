"""Networks, example inputs, and the groups that `structure` must find, written by hand."""

import torch
from torch import nn

from tests.helpers.networks.structure import (
    Concatenated,
    ConvNeXt,
    Depthwise,
    Embedded,
    Residual,
    Shared,
    Tie,
    TwoInputs,
    UNet,
    VisionTransformer,
    made,
    own,
    parts,
    read,
    runs,
    weights,
)
from tests.helpers.networks.transformers import given

IMAGE, SIGNAL, VECTOR = given(2, 3, 8, 8), given(2, 3, 8), given(2, 5)
TOKENS = torch.tensor([[3, 7, 1], [0, 8, 7]])
OUTPUTS = "its channels are the network's outputs"


def outputs(count, layer):
    return {layer: Tie(made(own(count), layer), reserved=OUTPUTS)}


def chain(count, layer, reader, *scales):
    """One layer with what scales its channels, and the layer that reads them."""
    return {layer: Tie(made(own(count), layer, *scales), read(own(count), reader))}


def convolutions():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU()),
        *(nn.Conv2d(6, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 1)),
    )


CASES = {  # network, example input, what must be found
    "chain": (
        convolutions,
        IMAGE,
        chain(6, "0", "3", "1") | chain(4, "3", "5") | outputs(2, "5"),
    ),
    "residual": (
        Residual,
        IMAGE,
        {
            "conv": Tie(
                made(own(4), "conv", "norm", "a_norm2") | weights(own(4), "a_conv2"),
                read(own(4), "a_conv1", "b_conv1", "b_shortcut"),
            ),
            "a_conv1": Tie(
                weights(own(6), "a_conv1") | made(own(6), "a_norm1"), read(own(6), "a_conv2")
            ),
            "b_conv1": Tie(
                weights(own(6), "b_conv1") | made(own(6), "b_norm1"), read(own(6), "b_conv2")
            ),
            "b_conv2": Tie(
                weights(own(5), "b_conv2") | made(own(5), "b_norm2", "b_shortcut"),
                read(own(5), "fc"),
            ),
        }
        | outputs(3, "fc"),
    ),
    "depthwise": (
        Depthwise,
        IMAGE,
        {
            "stem": Tie(made(own(4), "stem", "narrow"), read(own(4), "wide", "fc")),
            "wide": Tie(
                weights(own(6), "wide") | made(own(6), "norm1", "each", "norm2"),
                read(own(6), "narrow"),
            ),
        }
        | outputs(2, "fc"),
    ),
    "grouped": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 12, 3, groups=2)),
            *(nn.BatchNorm2d(12), nn.SiLU(), nn.Conv2d(12, 2, 1)),
        ),
        IMAGE,
        {
            "0": Tie(made(parts(4, 2), "0"), read(own(4), "2")),
            "2": Tie(made(parts(6, 2), "2", "3"), read(parts(6, 2), "5")),
        }
        | outputs(2, "5"),
    ),
    "concatenated": (
        Concatenated,
        IMAGE,
        {
            "a": Tie(made(own(4), "a", "norm"), read(own(4), "b", "c")),
            "b": Tie(made(own(3), "b") | made(own(3, 4), "norm"), read(own(3, 4), "c")),
        }
        | outputs(2, "c"),
    ),
    "flattened": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.MaxPool2d(3), nn.Flatten()),
            *(nn.Linear(16, 6), nn.SiLU(), nn.Linear(6, 2)),
        ),
        IMAGE,
        {"0": Tie(made(own(4), "0"), read(runs(4, 4), "4"))} | chain(6, "4", "6") | outputs(2, "6"),
    ),
    "unet": (
        UNet,
        IMAGE,
        {
            "encoder": Tie(
                made(own(4), "encoder"), read(own(4), "bottom") | read(own(4, 6), "decoder")
            ),
            "bottom": Tie(made(own(5), "bottom"), read(own(5), "up", axis=0)),
            "up": Tie(made(own(6), "up", axis=1), read(own(6), "decoder")),
        }
        | chain(4, "decoder", "last")
        | outputs(2, "last"),
    ),
    "shared": (
        Shared,
        IMAGE,
        {"stem": Tie(made(own(4), "stem", "twice"), read(own(4), "twice", "last"))}
        | outputs(2, "last"),
    ),
    "one axis": (
        lambda: nn.Sequential(
            *(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.SiLU(), nn.Conv1d(4, 5, 3)),
            *(nn.SiLU(), nn.Flatten(), nn.Linear(20, 2)),
        ),
        SIGNAL,
        chain(4, "0", "3", "1")
        | {"3": Tie(made(own(5), "3"), read(runs(5, 4), "6"))}
        | outputs(2, "6"),
    ),
    "slopes": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.PReLU(6)),
            nn.Conv2d(6, 2, 3),
        ),
        IMAGE,
        {
            "0": Tie(
                made(own(6), "0", "1") | weights(own(6), "2"),
                read(own(6), "3"),
            )
        }
        | outputs(2, "3"),
    ),
    "layer norm": (
        lambda: nn.Sequential(
            *(nn.Linear(5, 4), nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 6)),
            *(nn.RMSNorm(6), nn.Linear(6, 2)),
        ),
        VECTOR,
        {
            "0": Tie(
                made(own(4), "0", "1"),
                read(own(4), "3"),
                normalised=True,
            ),
            "3": Tie(
                made(own(6), "3") | weights(own(6), "4"),
                read(own(6), "5"),
                normalised=True,
            ),
        }
        | outputs(2, "5"),
    ),
    "group norm": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.GroupNorm(1, 6), nn.SiLU(), nn.Conv2d(6, 4, 3)),
            *(nn.GroupNorm(4, 4), nn.Conv2d(4, 2, 1)),
        ),
        IMAGE,
        {
            "0": Tie(
                made(own(6), "0", "1"),
                read(own(6), "3"),
                normalised=True,
            )
        }
        | chain(4, "3", "5", "4")
        | outputs(2, "5"),
    ),
    "convnext": (
        ConvNeXt,
        IMAGE,
        {
            "patches": Tie(
                made(own(4), "patches", "each", "norm", "narrow") | {"scale": (0, own(4))},
                read(own(4), "wide", "fc"),
                reserved="residual stream of 'patches', 'narrow'",
                normalised=True,
            )
        }
        | chain(6, "wide", "narrow")
        | outputs(3, "fc"),
    ),
    "vision transformer": (
        VisionTransformer,
        IMAGE,
        chain(6, "block.linear1", "block.linear2") | outputs(3, "fc"),
    ),
    "embedded": (
        Embedded,
        TOKENS,
        {
            "narrow": Tie(
                made(own(4), "narrow") | weights(own(4), "tokens", axis=1),
                read(own(4), "wide", "last"),
            )
        }
        | chain(6, "wide", "narrow")
        | outputs(9, "last"),
    ),
    "tied embedding": (
        lambda: Embedded(tied=True),
        TOKENS,
        {
            "narrow": Tie(
                made(own(4), "narrow") | weights(own(4), "tokens", axis=1), read(own(4), "wide")
            )
        }
        | chain(6, "wide", "narrow"),
    ),
    "normalised embedding": (
        lambda: Embedded(norm=nn.RMSNorm(4)),
        TOKENS,
        {
            "narrow": Tie(
                made(own(4), "narrow")
                | weights(own(4), "tokens", axis=1)
                | weights(own(4), "norm"),
                read(own(4), "wide", "last"),
                reserved="residual stream of 'narrow', 'tokens'",
                normalised=True,
            )
        }
        | chain(6, "wide", "narrow")
        | outputs(9, "last"),
    ),
    "two inputs": (
        TwoInputs,
        (IMAGE, VECTOR),
        {"image": Tie(made(own(4), "image", "vector"), read(own(4), "last"))} | outputs(2, "last"),
    ),
}
