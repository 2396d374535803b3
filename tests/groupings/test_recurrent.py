"""Hidden units of recurrent layers: found, zero for ever if zero once, taken out, proved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lightning_wgsef import (
    WGSEF,
    Homotopy,
    group_parameters,
    load_slim,
    save_slim,
    slim,
)
from lightning_wgsef.groupings.hidden import hidden_groups
from tests.helpers.removal import difference, removal

KINDS = ["LSTM", "GRU", "RNN"]
STEPS = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))
both = pytest.mark.parametrize("grouping", ["hidden", "structure"])
every_kind = pytest.mark.parametrize("kind", KINDS)


class Reader(nn.Module):
    """A recurrent layer, and a dense one that reads its outputs or its last states."""

    def __init__(self, kind: str, read: str = "outputs", **options: Any) -> None:
        super().__init__()
        self.rnn, self.read = getattr(nn, kind)(5, 8, **options), read
        width = options.get("proj_size", 8) * (1 + options.get("bidirectional", False))
        self.fc = nn.Linear(width, 3)

    def forward(self, steps: Tensor) -> Tensor:
        outputs, states = self.rnn(steps)
        last = states[0] if isinstance(states, tuple) else states
        if self.read == "both":
            last = torch.cat((last[-2], last[-1]), 1)
        found: Tensor = self.fc(outputs if self.read == "outputs" else last)
        return found


@every_kind
@both
@pytest.mark.parametrize(
    ("read", "options"),
    [
        ("outputs", {}),
        ("outputs", {"batch_first": True, "bias": False, "num_layers": 2}),
        ("both", {"bidirectional": True, "num_layers": 2}),
    ],
)
def test_units_go_in_all_layers_and_directions(
    kind: str, grouping: str, read: str, options: dict[str, Any]
) -> None:
    found = removal(Reader(kind, read, **options), STEPS, grouping)
    assert not found.obstacles
    assert [(x.name, x.count) for x in found.groups.layers] == [("rnn", 8)]
    assert (found.small.rnn.hidden_size, found.small.fc.in_features) == (
        4,
        found.zeroed.fc.in_features // 2,
    )
    assert isinstance(found.small.rnn, getattr(nn, kind))
    ends = [f"_l{number}" for number in range(options.get("num_layers", 1))]
    for end in ends + [f"{end}_reverse" for end in ends] * options.get("bidirectional", False):
        gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
        assert getattr(found.small.rnn, f"weight_hh{end}").shape == (4 * gates, 4)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("read", ["outputs", "both"])
def test_units_and_what_they_are_projected_to(read: str) -> None:
    network = Reader("LSTM", read, proj_size=4, num_layers=2, bidirectional=True)
    found = removal(network, STEPS, "structure")
    assert not found.obstacles
    assert {x.name: x.count for x in found.groups.layers} == {"rnn": 8, "rnn.weight_hr": 4}
    assert (found.small.rnn.hidden_size, found.small.rnn.proj_size) == (4, 2)
    found = removal(Reader("LSTM", read, proj_size=4, bidirectional=True), STEPS, "hidden")
    assert not found.obstacles
    # torch takes an LSTM with as many units as projections for one without.
    assert (found.small.rnn.hidden_size, found.small.rnn.proj_size) == (5, 4)


@every_kind
def test_a_unit_of_zeros_stays_zero(kind: str) -> None:
    torch.manual_seed(0)
    layer = getattr(nn, kind)(5, 4, num_layers=2, bidirectional=True).double()
    groups = hidden_groups(layer)
    groups.scale_(torch.tensor([1.0, 0.0, 1.0, 0.0]).double())
    outputs, states = layer(10 * torch.randn(30, 2, 5).double())
    alive = torch.tensor([True, False, True, False])
    for state in states if isinstance(states, tuple) else [states]:
        assert not state[..., ~alive].any()
        assert state[..., alive].all()
    assert not outputs.view(30, 2, 2, 4)[..., ~alive].any()


class Sentences(nn.Module):
    """Packed sequences of tokens, as they come."""

    def __init__(self, kind: str, padded: bool) -> None:
        super().__init__()
        self.tokens, self.padded = nn.Embedding(20, 6), padded
        self.rnn = getattr(nn, kind)(6, 8, batch_first=True, num_layers=2, bidirectional=True)
        self.fc = nn.Linear(16, 3)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.tokens(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        outputs, states = self.rnn(packed)
        last = states[0] if isinstance(states, tuple) else states
        read = pad_packed_sequence(outputs, batch_first=True)[0]
        found: Tensor = self.fc(read if self.padded else torch.cat(list(last[-2:]), 1))
        return found


@every_kind
@pytest.mark.parametrize("padded", [True, False])
def test_packed_sequences(kind: str, padded: bool) -> None:
    tokens = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(0))
    example = (tokens, torch.tensor([7, 3, 5, 2]))
    found = removal(Sentences(kind, padded), example, "structure")
    assert not found.obstacles
    assert found.small.rnn.hidden_size == 4


class Started(nn.Module):
    """A state that the forward makes, of the width that it knows."""

    def __init__(self, kind: str, value: float) -> None:
        super().__init__()
        self.rnn, self.fc, self.value = getattr(nn, kind)(5, 8), nn.Linear(8, 3), value

    def forward(self, steps: Tensor) -> Tensor:
        first = torch.full((1, steps.shape[1], 8), self.value, dtype=steps.dtype)
        state = (first, first) if isinstance(self.rnn, nn.LSTM) else first
        found: Tensor = self.fc(self.rnn(steps, state)[0])
        return found


@every_kind
def test_a_state_that_a_forward_makes(kind: str) -> None:
    found = removal(Started(kind, 0.0), STEPS, "hidden")
    assert not found.obstacles
    assert found.small.rnn.hidden_size == 4
    found = removal(Started(kind, 1.0), STEPS, "hidden")
    assert found.obstacles["rnn"].endswith("a state that 'rnn' is given is not zero")
    assert found.small.rnn.hidden_size == 8


class Given(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.GRU(5, 8), nn.Linear(8, 3)

    def forward(self, steps: Tensor, state: Tensor) -> Tensor:
        found: Tensor = self.fc(self.rnn(steps, state)[0])
        return found


def test_a_state_that_the_user_gives() -> None:
    found = removal(Given(), (STEPS, torch.randn(1, 6, 8)), "hidden")
    assert found.obstacles == {"rnn": "tied to the network's input"}
    with pytest.raises(ValueError, match="rnn: tied to the network's input"):
        group_parameters(Given(), "structure", example_input=(STEPS, torch.randn(1, 6, 8)))


class Loop(nn.Module):
    """A cell, step by step, beside an embedding of the steps that is added to its state."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.fc = getattr(nn, f"{kind}Cell")(5, 8), nn.Linear(8, 3)

    def forward(self, steps: Tensor) -> Tensor:
        state = cells = steps.new_zeros(len(steps), 8)
        found = []
        for step in range(steps.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                state, cells = self.cell(steps[:, step], (state, cells))
            else:
                state = self.cell(steps[:, step], state)
            found.append(self.fc(state))
        return torch.stack(found, 1)


@every_kind
@both
def test_cells_in_a_loop(kind: str, grouping: str) -> None:
    found = removal(Loop(kind), STEPS, grouping)
    assert not found.obstacles
    assert (found.small.cell.hidden_size, found.small.fc.in_features) == (4, 4)


class Translation(nn.Module):
    """The states of one layer start another."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder, self.fc = nn.LSTM(5, 8), nn.LSTM(4, 8), nn.Linear(8, 3)

    def forward(self, given: Tensor, asked: Tensor) -> Tensor:
        found: Tensor = self.fc(self.decoder(asked, self.encoder(given)[1])[0])
        return found


def test_layers_whose_states_are_tied() -> None:
    example = (STEPS, torch.randn(3, 6, 4))
    found = removal(Translation(), example, "structure")
    assert not found.obstacles
    assert [layer.name for layer in found.groups.layers] == ["encoder"]
    assert found.groups.left_out.keys() == {"fc"}
    assert (found.small.encoder.hidden_size, found.small.decoder.hidden_size) == (4, 4)
    found = removal(Translation(), example, "hidden")
    assert found.obstacles["encoder"] == "tied to 'decoder'; grouping='structure' takes both out"


class Captions(nn.Module):
    """Convolutions whose channels a recurrent layer reads, and a residual sum around another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)
        self.first = nn.GRU(6, 8, batch_first=True)
        self.second, self.fc = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, signal: Tensor) -> Tensor:
        steps = self.first(self.norm(self.conv(signal)).relu().transpose(1, 2))[0]
        found: Tensor = self.fc((steps + self.second(steps)[0]).mean(1))
        return found


