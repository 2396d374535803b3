"""The configuration of slim networks of Hugging Face: loaded again, they do the same."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from lightning_wgsef import group_parameters, load_slim, save_slim, slim

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "use_cache": False}


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval(), TEXT


def bert():
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return transformers.BertForSequenceClassification(config).eval(), {"input_ids": IDS}


def vit():
    config = transformers.ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return transformers.ViTForImageClassification(config).eval(), torch.randn(1, 3, 16, 16)


def zeroed(network, grouping, example, **budget):
    """The same share of the groups of every layer is zero."""
    groups = group_parameters(network, grouping, example_input=example, **budget)
    factors = [torch.arange(x.count) < int(x.budget) for x in groups.layers]
    groups.scale_(torch.cat(factors).float())
    return network


def logits(network, example):
    with torch.no_grad():
        return (network(**example) if isinstance(example, dict) else network(example)).logits


@pytest.mark.parametrize(
    ("make", "grouping", "attribute", "value"),
    [
        (llama, "hidden", "intermediate_size", 24),
        (bert, "hidden", "intermediate_size", 24),
        (vit, "hidden", "intermediate_size", 24),
        (llama, "head", "num_key_value_heads", 1),
    ],
)
def test_a_folder_is_loaded_again(make, grouping, attribute, value, tmp_path):
    network, example = make()
    small = slim(zeroed(network, grouping, example, k=0.5), example)
    assert getattr(small.config, attribute) == value
    assert getattr(network.config, attribute) == 2 * value
    small.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(again, example), logits(small, example), atol=1e-6)


def test_layers_that_differ_name_the_file_that_keeps_them():
    network, example = llama()
    budgets = {"*layers.0*": 0.5, "*layers.1*": 0.25}
    small = slim(zeroed(network, "hidden", example, k=budgets), example)
    assert small.config.intermediate_size == 48
    assert "save_slim" in small.slimming.kept["config"]


@pytest.mark.parametrize("grouping", ["head", "layer"])
def test_a_configuration_may_refuse_a_size(grouping):
    """Falcon's tells ``head_dim`` from others, and cannot be told it."""
    config = transformers.FalconConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_kv_heads=2,
        new_decoder_architecture=True,
    )
    network = transformers.FalconForCausalLM(config).eval()
    zeroed(network, grouping, TEXT, k=0.5)
    small = slim(network, TEXT)
    assert small.slimming.parameters[1] < small.slimming.parameters[0]
    assert "save_slim" in small.slimming.kept["config"]
    assert torch.allclose(logits(network, TEXT), logits(small, TEXT), atol=1e-6)


def test_in_place():
    network, example = llama()
    whole = copy.deepcopy(network)
    slim(zeroed(network, "hidden", example, k=0.5), example, inplace=True)
    assert (network.config.intermediate_size, whole.config.intermediate_size) == (24, 48)


def roberta():
    config = transformers.RobertaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return transformers.RobertaForMaskedLM(config).eval(), {"input_ids": IDS}


def gpt2():
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel(config).eval(), TEXT


def wav2vec2():
    config = transformers.Wav2Vec2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        conv_dim=(16, 16),
        conv_stride=(2, 2),
        conv_kernel=(3, 3),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )
    return transformers.Wav2Vec2ForCTC(config).eval(), torch.randn(2, 64)


@pytest.mark.parametrize(
    ("make", "grouping", "budget", "auto"),
    [
        (bert, "head", 0.5, "AutoModelForSequenceClassification"),
        (roberta, "head", {"*.0.*": 0.25, "*.1.*": 0.75}, "AutoModelForMaskedLM"),
        (gpt2, "head", 0.5, "AutoModelForCausalLM"),
        (wav2vec2, "head", 0.5, "AutoModelForCTC"),
        (llama, "hidden", {"*.0.*": 0.5, "*.1.*": 0.25}, "AutoModelForCausalLM"),
        (llama, "hidden", 0.5, "AutoModelForCausalLM"),
    ],
)
def test_sizes_without_a_name_are_loaded_with_code(make, grouping, budget, auto, tmp_path):
    network, example = make()
    small = slim(zeroed(network, grouping, example, k=budget), example)
    folder = tmp_path / "small"
    save_slim(small, folder)
    assert (folder / "slim_model.py").exists() == ("config" in small.slimming.kept)
    again = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
    assert isinstance(again, type(network))
    assert torch.equal(logits(again, example), logits(small, example))
    again.save_pretrained(tmp_path / "trained")  # as after some training of the small network
    last = getattr(transformers, auto).from_pretrained(tmp_path / "trained", trust_remote_code=True)
    assert torch.equal(logits(last.eval(), example), logits(small, example))


def test_what_no_folder_can_hold_is_refused(tmp_path):
    network, example = llama()
    small = slim(zeroed(network, "layer", example, k=1), example)
    with pytest.raises(ValueError, match=r"no folder .* skipped; name a file that ends"):
        save_slim(small, tmp_path / "small")
    assert not list(tmp_path.iterdir())
    small = slim(zeroed(bert()[0], "head", bert()[1], k=0.5), bert()[1])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="path must be a folder that can be written"):
        save_slim(small, tmp_path / "file")
    with pytest.raises(ValueError, match="model must be what slim returned"):
        save_slim(network, tmp_path / "other")


class Hub(nn.Module, PyTorchModelHubMixin):
    """A network that `save_pretrained` keeps, and whose ``config`` is its own affair."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, x):
        return self.net(x)


CONFIGS = {
    "dict": {"width": 8},
    "object": SimpleNamespace(width=8),
    "number": 8,
    "none": None,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_of_other_libraries(name, tmp_path):
    network = Hub()
    network.config = CONFIGS[name]
    with torch.no_grad():
        network.net[0].weight[:4] = network.net[0].bias[:4] = 0
    small = slim(network, torch.ones(1, 4))
    assert small.net[0].out_features == 4
    assert network.config == small.config == CONFIGS[name]
    assert "from_pretrained makes it as it was" in small.slimming.kept["config"]
    save_slim(small, tmp_path / "slim")  # a file: no folder of theirs could hold it
    loaded = load_slim(tmp_path / "slim", Hub)
    assert torch.equal(loaded(torch.ones(1, 4)), small(torch.ones(1, 4)))
