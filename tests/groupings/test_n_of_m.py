"""`n:m`: which weights compete, that exactly n of m stay, and torch's own 2:4 layout."""

import itertools

import pytest
import torch
from torch import nn
from torch.sparse import _semi_structured_conversions as conversions

from lightning_wgsef import WGSEF, Homotopy, group_parameters, prox_multipliers, sparsity_gap
from lightning_wgsef.penalties.segments import Segments

LAYERS = {
    "dense": lambda: nn.Linear(8, 6),
    "convolution": lambda: nn.Conv2d(8, 6, 3),
    "1x1": lambda: nn.Conv2d(8, 6, 1),
    "grouped": lambda: nn.Conv2d(16, 6, 3, groups=2),
    "transposed": lambda: nn.ConvTranspose1d(8, 6, 3),
    "transposed, grouped": lambda: nn.ConvTranspose1d(16, 6, 3, groups=2),
}


def rows_of_m(layer, weight, m):
    """Every m weights that compete, from the definition: neighbours along the inputs."""
    along = 0 if "Transpose" in type(layer).__name__ else 1
    rows = weight.movedim(along, -1)
    for place in itertools.product(*(range(n) for n in rows.shape[:-1])):
        yield from rows[place].split(m)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 8)])
def test_the_projection_keeps_the_n_largest_of_every_m_neighbours(kind, n, m):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    groups = group_parameters(layer, f"{n}:{m}")
    before = layer.weight.detach().clone()
    factors = prox_multipliers(
        groups.norms(), 1.0, groups.budgets, segments=groups.segments, debias=1.0
    )
    groups.scale_(factors)
    seen = 0
    pairs = zip(rows_of_m(layer, layer.weight, m), rows_of_m(layer, before, m), strict=True)
    for after, values in pairs:
        strongest = values.abs().topk(n).indices
        assert after.nonzero().flatten().tolist() == sorted(strongest.tolist())
        assert torch.equal(after[strongest], values[strongest])
        seen += 1
    assert seen == layer.weight.numel() // m


@pytest.mark.parametrize("count", [64, 2**15])  # few rows are searched, many have a closed form
@pytest.mark.parametrize(("debias", "anchored"), [(0.0, False), (1.0, False), (1.0, True)])
def test_rows_of_m_are_segments_with_the_same_budget(count, debias, anchored):
    torch.manual_seed(0)
    norms = torch.rand(10 + count)
    budgets = torch.tensor([4.0, 2.0])
    segments = Segments.n_of_m([10, count], [None, 4])
    steps = torch.tensor([0.1, 0.3])
    settings = {"debias": debias, "anchored": anchored}
    together = prox_multipliers(norms, steps, budgets, segments=segments, **settings)
    first = prox_multipliers(norms[:10], 0.1, 4, **settings)
    second = prox_multipliers(norms[10:].double(), 0.3, 2, segments=4, **settings)
    torch.testing.assert_close(together, torch.cat([first, second.float()]), atol=2e-6, rtol=0)
    gaps = sparsity_gap(norms, budgets, segments=segments)
    each = sparsity_gap(norms[10:].double(), 2, segments=4)
    assert gaps[1].item() == pytest.approx(each.sum().item(), rel=1e-5)
    assert segments.total(torch.ones(10 + count)).tolist() == [10, count]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_two_of_four_trains_to_torchs_semi_structured_layout(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    trained = optimizer(model.parameters(), lr=1e-2)
    regularizer = WGSEF(model, grouping="2:4", lam=Homotopy(length=40)).attach(trained)
    for _ in range(60):
        inputs = torch.randn(32, 64)
        trained.zero_grad()
        (model(inputs) - inputs.roll(1, 1)).square().mean().backward()
        trained.step()
    assert regularizer.frozen
    for layer in (model[0], model[2]):
        alive = (layer.weight != 0).view(-1, 4).sum(1)
        assert (alive == 2).all()
        half = layer.weight.detach().half()
        packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(half)
        assert packed.shape == (64, 32)
        again = conversions.sparse_semi_structured_to_dense_cutlass(packed, meta)
        assert torch.equal(again, half)
    metrics = regularizer.metrics()
    assert metrics["0/group_sparsity"] == metrics["sparsity"] == 0.5
    assert metrics["0/gap"] == 0


def test_torchs_layout_would_notice_a_third_weight():
    weight = torch.zeros(64, 64, dtype=torch.half)
    weight[:, 0::4] = weight[:, 1::4] = weight[:, 2::4] = 1
    packed, meta = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    again = conversions.sparse_semi_structured_to_dense_cutlass(packed, meta)
    assert not torch.equal(again, weight)


@pytest.mark.parametrize("k", [0.5, {"": 0.5}])
def test_the_table_says_two_of_four(k):
    assert "2 of 4" in str(group_parameters(nn.Linear(8, 4), "2:4", k=k))


@pytest.mark.parametrize(
    ("grouping", "k", "words"),
    [
        ("2:4", 0.9, "k = 0.9 is not used with grouping='2:4'"),
        ("2:4", 2, "k = 2 is not used with grouping='2:4'"),
        ("1:4", {"0": 0.3}, "k['0'] = 0.3 is not used with grouping='1:4'"),
        ({"0": "2:4", "1": "filter"}, {"0": 0.3, "1": 0.3}, "k['0'] = 0.3 is not used"),
    ],
)
def test_a_budget_beside_one_that_the_name_says(grouping, k, words):
    with pytest.raises(ValueError, match="name says how many stay") as caught:
        group_parameters(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), grouping, k, include="*")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("grouping", "k"),
    [
        ("1:4", 0.25),
        ({"0": "2:4", "1": "channel"}, 0.3),
        ({"0": "2:4", "1": "channel"}, {"1": 0.3, "0": 0.5}),
    ],
)
def test_a_budget_that_the_name_says_or_that_others_use(grouping, k):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    groups = group_parameters(model, grouping, k)
    assert groups.layers[0].m == 4
    assert groups.layers[0].budget == (1 if grouping == "1:4" else 2)


def test_layers_that_do_not_divide():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    groups = group_parameters(model, "2:4")
    reason = "2:4 needs inputs that 4 divides, its weight has 6 (shape (8, 6))"
    assert groups.left_out == {"0": reason}
    with pytest.raises(ValueError, match=r"include: layer '0' cannot be grouped: 2:4 needs inputs"):
        group_parameters(model, "2:4", include="0")


def test_no_common_budget():
    with pytest.raises(ValueError, match=r"scope must be 'layer' with grouping '2:4' \(layer ''"):
        group_parameters(nn.Linear(8, 4), "2:4", scope="global")
    with pytest.raises(ValueError, match="m of layer '' must divide its 32 groups, which"):
        group_parameters(nn.Linear(8, 4), "2:4", costs=torch.ones(32))
    with pytest.raises(ValueError, match="'2:4' stay in place"):
        group_parameters(nn.Linear(8, 4), "2:4", costs="params", example_input=torch.ones(1, 8))
