"""Masks: taken from zeros and from checkpoints, applied, and when they count as settled."""

import copy
import os
import pickle
import warnings
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from test_groups import refused
from torch import nn

from lightning_wgsef import GroupedLayer, Groups, Member, group_parameters, masks_from_zeros
from lightning_wgsef.groupings.registry import GROUPINGS
from lightning_wgsef.masks import Convergence, apply_masks, clear_moments, masks_from_checkpoint


def network(seed=0):
    """Layers conv1, norm1, conv2 and fc; no weight is zero."""
    torch.manual_seed(seed)
    modules = OrderedDict(
        conv1=nn.Conv2d(2, 6, 3),
        norm1=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 4, 3),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        fc=nn.Linear(4, 3),
    )
    model = nn.Sequential(modules)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(0.1, 1).mul_(torch.randint(2, parameter.shape) * 2 - 1)
    return model


def pruned():
    """Channels 1 and 4 of conv2 and channel 0 of fc are zero."""
    model = network()
    with torch.no_grad():
        model.conv2.weight[:, [1, 4]] = 0
        model.fc.weight[:, 0] = 0
    return model


PRUNED = {
    "conv2": [True, False, True, True, False, True],
    "fc": [False, True, True, True],
}


def lists(masks):
    assert all(mask.dtype == torch.bool for mask in masks.values())
    return {name: mask.tolist() for name, mask in masks.items()}


def kept(groups, *dead):
    """Masks in which the groups with these numbers, over all layers, are dead."""
    alive = torch.ones(len(groups), dtype=torch.bool)
    alive[list(dead)] = False
    return groups.split(alive)


# --- masks from zeros --------------------------------------------------------------------------


def test_masks_of_the_model():
    assert lists(masks_from_zeros(group_parameters(pruned()))) == PRUNED


def test_masks_of_filters_need_zeros_in_all_members():
    model = network()
    with torch.no_grad():
        for parameter in (*model.conv1.parameters(), *model.norm1.parameters()):
            parameter[[2, 3]] = 0
        model.norm1.bias[3] = 0.5  # filter 3 gives a constant: it is alive
    masks = masks_from_zeros(group_parameters(model, "filter", include="conv1"))
    assert lists(masks) == {"conv1": [True, True, False, True, True, True]}


def test_masks_of_elements():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.data = torch.tensor([[0.0, 1.0], [-1.0, -0.0]])
    assert lists(masks_from_zeros(group_parameters(model, "element"))) == {
        "0": [False, True, True, False]
    }


def test_masks_of_other_weights():
    """Of a state_dict, not of the model, which stays as it is."""
    model = network(seed=1)
    before = copy.deepcopy(model.state_dict())
    masks = masks_from_zeros(group_parameters(model), pruned().state_dict())
    assert lists(masks) == PRUNED
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_names_in_a_state_dict_may_have_prefixes():
    groups = group_parameters(network())
    renamed = {f"_orig_mod.{name}": tensor for name, tensor in pruned().state_dict().items()}
    assert lists(masks_from_zeros(groups, renamed)) == PRUNED


def test_a_state_dict_may_have_more_and_other_types():
    groups = group_parameters(network())
    state = {name: tensor.to(torch.bfloat16) for name, tensor in pruned().state_dict().items()}
    state["optimizer.step"] = torch.tensor(3)
    assert lists(masks_from_zeros(groups, state)) == PRUNED


def test_no_zero_group():
    for model, grouping in ((network(), "channel"), (pruned(), "filter")):
        groups = group_parameters(model, grouping)
        with refused("no group is zero", groups.layers[0].name, groups.layers[1].name):
            masks_from_zeros(groups)


def test_a_weight_is_missing():
    state = pruned().state_dict()
    del state["fc.weight"]
    with refused("no weight 'fc.weight'", "another model"):
        masks_from_zeros(group_parameters(network()), state)


