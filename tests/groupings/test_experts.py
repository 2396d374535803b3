"""Experts: hidden units inside of them and whole ones, found, proved, trained, taken out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from lightning_wgsef import WGSEF, HalfSpace, Homotopy, group_parameters, load_slim, save_slim, slim
from lightning_wgsef.groupings.experts import expert_units
from lightning_wgsef.groupings.unit_removal import unit_removal
from lightning_wgsef.network.equivalence import layer_outputs
from lightning_wgsef.network.experts import IN_TURN
from tests.helpers.removal import NEGLIGIBLE, difference, drawn, removal

X = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
TOKENS = {"input_ids": torch.randint(3, 30, (2, 6), generator=torch.Generator().manual_seed(0))}
SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 30,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}


def hugging_face(name: str, how: str = "eager", **sizes: Any) -> nn.Module:
    """Run by a loop over the experts, which knows float64, or by one product of many matrices."""
    config = getattr(transformers, f"{name}Config")(**SMALL, **sizes)
    network = getattr(transformers, f"{name}ForCausalLM")(config)
    network.set_experts_implementation(how)
    return network


def mixtral() -> nn.Module:
    return hugging_face("Mixtral", num_local_experts=4)


def gpt_oss() -> nn.Module:
    return hugging_face("GptOss", head_dim=4, num_local_experts=4, sliding_window=8)


def qwen(how: str = "eager") -> nn.Module:
    """Twelve units each, and more experts than tokens are sent to."""
    return hugging_face("Qwen3Moe", how, head_dim=4, num_experts=32, moe_intermediate_size=12)


class Router(nn.Module):
    """Every token goes to two experts."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate, self.top_k = nn.Linear(8, experts), 2

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.gate(x).softmax(-1).topk(self.top_k, -1)
        return index, weights


class Listed(Router):
    """Experts that are modules; the first is never chosen."""

    def __init__(self, experts: int = 5) -> None:
        super().__init__(experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        x, shape = x.flatten(0, -2), x.shape
        never = torch.full_like(self.gate.bias, 0.0)
        never[0] = -1e9
        weights, index = (self.gate(x) + never).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, slot = torch.where(index == number)
            if len(token):
                out = out.index_add(0, token, expert(x[token]) * weights[token, slot, None])
        return out.view(shape)


class Gated(nn.Module):
    """As wide inside as outside; the halves of its gate in turn, with biases."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(experts, 8, 16))
        self.up_bias = nn.Parameter(torch.empty(experts, 16))
        self.down = nn.Parameter(torch.empty(experts, 8, 8))
        self.down_bias = nn.Parameter(torch.empty(experts, 8))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        both = torch.einsum("th,tkhi->tki", x, self.up[index]) + self.up_bias[index]
        units = functional.silu(both[..., 0::2]) * (both[..., 1::2] + 1)
        made = torch.einsum("tki,tkih->tkh", units, self.down[index]) + self.down_bias[index]
        return (made * weights[..., None]).sum(1)


class Stacked(Router):
    def __init__(self, experts: int = 4) -> None:
        super().__init__(experts)
        self.experts = Gated(experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x.flatten(0, -2), *self.chosen(x.flatten(0, -2))).view(x.shape)


class Everywhere(Router):
    """All experts make all tokens, and hold their weights beside the router."""

    def __init__(self) -> None:
        super().__init__(3)
        self.w1 = nn.Parameter(torch.empty(3, 12, 8))
        self.w2 = nn.Parameter(torch.empty(3, 8, 12))

    def forward(self, x: Tensor) -> Tensor:
        index, weights = self.chosen(x)
        gates = x.new_zeros(*x.shape[:-1], 3).scatter(-1, index, weights)
        units = torch.einsum("bth,eih->btei", x, self.w1).relu()
        return torch.einsum("btei,ehi,bte->bth", units, self.w2, gates)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(8, 8), block, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.block(x))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Any, int, int]] = {
    # how it is made, an input, units inside of experts, whole experts that can be taken out
    "Mixtral": (mixtral, TOKENS, 4 * 24, 4),
    "GPT-OSS": (gpt_oss, TOKENS, 4 * 24, 4),
    "Qwen3-MoE": (qwen, TOKENS, 32 * 12, 32),
    "a list": (lambda: Net(Listed()), X, 5 * 12, 5),
    "in turn": (lambda: Net(Stacked()), X, 4 * 8, 4),
    "everywhere": (lambda: Net(Everywhere()), X, 3 * 12, 0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_units_and_experts_are_taken_out(name, tmp_path):
    """In float64, on inputs that send tokens to every expert, and from the file."""
    make, example, units, experts = NETWORKS[name]
    torch.manual_seed(0)
    found = removal(make(), example, "hidden")
    inside = [layer for layer in found.groups.layers if "experts" in layer.name or units == 36]
    assert sum(layer.count for layer in inside) == units
    assert not found.obstacles
    budgets = {layer.budget for layer in inside}
    assert len(budgets) == 1
    again = group_parameters(found.small, "hidden", 1.0, example_input=example)
    left = {layer.name: layer.count for layer in again.layers}
    assert all(left[layer.name] == layer.budget for layer in inside)
    if not experts:
        groups = group_parameters(make(), "expert", example_input=example)
        assert "does not run without them" in groups.layers[0].obstacle
        return
    whole = removal(make(), example, "expert")
    (layer,) = whole.groups.layers
    assert layer.count == experts
    assert not whole.obstacles
    (now,) = group_parameters(whole.small, "expert", 1.0, example_input=example).layers
    assert now.count == layer.budget
    save_slim(whole.small, tmp_path / "small.safetensors")
    loaded = load_slim(tmp_path / "small.safetensors", make)
    assert difference(whole.small, loaded, example) == 0
    if isinstance(whole.small, transformers.PreTrainedModel):
        assert "its routers know experts" in whole.small.slimming.kept["config"]


def test_the_layout_is_proved():
    """Halves in turn, not one after another, as wide inside as outside; every unit is its own."""
    network = drawn(Net(Stacked()))
    layers, left_out = expert_units(network, X)
    assert not left_out
    for layer in layers:
        up, bias, down = layer.members
        assert up.index.tolist() == bias.index.tolist() == [n // 2 for n in range(16)]
        assert down.name == "block.experts.down"
        assert down.axes == (0,)
    assert expert_units(network, None)[1]["block.experts"].startswith("which axes of its three")


class Shared(Gated):
    """Whose units are no units: each reads its neighbour, too."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        both = torch.einsum("th,tkhi->tki", x, self.up[index]) + self.up_bias[index]
        units = both[..., 0::2] * both[..., 1::2].roll(1, -1)
        made = torch.einsum("tki,tkih->tkh", units, self.down[index]) + self.down_bias[index]
        return (made * weights[..., None]).sum(1)


def test_what_is_no_unit_is_left_out_with_a_reason():
    network = Net(Stacked())
    network.block.experts = Shared()
    _, left_out = expert_units(drawn(network), X)
    assert "are not where they were looked for" in left_out["block.experts"]


def test_every_expert_is_compared():
    """A fault in an expert that the router sends nothing to is seen."""
    for block, weight in (
        (Stacked(4), lambda net: net.block.experts.down[0]),
        (Listed(), lambda net: net.block.experts[0][2].weight),
    ):
        network = drawn(Net(block))
        with torch.no_grad():
            network.block.gate.weight.zero_()
            network.block.gate.bias.copy_(torch.tensor([-9.0, 1, 2, 3, 4])[: len(block.gate.bias)])
        before = layer_outputs(network, X)
        with torch.no_grad():
            weight(network).mul_(2)
        after = layer_outputs(network, X)
        changed = [name for name in before if not torch.equal(before[name][0], after[name][0])]
        assert changed
        assert all(name.startswith((IN_TURN, "block.experts.0")) for name in changed)


def test_a_cut_of_other_units_is_seen(monkeypatch):
    """Planted fault: the columns that go are not those of the rows."""

    def wrong(*args, **options):
        plan = unit_removal(*args, **options)
        for rows in plan.parts.get("block.experts.down", {}).values():
            rows.reverse()
        return plan

    network = drawn(Net(Stacked()))
    monkeypatch.setattr("lightning_wgsef.groupings.removability.unit_removal", wrong)
    groups = group_parameters(network, "hidden", example_input=X)
    assert {"outputs change" in layer.obstacle for layer in groups.layers} == {True}


def test_as_many_experts_stay_as_tokens_are_sent_to():
    groups = group_parameters(mixtral(), "expert", 0.1)
    assert groups.layers[0].budget == 2
    with pytest.raises(ValueError, match=r"k = 1 is less than layer 'model\.layers\.0\.mlp"):
        group_parameters(mixtral(), "expert", 1)
    with pytest.raises(ValueError, match="it has no experts: weights of three axes"):
        group_parameters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "expert")