def test_channels_that_a_recurrent_layer_reads() -> None:
    signal = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    found = removal(Captions(), signal, "structure")
    assert not found.obstacles
    assert {x.name: x.count for x in found.groups.layers} == {"conv": 6, "first": 8}
    assert (found.small.first.input_size, found.small.second.hidden_size) == (3, 4)
    found = removal(Captions(), signal, "channel", include="fc")
    assert found.obstacles["fc"].startswith("'first' reads these channels, too")


class Doubled(nn.LSTM):
    def forward(self, given: Tensor, state: Any = None) -> Any:
        return super().forward(2 * given, state)


def test_what_cannot_be_followed_is_left_out_with_the_reason() -> None:
    network = Reader("LSTM")
    network.rnn = Doubled(5, 8)
    for grouping, reason in (("hidden", "a forward of its own"), ("structure", "Doubled is none")):
        with pytest.raises(ValueError, match=f"rnn: .*{reason}"):
            group_parameters(network, grouping, example_input=STEPS)
    network = Reader("GRU")
    nn.utils.parametrizations.weight_norm(network.rnn, "weight_hh_l0")
    with pytest.raises(ValueError, match="rnn: its weight_hh_l0 is computed from other tensors"):
        group_parameters(network, "hidden", example_input=STEPS)


def test_trained_slim_trained_on_and_saved(tmp_path: Any) -> None:
    torch.manual_seed(0)
    network = Reader("LSTM", "outputs", num_layers=2, batch_first=True)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    regularizer = WGSEF(network, k=0.5, lam=Homotopy(length=8), grouping="hidden")
    regularizer.attach(optimizer)
    for _ in range(14):
        optimizer.zero_grad()
        network(STEPS).square().mean().backward()
        optimizer.step()
    assert int(regularizer.groups.alive().sum()) == 4
    regularizer.detach()
    before = Reader("LSTM", "outputs", num_layers=2, batch_first=True)
    before.load_state_dict(network.state_dict())
    slim(network, STEPS, inplace=True, optimizer=optimizer)
    assert difference(before, network, STEPS) < 1e-12
    network(STEPS).square().mean().backward()
    optimizer.step()
    save_slim(network, tmp_path / "small.safetensors")
    again = load_slim(
        tmp_path / "small.safetensors", lambda: Reader("LSTM", num_layers=2, batch_first=True)
    )
    assert torch.equal(again(STEPS), network.eval()(STEPS))
