"""`layer`: which blocks are residual branches, and that a network without one is less deep."""

import copy

import pytest
import torch
from torch import nn

from lightning_wgsef import WGSEF, Homotopy, group_parameters
from lightning_wgsef.network.residual import residual_blocks


class Block(nn.Module):
    """relu(x + f(x)), as in a ResNet; with a shortcut of its own where the shape changes."""

    def __init__(self, inputs, outputs, affine=True):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(outputs, affine=affine)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(self.shortcut(x) + out)


class Network(nn.Module):
    """A stem, five blocks, of which three are residual branches, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 16), Block(16, 16), Block(16, 16))
        self.plain = Block(16, 16, affine=False)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(self.plain(self.blocks(x)).mean((2, 3)))


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def perturbed(model):
    torch.manual_seed(1)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
    return model


def test_blocks_of_a_residual_network():
    model = perturbed(Network())
    before = copy.deepcopy(model.state_dict())
    assert residual_blocks(model, IMAGES) == ["blocks.0", "blocks.2", "blocks.3"]
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Bottleneck(nn.Module):
    """One channel inside, which the ReLU before it has silenced: zeros come in and zeros go out."""

    def __init__(self, width):
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(width, 1, 1), nn.ReLU6())
        self.inner = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(1, width, 1))
        nn.init.constant_(self.narrow[0].weight, -100.0)

    def forward(self, x):
        return nn.functional.relu6(x + self.wide(self.inner(self.narrow(x))))


@pytest.mark.parametrize("example", [torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), IMAGES])
def test_a_layer_that_makes_zeros_of_zeros_hands_nothing_on(example):
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU6(), Bottleneck(5), Bottleneck(5))
    nn.init.ones_(model[0].weight)
    assert residual_blocks(model, example) == ["2", "3"]


def test_groups_hold_all_of_a_block_and_nothing_else():
    model = perturbed(Network())
    groups = group_parameters(model, "layer", k=2, example_input=IMAGES)
    assert [(x.name, x.count, x.removable) for x in groups.layers] == [("branches", 3, True)]
    assert set(groups.left_out) == {
        "stem",
        "head",
        *(f"blocks.1.{x}" for x in ("conv1", "conv2", "shortcut")),
        *(f"plain.{x}" for x in ("conv1", "conv2")),
    }
    blocks = [model.blocks[i] for i in (0, 2, 3)]
    for number, block in enumerate(blocks):
        wanted = torch.cat([p.detach().flatten() for p in block.parameters()]).norm()
        assert groups.norms()[number].item() == pytest.approx(wanted.item(), rel=1e-6)
    untouched = copy.deepcopy(model.state_dict())
    groups.scale_(torch.tensor([1.0, 0.0, 1.0]))
    changed = {n for n, v in model.named_parameters() if not torch.equal(v, untouched[n])}
    assert changed <= {f"blocks.2.{n}" for n, _ in model.blocks[2].named_parameters()}
    assert not any(p.any() for p in model.blocks[2].parameters())


def test_a_zero_block_can_be_left_out():
    model = perturbed(Network()).eval()
    groups = group_parameters(model, "layer", k=2, example_input=IMAGES)
    groups.scale_(torch.tensor([1.0, 1.0, 0.0]))
    shallow = copy.deepcopy(model)
    shallow.blocks[3] = nn.Identity()
    torch.testing.assert_close(model(IMAGES), shallow(IMAGES), rtol=0, atol=1e-6)


def test_training_ends_with_k_branches():
    torch.manual_seed(0)
    model = Network()  # the running mean of its norms is 0: `plain` must not be taken in by that
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    regularizer = WGSEF(
        model, k=1, grouping="layer", example_input=IMAGES, lam=Homotopy(length=20), weights="size"
    ).attach(optimizer)
    for _ in range(25):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()
    assert regularizer.frozen
    assert regularizer.masks["branches"].sum() == 1
    zero = [not any(p.any() for p in model.blocks[i].parameters()) for i in (0, 2, 3)]
    assert zero == (~regularizer.masks["branches"]).tolist()


def test_transformer_layers():
    """Before the norm they are residual; with the norm at their end they are not."""
    for norm_first, wanted in ((True, ["layers.0", "layers.1"]), (False, [])):
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=norm_first)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        assert residual_blocks(encoder, torch.randn(2, 5, 16)) == wanted


def test_shared_weights_are_no_branch():
    model = nn.Sequential(Block(4, 4), Block(4, 4))
    model[1].conv1.weight = model[0].conv1.weight
    assert residual_blocks(model, torch.randn(1, 4, 5, 5)) == []


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match=r"grouping='layer' follows a forward pass and needs an"):
        group_parameters(Network(), "layer")
    with pytest.raises(
        ValueError, match=r"has no layer that grouping='layer' can group\n  0: it b"
    ):
        group_parameters(nn.Sequential(nn.Linear(2, 2)), "layer", example_input=torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"example_input must be what Network takes.*\(1, 2\)"):
        group_parameters(Network(), "layer", example_input=torch.ones(1, 2))


class Cached(nn.Module):
    """Attention that writes its keys into a cache, whose length its mask must have."""

    def __init__(self):
        super().__init__()
        self.keys, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, stream, mask, cache):
        cache.append(self.keys(stream))
        keys = torch.cat(cache, 1)
        looks = (stream @ keys.transpose(1, 2) + mask).softmax(-1)
        return stream + self.out(looks @ keys)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Cached() for _ in range(3))

    def forward(self, stream):
        mask = torch.full((stream.shape[1],) * 2, -torch.inf).triu(1)
        for block in self.blocks:
            stream = block(stream, mask, [])
        return stream


def test_blocks_that_write_into_a_cache():
    groups = group_parameters(Decoder(), "layer", 2, example_input=torch.randn(2, 6, 4))
    assert groups.layers[0].count == 3