@pytest.mark.parametrize("shape", [(4, 6, 1, 1), (6, 4, 3, 3), (216,), ()])
def test_a_weight_of_another_shape(shape):
    state = pruned().state_dict()
    state["conv2.weight"] = torch.zeros(shape)
    with refused("'conv2.weight'", str(shape), "(4, 6, 3, 3)", "another model"):
        masks_from_zeros(group_parameters(network()), state)


@pytest.mark.parametrize("tiny", [1e-18, 1e-25, 1e-40])
def test_a_small_group_is_not_zero(tiny):
    """Dead is "all its weights are zero", also where their squares vanish in float32."""
    model = pruned()
    model.conv2.weight.data[:, 2] = tiny
    masks = masks_from_zeros(group_parameters(model))
    assert lists(masks) == PRUNED


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_group_is_not_zero(value):
    """A mask over it would hide the NaN behind a zero."""
    model = pruned()
    model.conv2.weight.data[0, 2] = value
    assert lists(masks_from_zeros(group_parameters(model))) == PRUNED


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_a_model_that_is_one_layer(grouping):
    model = nn.Linear(3, 2)
    model.weight.data.zero_()
    model.bias.data.zero_()
    groups = group_parameters(model, grouping, include="")
    masks = masks_from_zeros(groups, model.state_dict())
    assert not any(mask.any() for mask in masks.values())


# --- masks from checkpoints --------------------------------------------------------------------


@pytest.fixture
def groups():
    return group_parameters(network(seed=1))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_plain_state_dict(groups, tmp_path, kind):
    torch.save(pruned().state_dict(), tmp_path / "weights.pt")
    assert lists(masks_from_checkpoint(groups, kind(tmp_path / "weights.pt"))) == PRUNED


