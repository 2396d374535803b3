"""Networks next to each other, and how their layers are stored: plain data and tables."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lightning_wgsef.network.example_input import with_batch_size
from lightning_wgsef.network.flops import layer_flops
from lightning_wgsef.network.latency import BatchLatency, LatencyReport, measure_latency
from lightning_wgsef.utils.files import write_json
from lightning_wgsef.utils.tables import format_table
from lightning_wgsef.utils.validation import check_kind, check_model


@dataclass(frozen=True)
class NetworkRow:
    """One network.

    Attributes:
        name: its name.
        parameters: number of its parameters, those that are shared once.
        nonzero_parameters: how many of them are not exactly zero.
        flops: of one sample, two a multiply-add, as torch counts them: zeros count as other weights
            do, and so do those that a sparse layer skips.
        state_bytes: size of its state_dict as `torch.save` writes it.
        latency: times and memory, next to those of the first network except for itself.
    """

    name: str
    parameters: int
    nonzero_parameters: int
    flops: int
    state_bytes: int
    latency: LatencyReport


@dataclass(frozen=True)
class NetworkReport:
    """What networks need, the first of them to compare with."""

    networks: tuple[NetworkRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "networks": [{**asdict(row), "latency": row.latency.as_dict()} for row in self.networks]
        }

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Write `as_dict` to a file, which gets its name only when it is whole.

        Raises:
            ValueError: a path that cannot be written.
        """
        write_json(self.as_dict(), path)

    def __str__(self) -> str:
        sizes = [batch.batch_size for batch in self.networks[0].latency.batches]
        header = ["network", "parameters", "not zero", "FLOPs a sample", "state bytes"]
        for size in sizes:
            header += [f"ms, batch {size}", f"ratio, batch {size}", f"peak bytes, batch {size}"]
        rows = []
        for row in self.networks:
            counts = [row.parameters, row.nonzero_parameters, row.flops, row.state_bytes]
            times = [cell for batch in row.latency.batches for cell in _cells(batch)]
            rows.append([row.name, *(f"{count:,}" for count in counts), *times])
        latency = self.networks[0].latency
        return "\n".join(
            [
                format_table(header, rows),
                f"{latency.device}, {latency.threads} threads, medians of {latency.repeats} runs, "
                f"ratio to '{self.networks[0].name}' in alternating runs",
                "state bytes: as torch.save writes the state_dict",
                f"peak bytes: {latency.memory}",
            ]
        )


def network_report(
    networks: Mapping[str, nn.Module], example_input: Any, *, batch_sizes: Sequence[int] = (1,)
) -> NetworkReport:
    """Compare what networks need, such as a dense one, its sparse and its slim copy.

    Args:
        networks: networks that take the same input, by name; the others are timed against the
            first.
        example_input: a tensor, a tuple of the arguments of ``forward``, or a dict of them; with
            a batch, as in `measure_latency`.
        batch_sizes: numbers of samples to time.

    Raises:
        ValueError: no networks, or one that cannot be run on the example.

    >>> networks = {"dense": nn.Linear(4, 8), "slim": nn.Linear(4, 2)}
    >>> report = network_report(networks, torch.ones(1, 4))
    >>> [(row.name, row.parameters, row.flops) for row in report.networks]
    [('dense', 40, 64), ('slim', 10, 16)]
    """
    check_kind("networks", networks, Mapping, "a mapping such as {'dense': model, 'slim': small}")
    if not networks:
        raise ValueError("networks must name at least one network, got none")
    for name, network in networks.items():
        check_model(f"networks[{name!r}]", network)
    first = next(iter(networks.values()))
    rows = []
    for name, network in networks.items():
        parameters = list(network.parameters())
        against = None if network is first else first
        rows.append(
            NetworkRow(
                name=name,
                parameters=sum(p.numel() for p in parameters),
                nonzero_parameters=sum(
                    int(torch.count_nonzero(p.detach().to_dense())) for p in parameters
                ),
                # Half of two samples: torch does not count the product of a matrix and a vector,
                # which is what a sparse layer makes of one.
                flops=layer_flops(network, with_batch_size(example_input, 2))[1] // 2,
                state_bytes=_saved_bytes(network),
                latency=measure_latency(
                    network, example_input, against=against, batch_sizes=batch_sizes
                ),
            )
        )
    return NetworkReport(tuple(rows))


def _saved_bytes(network: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    return file.tell()


def _cells(batch: BatchLatency) -> list[str]:
    ratio = "-"
    if batch.ratio is not None:
        ratio = f"{batch.ratio.median:.2f} ({batch.ratio.lower:.2f}-{batch.ratio.upper:.2f})"
    return [f"{batch.seconds.median * 1e3:.3g}", ratio, f"{batch.peak_memory:,}"]
