"""The configuration of slim networks of Hugging Face: loaded again, they do the same."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from lightning_wgsef import group_parameters, slim

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