def test_an_old_file_format(groups, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(pruned().state_dict(), path, _use_new_zipfile_serialization=False)
    assert lists(masks_from_checkpoint(groups, path)) == PRUNED


def test_a_checkpoint_of_lightning(groups, tmp_path):
    optimizer = torch.optim.Adam(network().parameters())
    content = {
        "epoch": 3,
        "global_step": 120,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": pruned().state_dict(),
        "callbacks": {"WGSEFCallback": {"attachments": []}},
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save(content, tmp_path / "last.ckpt")
    assert lists(masks_from_checkpoint(groups, tmp_path / "last.ckpt")) == PRUNED


def test_a_missing_file(groups, tmp_path):
    with refused("masks:", "no-such.ckpt", "cannot be read"):
        masks_from_checkpoint(groups, tmp_path / "no-such.ckpt")


def test_a_folder(groups, tmp_path):
    with refused("masks:", str(tmp_path), "cannot be read"):
        masks_from_checkpoint(groups, tmp_path)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
def test_a_truncated_file(groups, tmp_path, new, share):
    path = tmp_path / "cut.ckpt"
    torch.save(pruned().state_dict(), path, _use_new_zipfile_serialization=new)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with refused("masks:", "cut.ckpt", "cannot be read"):
        masks_from_checkpoint(groups, path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"hello world\n",
        b"import torch\n",
        b"<html></html>",
        b"version https://git-lfs.github.com/spec/v1\nsize 12\n",
        b"PK\x03\x04",
        b"\x89PNG\r\n\x1a\n",
        b"\x80\x02}",
    ],
)
def test_a_file_of_something_else(groups, tmp_path, content):
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with refused("masks:", "other.ckpt", "cannot be read"):
        masks_from_checkpoint(groups, path)


@pytest.mark.parametrize("content", [[1, 2], 3, torch.ones(3), None, "weights"], ids=str)
def test_a_file_without_a_state_dict(groups, tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with refused("masks:", "other.pt", type(content).__name__, "no state_dict"):
        masks_from_checkpoint(groups, path)
    torch.save({"state_dict": content}, path)
    with refused("masks:", "other.pt", "no state_dict"):
        masks_from_checkpoint(groups, path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {0: torch.ones(3)},
        {"conv2.weight": [1.0, 2.0], "fc.weight": 3},
        {"state_dict": {("conv2", "weight"): torch.ones(3)}},
        torch.optim.SGD([nn.Parameter(torch.ones(2))]).state_dict(),
    ],
    ids=["empty", "numbered", "no tensors", "tuples", "an optimizer's"],
)
def test_a_dictionary_of_something_else(groups, tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with refused("conv2.weight"):
        masks_from_checkpoint(groups, tmp_path / "other.pt")


def test_a_checkpoint_of_another_model(groups, tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save(nn.Sequential(nn.Linear(2, 3)).state_dict(), path)
    with refused("no weight 'conv2.weight'", "another model"):
        masks_from_checkpoint(groups, path)
    wider = pruned()
    wider.conv2 = nn.Conv2d(6, 5, 3)
    torch.save({"state_dict": wider.state_dict()}, path)
    with refused("'conv2.weight'", "(5, 6, 3, 3)", "(4, 6, 3, 3)", "another model"):
        masks_from_checkpoint(groups, path)


def test_a_checkpoint_that_is_not_pruned(groups, tmp_path):
    torch.save({"state_dict": network().state_dict()}, tmp_path / "dense.ckpt")
    with refused("no group is zero", "conv2, fc"):
        masks_from_checkpoint(groups, tmp_path / "dense.ckpt")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
def test_a_checkpoint_for_a_model_on_an_accelerator(tmp_path):
    torch.save({"state_dict": pruned().state_dict()}, tmp_path / "last.ckpt")
    model = network(seed=1).cuda()
    groups = group_parameters(model)
    masks = masks_from_checkpoint(groups, tmp_path / "last.ckpt")
    assert lists(masks) == PRUNED
    apply_masks(groups, masks)
    assert lists(masks_from_zeros(groups)) == PRUNED


class Malicious:
    """Unpickling it makes a folder; it could do anything."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("how", ["torch", "old torch", "pickle"])
def test_a_malicious_file_is_refused_and_not_executed(groups, tmp_path, how):
    path, harm = tmp_path / "bad.ckpt", tmp_path / "harm"
    content = {"state_dict": pruned().state_dict(), "callbacks": Malicious(harm)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    with refused("masks:", "bad.ckpt", "cannot be read"):
        masks_from_checkpoint(groups, path)
    assert not harm.exists()
    if how == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert harm.exists()  # the file is as bad as it is said to be


def test_the_model_is_not_touched(tmp_path):
    model = network(seed=1)
    before = copy.deepcopy(model.state_dict())
    torch.save(pruned().state_dict(), tmp_path / "weights.pt")
    masks_from_checkpoint(group_parameters(model), tmp_path / "weights.pt")
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


# --- applying masks ----------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_dead_is_plus_zero_and_alive_is_untouched(grouping):
    model = network()
    groups = group_parameters(model, grouping)
    dead = [0, 2, len(groups) - 1]
    scaled = copy.deepcopy(model)
    factors = torch.ones(len(groups))
    factors[dead] = 0
    group_parameters(scaled, grouping).scale_(factors)
    apply_masks(groups, kept(groups, *dead))
    assert (groups.norms() == 0).nonzero().flatten().tolist() == dead
    for got, want in zip(model.parameters(), scaled.parameters(), strict=True):
        assert torch.equal(got, want)  # -0.0 == 0.0
        assert not got[got == 0].signbit().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -0.0, -1.0])
def test_anything_becomes_plus_zero(value):
    model = network()
    groups = group_parameters(model)
    model.conv2.weight.data[:, 1] = value
    masks = kept(groups, 1)
    for _ in range(2):  # once more changes nothing
        apply_masks(groups, masks)
        dead = model.conv2.weight.detach()[:, 1]
        assert dead.count_nonzero() == 0
        assert not dead.signbit().any()
    assert model(torch.ones(1, 2, 8, 8)).isfinite().all()


def test_all_or_none_may_be_dead():
    model = network()
    groups = group_parameters(model)
    before = model.conv2.weight.detach().clone()
    apply_masks(groups, kept(groups))
    assert torch.equal(model.conv2.weight, before)
    apply_masks(groups, kept(groups, *range(len(groups))))
    assert groups.norms().count_nonzero() == 0


def test_what_is_in_no_group_is_left_alone():
    weight = nn.Parameter(torch.tensor([1.0, float("nan"), -3.0, -0.0]))
    member = Member("w", weight, (0,), torch.tensor([0, -1, 1, -1]))
    groups = Groups([GroupedLayer("a", "mine", 2, (member,))])
    apply_masks(groups, {"a": torch.tensor([False, False])})
    assert weight.isnan().tolist() == [False, True, False, False]
    assert weight.signbit().tolist() == [False, weight[1].signbit().item(), False, True]
    assert weight[[0, 2]].tolist() == [0, 0]


def test_masks_edit_in_place():
    model = network()
    groups = group_parameters(model)
    weight = model.conv2.weight
    model(torch.ones(1, 2, 8, 8)).sum().backward()
    address, gradient = weight.data_ptr(), weight.grad.clone()
    apply_masks(groups, kept(groups, 0))
    assert model.conv2.weight is weight
    assert weight.data_ptr() == address
    assert weight.requires_grad
    assert torch.equal(weight.grad, gradient)


# --- moments -----------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), {"momentum_buffer"}),
    "Adam": (lambda p: torch.optim.Adam(p, 0.1), {"exp_avg", "exp_avg_sq"}),
    "AdamW": (
        lambda p: torch.optim.AdamW(p, 0.1, amsgrad=True),
        {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    ),
    "RMSprop": (
        lambda p: torch.optim.RMSprop(p, 0.1, centered=True, momentum=0.9),
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 2, 8, 8)).square().mean().backward()
        optimizer.step()


@every_optimizer
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_clear_moments(name, grouping):
    make, moments = OPTIMIZERS[name]
    model = network()
    optimizer = make(model.parameters())
    train(model, optimizer)
    groups = group_parameters(model, grouping)
    masks = kept(groups, 0, 2, len(groups) - 1)
    before = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
    weights = copy.deepcopy(model.state_dict())
    clear_moments(groups, masks, optimizer)

    dead = {id(p): torch.zeros(p.shape, dtype=torch.bool) for p in model.parameters()}
    for layer in groups.layers:
        for member in layer.members:
            dead[id(member.parameter)] |= ~member.along(masks[layer.name], True)
    assert sum(int(mask.sum()) for mask in dead.values()) > 0
    for parameter, old in before.items():
        state, gone = optimizer.state[parameter], dead[id(parameter)]
        assert moments <= state.keys() == old.keys()
        for key, value in state.items():
            if key in moments:
                assert value[gone].count_nonzero() == 0
                assert torch.equal(value[~gone], old[key][~gone])
            else:
                assert value == old[key]  # the number of steps
    after = model.state_dict()
    assert all(torch.equal(after[key], weights[key]) for key in weights)


@every_optimizer
def test_dead_weights_do_not_come_back(name):
    """With moments cleared and no gradient the optimizer leaves them at zero by itself."""
    make, _ = OPTIMIZERS[name]
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = make(model.parameters())
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    groups = group_parameters(model)
    masks = kept(groups, 1, 2)
    apply_masks(groups, masks)
    clear_moments(groups, masks, optimizer)
    model[1].weight.grad[:, [1, 2]] = 0
    optimizer.step()
    assert groups.norms().count_nonzero() == 2


def test_the_number_of_steps_of_a_single_weight_is_kept():
    """Adam's count has as many entries as this weight, but not its shape."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), capturable=False)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    groups = group_parameters(model, "element", 1)
    clear_moments(groups, {"0": torch.tensor([False])}, optimizer)
    state = optimizer.state[model[0].weight]
    assert state["step"] == 1
    assert state["exp_avg"].item() == 0


def test_clear_moments_before_the_first_step():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    groups = group_parameters(model)
    clear_moments(groups, kept(groups, 0), optimizer)
    assert len(optimizer.state) == 0


def test_clear_moments_of_another_models_optimizer():
    model, other = network(), network(seed=1)
    optimizer = torch.optim.Adam(other.parameters())
    train(other, optimizer, steps=1)
    before = copy.deepcopy(optimizer.state_dict())
    groups = group_parameters(model)
    clear_moments(groups, kept(groups, 0), optimizer)
    after = optimizer.state_dict()["state"]
    assert after.keys() == before["state"].keys()
    for number, state in before["state"].items():
        assert all(torch.equal(after[number][key], value) for key, value in state.items())


# --- convergence -------------------------------------------------------------------------------

ALIVE = torch.tensor([True, True, False, False])
OTHER = torch.tensor([True, False, True, False])
WITHIN, ABOVE = torch.tensor([0.0, 1e-7]), torch.tensor([0.0, 1e-3])
VALUE = torch.tensor([1.0, 1.0])


def looks(convergence, *seen):
    return [convergence.look(alive, gap, VALUE) for alive, gap in seen]


def test_converged_after_as_many_equal_looks_as_patience():
    assert looks(Convergence(patience=3), *[(ALIVE, WITHIN)] * 5) == [False] * 3 + [True] * 2
    assert looks(Convergence(), *[(ALIVE, WITHIN)] * 5) == [False] * 4 + [True]


def test_another_set_starts_again():
    convergence = Convergence(patience=2)
    seen = [(ALIVE, WITHIN)] * 2 + [(OTHER, WITHIN)] * 3 + [(ALIVE, WITHIN)]
    assert looks(convergence, *seen) == [False, False, False, False, True, False]
    assert convergence.unchanged == 0
    assert torch.equal(convergence.alive, ALIVE)


def test_as_many_groups_are_not_the_same_groups():
    convergence = Convergence(patience=1)
    assert ALIVE.sum() == OTHER.sum()
    assert looks(convergence, (ALIVE, WITHIN), (OTHER, WITHIN)) == [False, False]


def test_a_gap_in_one_layer_starts_again():
    convergence = Convergence(patience=2)
    seen = [(ALIVE, WITHIN), (ALIVE, WITHIN), (ALIVE, ABOVE), (ALIVE, WITHIN), (ALIVE, WITHIN)]
    assert looks(convergence, *seen) == [False, False, False, False, True]


def test_the_gap_is_relative_to_the_value():
    convergence = Convergence(tolerance=0.1, patience=1)
    gap = torch.tensor([1.0])
    assert not convergence.look(ALIVE, gap, torch.tensor([10.0]))
    assert convergence.look(ALIVE, gap, torch.tensor([10.0]))
    assert not convergence.look(ALIVE, gap, torch.tensor([9.9]))


def test_nothing_left_is_settled():
    """Value and gap are both zero: 0 <= 0."""
    convergence, nothing = Convergence(patience=1), torch.zeros(2)
    assert not convergence.look(~ALIVE & ALIVE, nothing, nothing)
    assert convergence.look(~ALIVE & ALIVE, nothing, nothing)


def test_nan_is_not_settled():
    convergence = Convergence(patience=1)
    broken = torch.tensor([0.0, float("nan")])
    assert looks(convergence, *[(ALIVE, broken)] * 3) == [False] * 3


def test_goes_on_from_its_fields():
    """As a resumed run does."""
    first = Convergence(patience=3)
    looks(first, *[(ALIVE, WITHIN)] * 3)
    second = Convergence(patience=3, unchanged=first.unchanged, alive=first.alive)
    assert looks(second, (ALIVE, WITHIN)) == [True]


def test_no_warnings():
    """Masks of a model in training come without torch's complaints about gradients."""
    model = pruned()
    model(torch.ones(1, 2, 8, 8)).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = group_parameters(model)
        masks = masks_from_zeros(groups)
        apply_masks(groups, masks)
    assert caught == []
