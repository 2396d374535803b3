"""Networks as other libraries build them: what the table promises is what `slim` takes out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_wgsef import group_parameters
from tests.helpers.removal import removal

IMAGES = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
STEPS = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


class MonaiUnit(nn.Module):
    """A residual unit of monai: InstanceNorm, one slope for all channels, a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.InstanceNorm2d(outputs), nn.PReLU()),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1), nn.InstanceNorm2d(outputs), nn.PReLU()),
        )
        self.residual = nn.Conv2d(inputs, outputs, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x) + self.residual(x)
        return found


class MonaiUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bottom = (
            *(MonaiUnit(1, 4, 2), MonaiUnit(4, 8, 2)),
            MonaiUnit(8, 12),
        )
        self.up = nn.Sequential(
            nn.ConvTranspose2d(20, 4, 3, 2, 1, 1), nn.BatchNorm2d(4), nn.PReLU()
        )
        self.last = nn.ConvTranspose2d(8, 2, 3, 2, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.first(images)
        second = self.second(first)
        joined = torch.cat([second, self.bottom(second)], 1)
        found: Tensor = self.last(torch.cat([first, self.up(joined)], 1))
        return found


class PoolFormer(nn.Module):
    """Pooling in place of attention, a GroupNorm over all channels, scales of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = (
            nn.Conv2d(1, 8, 4, 4),
            nn.GroupNorm(1, 8),
            nn.Linear(8, 3),
        )
        self.mixed, self.scale = nn.GroupNorm(1, 8), nn.Parameter(torch.ones(8))
        self.mlp = nn.Sequential(nn.Conv2d(8, 16, 1), nn.GELU(), nn.Conv2d(16, 8, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images)
        y = self.mixed(x)
        x = x + self.scale[:, None, None] * (F.avg_pool2d(y, 3, 1, 1) - y)
        x = x + self.mlp(x)
        found: Tensor = self.head(self.norm(x).mean((2, 3)))
        return found


class DiffusersBlock(nn.Module):
    """A residual block of diffusers' autoencoders and UNets, with a time if there is one."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.time_emb_proj = nn.Linear(6, outputs)
        self.conv_shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(F.silu(time))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class DiffusersAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads, self.group_norm = 2, nn.GroupNorm(4, 16)
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(16, 16), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        samples, channels, height, width = x.shape
        y = self.group_norm(x.view(samples, channels, -1)).transpose(1, 2)
        heads = [
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.to_q, self.to_k, self.to_v)
        ]
        y = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        y = self.to_out[1](self.to_out[0](y)).transpose(1, 2)
        return x + y.reshape(samples, channels, height, width)


class DiffusionUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Conv2d(1, 8, 3, padding=1), DiffusersAttention()
        self.down, self.middle = DiffusersBlock(8, 16), DiffusersBlock(16, 16)
        self.up, self.last = DiffusersBlock(32, 8), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        down = self.down(self.first(images), time)
        middle = self.attention(self.middle(F.avg_pool2d(down, 2), time))
        joined = torch.cat([F.interpolate(middle, scale_factor=2.0), down], 1)
        found: Tensor = self.last(self.up(joined, time))
        return found


class YoloConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
        self.bn, self.act = nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act(self.bn(self.conv(x)))
        return found


