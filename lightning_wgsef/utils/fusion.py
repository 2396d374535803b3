"""Fusion of elementwise arithmetic: one pass over memory instead of one for every operation.

torch.compile makes a kernel of a whole function (C++ on a CPU, Triton on a GPU). Making it takes
seconds, so it is asked only for large work; torch keeps kernels on disk for later runs. Everywhere
else, and where nothing can be compiled, the same function runs operation by operation, on a CPU in
blocks that stay in the cache. Which of the two depends on sizes and on the machine alone, so that a
resumed run does what an uninterrupted one does; on a CPU both give the same bits.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# From so many numbers in a step on compiling pays within a hundred steps: it takes ten seconds or
# so and saves two to three nanoseconds for each of them (`make bench BENCH="-k two_of_four"`).
LEAST = 2**25

# A call of what was compiled costs as much as this many numbers do operation by operation.
_CALL = 2**15

# Numbers of float32 that fill 1 MiB, which the second-level cache of a core holds. Where several
# tensors of a kind are needed at once, or float64, half of it is taken. Sums are formed chunk by
# chunk: another number would change the last bits of large networks.
CACHED = 2**18

_log = logging.getLogger("lightning_wgsef")


# Of columns, and others that are the same for all rows: columns.
Function = Callable[..., Sequence[Tensor]]


class Fused:
    """A function that does the same to every row of a matrix, compiled where that pays.

    Args:
        function: from the columns of a matrix, in whatever order they come, and arguments that are
            the same for all rows, to as many columns.
        name: what is said to be compiled.
    """

    def __init__(self, function: Function, name: str) -> None:
        self.function, self.name = function, name
        self._compiled: Callable[..., Tensor] | None = None
        self._kinds: set[str] = set()
        self._fails = False

    def __call__(self, matrix: Tensor, *others: Any, work: int) -> Tensor:
        """Apply the function; ``work`` is how many numbers all its calls of a step have."""
        if work >= LEAST and matrix.numel() >= _CALL and not self._fails and _can_compile():
            result = self._by_kernel(matrix, others)
            if result is not None:
                return result
        result = torch.empty_like(matrix)
        on_cpu = matrix.device.type == "cpu"
        size = max(1, CACHED // matrix.shape[1]) if on_cpu else len(matrix)
        for block, out in zip(torch.split(matrix, size), torch.split(result, size), strict=True):
            columns = [column.contiguous() for column in block.unbind(1)]
            for place, column in zip(out.unbind(1), self.function(columns, *others), strict=True):
                place.copy_(column)
        return result

    def _whole(self, matrix: Tensor, *others: Any) -> Tensor:
        """What is compiled."""
        count = matrix.shape[1]
        if matrix.device.type == "cpu" and matrix.dtype.itemsize == 4 and not count & (count - 1):
            # Columns as halves of integers of 64 bits, and halves of these, are instructions on
            # many numbers at a time; every fourth number, say, is read one after the other.
            columns = [x.view(matrix.dtype) for x in _halved(bits(matrix.reshape(-1)), count)]
            parts = [part.to(matrix.dtype) for part in self.function(columns, *others)]
            return _paired([bits(part) for part in parts]).view(matrix.dtype).view(matrix.shape)
        parts = [part.to(matrix.dtype) for part in self.function(matrix.unbind(1), *others)]
        return torch.stack(parts, 1)

    def _by_kernel(self, matrix: Tensor, others: Sequence[Any]) -> Tensor | None:
        """Apply what was compiled; None: nothing can be compiled here."""
        kind = str([(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in others])
        started = time.perf_counter()
        try:
            if kind in self._kinds and self._compiled is not None:
                return self._compiled(matrix, *others)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about itself, which may be errors here
                self._compiled = torch.compile(self._whole, dynamic=True, fullgraph=True)
                result = self._compiled(matrix, *others)
        except Exception as error:  # no compiler, no room for its files: there are many reasons
            self._fails = True
            _log.info("the step of %s is not compiled: %s", self.name, error)
            return None
        self._kinds.add(kind)
        seconds = time.perf_counter() - started
        _log.warning(
            "the step of %s was compiled in %.0f s; torch keeps it for later runs",
            self.name,
            seconds,
        )
        return result


def _can_compile() -> bool:
    """Tell whether torch.compile would do anything here; not inside of what is compiled itself."""
    return not torch.compiler.is_compiling() and not torch._dynamo.config.disable


def bits(values: Tensor) -> Tensor:
    """View numbers as integers of their size, which rise with them where those are positive."""
    return values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)


def _halved(numbers: Tensor, count: int) -> list[Tensor]:
    if count == 1:
        return [numbers]
    pairs = numbers.view(torch.int64)
    low, high = pairs.to(torch.int32), (pairs >> 32).to(torch.int32)
    return _halved(low, count // 2) + _halved(high, count // 2)


def _paired(parts: Sequence[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    low, high = _paired(parts[:half]).long(), _paired(parts[half:]).long()
    return ((low & 0xFFFFFFFF) | (high << 32)).view(torch.int32)