def test_rows_that_a_kernel_takes():
    """Six of twelve units make rows of 24 bytes, which products of many matrices refuse: eight."""
    network = drawn(qwen("grouped_mm"))
    groups = group_parameters(network, "hidden", 0.5, example_input=TOKENS)
    assert {layer.budget for layer in groups.layers} == {8}
    groups.scale_((torch.arange(len(groups)) % 12 < 6).float())
    small = slim(network, TOKENS)
    assert small.model.layers[0].mlp.experts.down_proj.shape == (32, 16, 8)
    assert torch.allclose(network(**TOKENS).logits, small(**TOKENS).logits, atol=1e-5)


@pytest.mark.parametrize("half_space", [None, HalfSpace(0.1, start=2)])
def test_trained_to_zero(half_space):
    """Every expert keeps its budget; the weights of the others are its own."""
    torch.manual_seed(0)
    network = drawn(mixtral())
    weights = WGSEF(
        network,
        k=0.25,
        lam=Homotopy(length=6) if half_space is None else 0.1,
        grouping="hidden",
        example_input=TOKENS,
        half_space=half_space,
        freeze="converged" if half_space is None else 6,
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    weights.attach(optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        network(**TOKENS).logits.square().mean().backward()
        optimizer.step()
    alive = weights.groups.split(weights.groups.alive())
    assert [int(mask.sum()) for mask in alive.values()] == [6] * 4
    assert len({tuple(mask.tolist()) for mask in alive.values()}) > 1
    small = slim(network, TOKENS)
    assert small.model.layers[0].mlp.experts.down_proj.shape == (4, 16, 6)
    assert difference(network, small, TOKENS) < NEGLIGIBLE


def test_unequal_experts_keep_as_many_as_the_fullest():
    network = drawn(Net(Stacked()))
    with torch.no_grad():
        network.block.experts.down[0, :5] = 0
        network.block.experts.down[1:, [1, 6]] = 0
    small = slim(network, X)
    assert small.block.experts.down.shape == (4, 6, 8)
    assert difference(network, small, X) < NEGLIGIBLE
