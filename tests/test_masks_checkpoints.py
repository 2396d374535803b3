"""Masks taken from checkpoints, also from files that are broken or malicious."""

import copy
import os
import pickle
from pathlib import Path

import pytest
import torch
from helpers import PRUNED, conv_network, lists, pruned, raises_naming
from torch import nn

from lightning_wgsef import group_parameters, masks_from_zeros
from lightning_wgsef.masks import apply_masks, masks_from_checkpoint


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
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