class Yolo(nn.Module):
    """C2f, SPPF and a head of two branches, one of them boxes by their distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.cv1, self.cv2 = YoloConv(1, 8, 3), YoloConv(8, 8), YoloConv(12, 8)
        self.m1, self.m2 = YoloConv(4, 4, 3), YoloConv(4, 4, 3)
        self.reduce, self.pooled = YoloConv(8, 4), YoloConv(16, 8)
        self.boxes = nn.Sequential(YoloConv(8, 6, 3), nn.Conv2d(6, 16, 1))
        self.classes = nn.Sequential(YoloConv(8, 6, 3), nn.Conv2d(6, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        parts = list(self.cv1(self.stem(images)).chunk(2, 1))
        parts.append(parts[-1] + self.m2(self.m1(parts[-1])))
        pools = [self.reduce(self.cv2(torch.cat(parts, 1)))]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        x = self.pooled(torch.cat(pools, 1))
        boxes = self.boxes(x).flatten(2).unflatten(1, (4, 4)).softmax(2)
        steps = torch.arange(4.0, dtype=boxes.dtype).view(1, 1, 4, 1)
        return torch.cat([(boxes * steps).sum(2), self.classes(x).flatten(2)], 1)


NETWORKS = {
    "monai's UNet": (MonaiUNet, IMAGES),
    "PoolFormer": (PoolFormer, IMAGES),
    "a UNet of diffusers": (DiffusionUNet, (IMAGES, torch.ones(2, 6))),
    "YOLO": (Yolo, IMAGES),
}
# Sets and groups of `structure`, all of which can be taken out.
STRUCTURE = {
    "monai's UNet": {"first.conv.0": 4, "first.conv.3": 4, "second.conv.0": 8, "second.conv.3": 8}
    | {"bottom.conv.0": 12, "bottom.conv.3": 12, "up.0": 4},
    "PoolFormer": {"mlp.0": 16},
    "a UNet of diffusers": {"first": 4, "attention.to_out.0": 2, "down.conv1": 4, "middle.conv1": 4}
    | {"up.conv1": 4, "up.conv2": 8},
    "YOLO": {"stem.conv": 8, "cv1.conv": 4, "cv2.conv": 8, "m1.conv": 4, "reduce.conv": 4}
    | {"pooled.conv": 8, "boxes.0.conv": 6, "classes.0.conv": 6},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_structure(name: str) -> None:
    make, example = NETWORKS[name]
    found = removal(make(), example, "structure")
    assert not found.obstacles
    assert {x.name: x.count for x in found.groups.layers} == STRUCTURE[name]


@pytest.mark.parametrize(
    ("name", "grouping"),
    [("monai's UNet", "filter"), ("PoolFormer", "channel"), ("YOLO", "channel")],
)
def test_what_the_table_promises(name: str, grouping: str) -> None:
    make, example = NETWORKS[name]
    found = removal(make(), example, grouping)  # compares
    assert len(found.obstacles) < len(found.groups.layers)
    assert all(
        "grouping='structure'" in why or "side by side" in why or "only go together" in why
        for why in found.obstacles.values()
    ), found.obstacles


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of an image, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return found


class TimmConvNeXt(nn.Module):
    """The last stage of a ConvNeXt of timm: its stream ends in one pixel, which is flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.each = nn.Conv2d(1, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.last, self.head = LayerNorm2d(8), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.down(images)
        inner = self.norm(self.each(x).permute(0, 2, 3, 1))
        x = x + self.fc2(F.gelu(self.fc1(inner))).permute(0, 3, 1, 2)
        found: Tensor = self.head(self.last(F.adaptive_avg_pool2d(x, 1)).flatten(1))
        return found


def test_a_norm_that_moves_the_channels_of_an_image_to_the_end() -> None:
    groups = group_parameters(TimmConvNeXt(), "stream", example_input=IMAGES, include=["down"])
    assert {x.name: x.count for x in groups.layers} == {"down": 8}
    groups = group_parameters(TimmConvNeXt(), "structure", example_input=IMAGES)
    assert groups.left_out["down"].startswith("residual stream of 'down'")
    assert [x.name for x in groups.layers] == ["fc1"]


def test_mamba_loses_what_its_convolution_and_gate_have_in_common() -> None:
    found = removal(Mamba(), STEPS, "structure")
    assert {x.name: x.count for x in found.groups.layers} == {"in_proj": 16}
    assert not found.obstacles
    assert (found.small.in_proj.out_features, found.small.conv.groups) == (16, 8)
    assert "may be moved or mixed by SoftmaxBackward0" in found.groups.left_out["x_proj"]


class GRN(nn.Module):
    """Global response normalisation, as in ConvNeXtV2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(1, 1, 1, 24)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        norm = x.norm(p=2, dim=(1, 2), keepdim=True)
        return self.weight * (x * (norm / norm.mean(-1, keepdim=True))) + self.bias + x


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pwconv1, self.grn, self.pwconv2 = nn.Linear(1, 24), GRN(), nn.Linear(24, 3)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.pwconv2(self.grn(F.gelu(self.pwconv1(images.permute(0, 2, 3, 1)))))
        return found


class Mamba(nn.Module):
    """A gate, a convolution along the steps, and sizes that a split knows."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(5, 32), nn.Linear(16, 5)
        self.conv = nn.Conv1d(16, 16, 4, groups=16, padding=3)
        self.x_proj, self.dt_proj = nn.Linear(16, 10), nn.Linear(2, 16)

    def forward(self, steps: Tensor) -> Tensor:
        x, gate = self.in_proj(steps).chunk(2, -1)
        x = F.silu(self.conv(x.transpose(1, 2))[..., : steps.shape[1]]).transpose(1, 2)
        rate, write, read = self.x_proj(x).split([2, 4, 4], -1)
        mixed = (write[:, :, None] * read[:, None]).sum(-1).softmax(-1) @ x
        found: Tensor = self.out_proj(mixed * F.softplus(self.dt_proj(rate)) * F.silu(gate))
        return found


@pytest.mark.parametrize(
    ("network", "example", "grouping", "name", "reason"),
    [
        (ConvNeXt(), IMAGES, "hidden", "pwconv1", "GRN 'grn', which may not act on every unit"),
        (ConvNeXt(), IMAGES, "structure", "pwconv1", "LinalgVectorNorm, called by a forward, norm"),
    ],
    ids=["hidden of ConvNeXtV2", "structure of ConvNeXtV2"],
)
def test_what_cannot_be_taken_out_says_why(
    network: nn.Module, example: Tensor, grouping: str, name: str, reason: str
) -> None:
    with pytest.raises(ValueError, match=f"{name}: .*{reason}") as error:
        group_parameters(network, grouping, example_input=example)
    assert "head" not in str(error.value)
