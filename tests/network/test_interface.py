"""Which layers read a network's inputs and make its outputs: networks with the answers by hand."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_wgsef import group_parameters
from lightning_wgsef.groupings.registry import find_groups
from lightning_wgsef.network.interface import interface_by_order, network_interface

IMAGE = torch.randn(2, 3, 8, 8)
ROWS = torch.randn(4, 6)


class Net(nn.Module):
    """Layers by name, and a forward pass as a function of the network and its inputs."""

    def __init__(self, run, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = run

    def forward(self, *inputs):
        return self.run(self, *inputs)


def frozen(module):
    return module.requires_grad_(False)


def two_heads():
    net = Net(
        lambda n, x: {"logits": n.logits(h := F.relu(n.body(x))), "boxes": n.boxes(h)},
        body=nn.Linear(6, 8),
        logits=nn.Linear(8, 5),
        boxes=nn.Linear(8, 4),
    )
    return net, ROWS, {"body"}, {"logits", "boxes"}


def mean_shift():
    """EDSR begins with a frozen diagonal convolution, and ends in one."""
    shift, back = frozen(nn.Conv2d(3, 3, 1)), frozen(nn.Conv2d(3, 3, 1))
    for layer in (shift, back):
        layer.weight.data = torch.eye(3)[:, :, None, None]
    net = Net(
        lambda n, x: n.back(n.tail(F.relu(n.head(n.shift(x))))),
        shift=shift,
        head=nn.Conv2d(3, 8, 3),
        tail=nn.Conv2d(8, 3, 3),
        back=back,
    )
    return net, IMAGE, {"shift", "head"}, {"tail", "back"}


def time_first():
    net = Net(
        lambda n, x, t: n.out(F.relu(n.image(x) + n.time(t[:, None].sin())[:, :, None, None])),
        time=nn.Linear(1, 8),
        image=nn.Conv2d(3, 8, 3),
        out=nn.Conv2d(8, 3, 3),
    )
    return net, (IMAGE, torch.tensor([1, 7])), {"time", "image"}, {"out"}


def parallel_stems():
    net = Net(
        lambda n, x: n.out(F.relu(torch.cat([n.wide(x), n.narrow(x), n.side(x)], 1))),
        wide=nn.Conv2d(3, 4, 3, padding=1),
        narrow=nn.Conv2d(3, 4, 1),
        side=nn.Conv2d(3, 2, 1),
        out=nn.Conv2d(10, 5, 1),
    )
    return net, IMAGE, {"wide", "narrow", "side"}, {"out"}


def skip_of_the_input():
    """As in NeRF, the input comes in again halfway."""
    net = Net(
        lambda n, x: n.out(F.relu(n.two(torch.cat([F.relu(n.one(x)), x], 1)))),
        one=nn.Linear(6, 8),
        two=nn.Linear(14, 8),
        out=nn.Linear(8, 2),
    )
    return net, ROWS, {"one", "two"}, {"out"}


def depthwise_first():
    net = Net(
        lambda n, x: n.depthwise_out(F.relu(n.mix(F.relu(n.point(n.depthwise(x)))))),
        depthwise=nn.Conv2d(3, 3, 3, groups=3),
        point=nn.Conv2d(3, 8, 1),
        mix=nn.Conv2d(8, 4, 1),
        depthwise_out=nn.Conv2d(4, 4, 3, groups=4),
    )
    return net, IMAGE, {"depthwise", "point"}, {"mix", "depthwise_out"}


def masks_and_lengths():
    """A mask reaches every feature, and none of it is a feature."""

    def run(n, x, lengths):
        mask = (torch.arange(x.shape[2])[None] < lengths[:, None])[:, None].float()
        return n.three(F.relu(n.two(F.relu(n.one(x)) * mask)) * mask)

    net = Net(run, one=nn.Conv1d(4, 8, 1), two=nn.Conv1d(8, 8, 1), three=nn.Conv1d(8, 3, 1))
    return net, (torch.randn(2, 4, 5), torch.tensor([5, 3])), {"one"}, {"three"}


def embedded_tokens():
    net = Net(
        lambda n, x: n.head(F.relu(n.project(n.embed(x).mean(1)))),
        embed=nn.Embedding(9, 6),
        project=nn.Linear(6, 8),
        head=nn.Linear(8, 2),
    )
    return net, torch.tensor([[1, 2, 3]]), set(), {"head"}


def packed_sequence():
    def run(n, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(n.before(x), lengths, batch_first=True)
        return n.head(n.lstm(packed)[1][0][-1])

    lstm = nn.LSTM(8, 6, batch_first=True)
    net = Net(run, before=nn.Linear(4, 8), lstm=lstm, head=nn.Linear(6, 3))
    return net, (torch.randn(2, 5, 4), torch.tensor([5, 3])), {"before"}, {"head"}


def graph_convolution():
    net = Net(
        lambda n, a, x: a @ n.two(F.relu(a @ n.one(x))), one=nn.Linear(6, 8), two=nn.Linear(8, 3)
    )
    return net, (torch.rand(4, 4), ROWS), {"one"}, {"two"}


def attention_with_a_mask():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    net = Net(
        lambda n, x, m: n.head(n.encoder(n.project(x), src_key_padding_mask=m)),
        project=nn.Linear(6, 8),
        encoder=encoder,
        head=nn.Linear(8, 2),
    )
    inputs = (torch.randn(2, 3, 6), torch.tensor([[False, False, True]] * 2))
    return net, inputs, {"project"}, {"head"}


def residual_outputs():
    """Everything that adds to what is returned makes it."""

    def run(n, x):
        x = n.stem(x)
        return x + n.b(F.relu(n.a(x)))

    net = Net(run, stem=nn.Linear(6, 8), a=nn.Linear(8, 4), b=nn.Linear(4, 8))
    return net, ROWS, {"stem"}, {"stem", "b"}


def perceptual_loss():
    vgg = frozen(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    net = Net(
        lambda n, x: n.vgg(n.decode(F.relu(n.encode(x)))).mean(),
        encode=nn.Conv2d(3, 8, 3, padding=1),
        decode=nn.Conv2d(8, 3, 3, padding=1),
        vgg=vgg,
    )
    return net, IMAGE, {"encode"}, {"decode", "vgg.2"}


def functional_layers():
    net = Net(
        lambda n, x: F.linear(F.relu(F.linear(x, n.one.weight, n.one.bias)), n.two.weight * 2),
        one=nn.Linear(6, 8),
        two=nn.Linear(8, 3, bias=False),
    )
    return net, ROWS, {"one"}, {"two"}


def checkpointed():
    net = Net(
        lambda n, x: n.head(checkpoint(n.body, x, use_reentrant=True)),
        body=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)),
        head=nn.Linear(8, 2),
    )
    return net, ROWS.clone().requires_grad_(), {"body.0"}, {"head"}


def scripted_part():
    body = torch.jit.trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU()), ROWS)
    net = Net(lambda n, x: n.head(n.body(x)), body=body, head=nn.Linear(8, 2))
    return net, ROWS, set(), {"head"}


def written_in_place():
    def run(n, x):
        both = x.new_zeros(len(x), 14)
        both[:, :6] = x
        both[:, 6:].copy_(n.one(x))
        return n.two(both)

    return Net(run, one=nn.Linear(6, 8), two=nn.Linear(14, 3)), ROWS, {"one", "two"}, {"two"}


def discriminator_beside():
    net = Net(
        lambda n, z: n.G(z),
        G=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)),
        D=nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 1)),
    )
    return net, ROWS, {"G.0", "D.0"}, {"G.2", "D.3"}


NETWORKS = [
    two_heads,
    mean_shift,
    time_first,
    parallel_stems,
    skip_of_the_input,
    depthwise_first,
    masks_and_lengths,
    embedded_tokens,
    packed_sequence,
    graph_convolution,
    attention_with_a_mask,
    residual_outputs,
    perceptual_loss,
    functional_layers,
    checkpointed,
    pytest.param(
        scripted_part, marks=pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    ),
    written_in_place,
    discriminator_beside,
]


@pytest.mark.parametrize("make", NETWORKS)
def test_what_reads_inputs_and_makes_outputs(make):
    net, example, inputs, outputs = make()
    before = copy.deepcopy(net.state_dict()) if make is not scripted_part else {}
    found = network_interface(net.train(), example)
    assert (set(found.inputs), set(found.outputs), found.unseen) == (inputs, outputs, "")
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("grouping", ["channel", "filter"])
def test_ends_are_not_grouped(make, grouping):
    net, example, inputs, outputs = make()
    groups = find_groups(net, grouping, example)
    ends = inputs if grouping == "channel" else outputs
    reserved = {x.name for x in groups.layers if x.reserved and "depthwise" not in x.reserved}
    assert reserved == ends


def test_an_end_can_be_included_by_name():
    net, example, _, _ = two_heads()
    groups = group_parameters(net, "filter", example_input=example, include=["boxes"])
    assert [layer.name for layer in groups.layers] == ["boxes"]


def test_the_array_of_the_module_is_run():
    net, example, _, _ = two_heads()
    net.example_input_array = example
    assert list(network_interface(net, None).outputs) == ["logits", "boxes"]


# --- by order of definition -----------------------------------------------------------------------


def test_a_frozen_teacher_is_not_the_network():
    def make():
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    net = nn.ModuleDict({"teacher": frozen(make()), "student": make(), "ema": frozen(make())})
    found = interface_by_order(net)
    assert set(found.inputs) == {"teacher.0", "student.0"}
    assert set(found.outputs) == {"ema.2", "student.2"}


def test_a_head_behind_a_frozen_backbone_reads_features():
    net = nn.Sequential(frozen(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 4, 3))
    assert set(interface_by_order(net).inputs) == {"0"}


@pytest.mark.parametrize("grouping", ["channel", "filter"])
def test_a_second_candidate_is_named(grouping):
    net, _, _, _ = two_heads() if grouping == "filter" else time_first()
    other = "logits" if grouping == "filter" else "image"
    with pytest.warns(UserWarning, match=f"others may, too: '{other}'.*example_input"):
        group_parameters(net, grouping)


@pytest.mark.parametrize("grouping", ["channel", "filter"])
def test_a_plain_chain_needs_no_words(grouping):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 5)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(group_parameters(net, grouping).layers) > 1


def test_an_excluded_candidate_needs_no_words():
    net, _, _, _ = two_heads()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = group_parameters(net, "filter", exclude="logits")
    assert "logits" not in [layer.name for layer in groups.layers]


def test_an_example_that_does_not_run_is_said():
    net, _, _, _ = two_heads()
    with pytest.warns(UserWarning, match="Net does not run on it: RuntimeError.*'logits'"):
        group_parameters(net, "filter", example_input=torch.ones(1, 7))


def test_the_array_of_the_module_is_run_in_its_precision():
    net, example, _, outputs = two_heads()
    net.double().example_input_array = example
    assert set(network_interface(net, None).outputs) == outputs
