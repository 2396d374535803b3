"""Bad input: a ValueError that names the argument and the value."""

import math
import re

import pytest
import torch
from envelope_problems import tensor

from lightning_wgsef import envelope

TWO = [3.0, 4.0]

BAD_BUDGETS = [(0, "0"), (-1, "-1"), (math.nan, "nan"), (torch.tensor([math.nan]), "nan")]
BAD_BUDGETS += [(torch.tensor([-2.0]), "-2"), (torch.tensor([0.0]), "0")]


@pytest.mark.parametrize(("k", "shown"), BAD_BUDGETS)
def test_bad_budgets(k, shown):
    norms = tensor(TWO)
    calls = [
        lambda: envelope.envelope_value(norms, k),
        lambda: envelope.sparsity_gap(norms, k),
        lambda: envelope.envelope_conjugate(norms, k),
        lambda: envelope.prox_multipliers(norms, 0.1, k),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"\bk\b.*{re.escape(shown)}"):
            call()


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"step": -0.25}, r"\bstep\b.*-0\.25"),
        ({"step": math.nan}, r"\bstep\b.*nan"),
        ({"step": torch.tensor([-0.25])}, r"\bstep\b.*-0\.25"),
        ({"step": torch.tensor([math.nan])}, r"\bstep\b.*nan"),
        ({"step": torch.tensor([0.1, 0.1])}, r"\bstep\b.*\(2,\)"),
        (
            {"k": torch.tensor([1.0, 1.0, 1.0]), "step": torch.tensor([0.1] * 2)},
            r"\bstep\b.*\(2,\)",
        ),
        ({"weights": torch.tensor([1.0, 0.0])}, r"\bweights\b.*0\.0"),
        ({"weights": torch.tensor([-2.5, 1.0])}, r"\bweights\b.*-2\.5"),
        ({"weights": torch.tensor([math.nan, 1.0])}, r"\bweights\b.*nan"),
        ({"weights": torch.tensor([1.0, 1.0, 1.0])}, r"\bweights\b.*\(3,\)"),
        ({"costs": torch.tensor([1.0, 0.0])}, r"\bcosts\b.*0\.0"),
        ({"costs": torch.tensor([-2.5, 1.0])}, r"\bcosts\b.*-2\.5"),
        ({"costs": torch.tensor([[1.0, 1.0]])}, r"\bcosts\b.*\(1, 2\)"),
        ({"segments": torch.tensor([0, 0, 0])}, r"\bsegments\b.*\(3,\)"),
        ({"segments": torch.tensor([0.0, 0.0])}, r"\bsegments\b.*float32"),
        ({"segments": torch.tensor([0, -1])}, r"\bsegments\b.*-1"),
        ({"segments": torch.tensor([0, 3]), "k": torch.tensor([1.0, 1.0])}, r"\bk\b.*2.*\b3\b"),
        ({"k": torch.ones(2, 2)}, r"\bk\b.*\(2, 2\)"),
        ({"debias": -0.25}, r"\bdebias\b.*-0\.25"),
        ({"debias": 1.5}, r"\bdebias\b.*1\.5"),
        ({"debias": math.nan}, r"\bdebias\b.*nan"),
        ({"debias": 1.0, "step": 2.5}, r"\bdebias\b.*\b2\.5\b"),
        ({"debias": 0.5, "weights": torch.tensor([1.0, 50.0])}, r"\bdebias\b.*\b2\.5\b"),
        ({"norms": torch.ones(2, 2)}, r"\bnorms\b.*\(2, 2\)"),
        ({"norms": torch.tensor(1.0)}, r"\bnorms\b.*\(\)"),
        ({"norms": torch.tensor([3, 4])}, r"\bnorms\b.*int64"),
        ({"norms": torch.tensor([3.0, -4.0])}, r"\bnorms\b.*-4"),
        ({"norms": torch.tensor([math.nan, 4.0])}, r"\bnorms\b.*nan"),
    ],
)
def test_bad_arguments(changed, shown):
    arguments = {"norms": tensor(TWO), "step": 0.1, "k": 1}
    assert envelope.prox_multipliers(**arguments).shape == (2,)
    with pytest.raises(ValueError, match=shown):
        envelope.prox_multipliers(**(arguments | changed))
