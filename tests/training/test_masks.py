"""Masks: taken from zeros, and applied."""

import copy
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_wgsef import GroupedLayer, Groups, Member, group_parameters, masks_from_zeros
from lightning_wgsef.training.masks import apply_masks, masks_from_checkpoint
from tests.helpers.groups import (
    OF_ANY_LAYER,
    PRUNED,
    conv_network,
    kept,
    lists,
    pruned,
    raises_naming,
)

# --- masks from zeros --------------------------------------------------------------------------


def test_masks_of_the_model():
    assert lists(masks_from_zeros(group_parameters(pruned()))) == PRUNED


def test_masks_of_filters_need_zeros_in_all_members():
    model = conv_network()
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
    model = conv_network(seed=1)
    before = copy.deepcopy(model.state_dict())
    masks = masks_from_zeros(group_parameters(model), pruned().state_dict())
    assert lists(masks) == PRUNED
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_names_in_a_state_dict_may_have_prefixes():
    groups = group_parameters(conv_network())
    renamed = {f"_orig_mod.{name}": tensor for name, tensor in pruned().state_dict().items()}
    assert lists(masks_from_zeros(groups, renamed)) == PRUNED


def test_a_state_dict_may_have_more_and_other_types():
    groups = group_parameters(conv_network())
    state = {name: tensor.to(torch.bfloat16) for name, tensor in pruned().state_dict().items()}
    state["optimizer.step"] = torch.tensor(3)
    assert lists(masks_from_zeros(groups, state)) == PRUNED


def test_no_zero_group():
    for model, grouping in ((conv_network(), "channel"), (pruned(), "filter")):
        groups = group_parameters(model, grouping)
        with raises_naming("no group is zero", groups.layers[0].name, groups.layers[1].name):
            masks_from_zeros(groups)


def test_a_weight_is_missing():
    state = pruned().state_dict()
    del state["fc.weight"]
    with raises_naming("no weight 'fc.weight'", "another model"):
        masks_from_zeros(group_parameters(conv_network()), state)


@pytest.mark.parametrize("shape", [(4, 6, 1, 1), (6, 4, 3, 3), (216,), ()])
def test_a_weight_of_another_shape(shape):
    state = pruned().state_dict()
    state["conv2.weight"] = torch.zeros(shape)
    with raises_naming("'conv2.weight'", str(shape), "(4, 6, 3, 3)", "another model"):
        masks_from_zeros(group_parameters(conv_network()), state)


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


@pytest.mark.parametrize("grouping", OF_ANY_LAYER)
def test_a_model_that_is_one_layer(grouping):
    model = nn.Linear(3, 2)
    model.weight.data.zero_()
    model.bias.data.zero_()
    groups = group_parameters(model, grouping, include="")
    masks = masks_from_zeros(groups, model.state_dict())
    assert not any(mask.any() for mask in masks.values())


# --- applying masks ----------------------------------------------------------------------------


@pytest.mark.parametrize("grouping", OF_ANY_LAYER)
def test_dead_is_plus_zero_and_alive_is_untouched(grouping):
    model = conv_network()
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
    model = conv_network()
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
    model = conv_network()
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
    model = conv_network()
    groups = group_parameters(model)
    weight = model.conv2.weight
    model(torch.ones(1, 2, 8, 8)).sum().backward()
    address, gradient = weight.data_ptr(), weight.grad.clone()
    apply_masks(groups, kept(groups, 0))
    assert model.conv2.weight is weight
    assert weight.data_ptr() == address
    assert weight.requires_grad
    assert torch.equal(weight.grad, gradient)


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


@pytest.fixture
def groups():
    return group_parameters(conv_network(seed=1))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_plain_state_dict(groups, tmp_path, kind):
    torch.save(pruned().state_dict(), tmp_path / "weights.pt")
    assert lists(masks_from_checkpoint(groups, kind(tmp_path / "weights.pt"))) == PRUNED


def test_an_old_file_format(groups, tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(pruned().state_dict(), path, _use_new_zipfile_serialization=False)
    assert lists(masks_from_checkpoint(groups, path)) == PRUNED


def test_a_checkpoint_of_lightning(groups, tmp_path):
    optimizer = torch.optim.Adam(conv_network().parameters())
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
    with raises_naming("masks:", "no-such.ckpt", "cannot be read"):
        masks_from_checkpoint(groups, tmp_path / "no-such.ckpt")


def test_a_folder(groups, tmp_path):
    with raises_naming("masks:", str(tmp_path), "cannot be read"):
        masks_from_checkpoint(groups, tmp_path)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("share", [0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
def test_a_truncated_file(groups, tmp_path, new, share):
    path = tmp_path / "cut.ckpt"
    torch.save(pruned().state_dict(), path, _use_new_zipfile_serialization=new)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with raises_naming("masks:", "cut.ckpt", "cannot be read"):
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
    with raises_naming("masks:", "other.ckpt", "cannot be read"):
        masks_from_checkpoint(groups, path)


@pytest.mark.parametrize("content", [[1, 2], 3, torch.ones(3), None, "weights"], ids=str)
def test_a_file_without_a_state_dict(groups, tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with raises_naming("masks:", "other.pt", type(content).__name__, "no state_dict"):
        masks_from_checkpoint(groups, path)
    torch.save({"state_dict": content}, path)
    with raises_naming("masks:", "other.pt", "no state_dict"):
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
    with raises_naming("conv2.weight"):
        masks_from_checkpoint(groups, tmp_path / "other.pt")


def test_a_checkpoint_of_another_model(groups, tmp_path):
    path = tmp_path / "other.ckpt"
    torch.save(nn.Sequential(nn.Linear(2, 3)).state_dict(), path)
    with raises_naming("no weight 'conv2.weight'", "another model"):
        masks_from_checkpoint(groups, path)
    wider = pruned()
    wider.conv2 = nn.Conv2d(6, 5, 3)
    torch.save({"state_dict": wider.state_dict()}, path)
    with raises_naming("'conv2.weight'", "(5, 6, 3, 3)", "(4, 6, 3, 3)", "another model"):
        masks_from_checkpoint(groups, path)


def test_a_checkpoint_that_is_not_pruned(groups, tmp_path):
    torch.save({"state_dict": conv_network().state_dict()}, tmp_path / "dense.ckpt")
    with raises_naming("no group is zero", "conv2, fc"):
        masks_from_checkpoint(groups, tmp_path / "dense.ckpt")


@pytest.mark.gpu
def test_a_checkpoint_for_a_model_on_an_accelerator(tmp_path):
    torch.save({"state_dict": pruned().state_dict()}, tmp_path / "last.ckpt")
    model = conv_network(seed=1).cuda()
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
    with raises_naming("masks:", "bad.ckpt", "cannot be read"):
        masks_from_checkpoint(groups, path)
    assert not harm.exists()
    if how == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert harm.exists()  # the file is as bad as it is said to be


def test_the_model_is_not_touched(tmp_path):
    model = conv_network(seed=1)
    before = copy.deepcopy(model.state_dict())
    torch.save(pruned().state_dict(), tmp_path / "weights.pt")
    masks_from_checkpoint(group_parameters(model), tmp_path / "weights.pt")
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
