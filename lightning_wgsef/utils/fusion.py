"""Fusion of elementwise arithmetic: one pass over memory instead of one for every operation.

torch.compile makes a kernel of a whole function (C++ on a CPU, Triton on a GPU). Making it takes
seconds, so it is asked only for large work; torch keeps kernels on disk for later runs. Everywhere
else, and where nothing can be compiled, the same function runs operation by operation, on a CPU in
blocks that stay in the cache. Which of the two depends on sizes and on the machine alone, so that a
resumed run does what an uninterrupted one does; on a CPU both give the same bits but for the order
of sums and the last bit of square roots.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# From so many numbers in a step on compiling pays within a hundred steps or two: it takes ten
# seconds or so and saves three nanoseconds for each of them (`make bench BENCH="-k two_of_four"`).
LEAST = 2**25

# Numbers of one call of what was compiled: it keeps twice as many on the way, and a call costs
# little beside so many.
SLAB = 2**22

# A call of what was compiled costs as much as this many numbers do operation by operation.
CALL = 2**15

# Numbers of float32 that fill 1 MiB, which the second-level cache of a core holds. Where several
# tensors of a kind are needed at once, or float64, half of it is taken. Sums are formed chunk by
# chunk: another number would change the last bits of large networks.
CACHED = 2**18

_log = logging.getLogger("lightning_wgsef")


# Of columns, and others that are the same for all rows: columns.
Function = Callable[..., Sequence[Tensor]]


class Kernel:
    """A function of tensors, compiled where that pays.

    Args:
        function: from tensors, numbers and tuples of numbers to tensors.
        name: what is said to be compiled.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        self._compiled: Callable[..., Any] | None = None
        self._kinds: set[str] = set()
        self._fails = False

    def pays(self, work: int) -> bool:
        """Tell whether to compile, where all calls of a step have so many numbers to work on."""
        return work >= LEAST and not self._fails and _can_compile()

    def __call__(self, *given: Any, kind: str) -> Any:
        """Apply what was compiled; None: nothing can be compiled here.

        Args:
            given: arguments of the function.
            kind: what the code depends on besides types and numbers of axes, as a text.
        """
        if self._fails:
            return None
        kind = f"{kind}, {torch.get_num_threads()} threads"
        started = time.perf_counter()
        try:
            if kind in self._kinds and self._compiled is not None:
                return self._compiled(*given)  # what is patched below takes as long as a call
            # A kernel for every kind of arguments and number of threads: a homotopy alone has four.
            with torch._dynamo.config.patch(recompile_limit=64), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about itself: here some are errors
                if self._compiled is None:
                    self._compiled = torch.compile(self.function, dynamic=True, fullgraph=True)
                result = self._compiled(*given)
        except Exception as error:  # no compiler, no room for its files: there are many reasons
            if kind in self._kinds:  # one of more than torch's own number of its kernels
                self._kinds.discard(kind)
                return self(*given, kind=kind)
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


class Fused:
    """A function that does the same to every row of a matrix, compiled where that pays.

    Args:
        function: from the columns of a matrix, and arguments that are the same for all rows, to as
            many columns.
        name: what is said to be compiled.
    """

    def __init__(self, function: Function, name: str) -> None:
        self.function = function
        self._kernel = Kernel(self._whole, name)

    def __call__(self, matrix: Tensor, *others: Any, work: int) -> Tensor:
        """Apply the function; ``work`` is how many numbers all its calls of a step have."""
        matrix = matrix.contiguous()
        if matrix.storage_offset() % 2:  # pairs of numbers are read at once
            matrix = matrix.clone()
        result = torch.empty_like(matrix)
        compiles = self._kernel.pays(work)
        numbers = SLAB if compiles else CACHED if matrix.device.type == "cpu" else matrix.numel()
        size = max(1, numbers // max(1, matrix.shape[1]))
        for block, out in zip(torch.split(matrix, size), torch.split(result, size), strict=True):
            small = block.numel() < CALL
            if not compiles or small or not self._by_kernel(block, out, others):
                columns = [column.contiguous() for column in block.unbind(1)]
                found = self.function(columns, *others)
                for place, column in zip(out.unbind(1), found, strict=True):
                    place.copy_(column)
        return result

    def _whole(
        self, given: Tensor, out: Tensor, count: int, dtype: torch.dtype, *others: Any
    ) -> Tensor:
        """What is compiled: reads rows of ``count`` numbers, writes as many; both may be pairs."""
        if given.dtype == dtype:
            parts = self.function(given.unbind(1), *others)
            return out.copy_(torch.stack([part.to(dtype) for part in parts], 1))
        order = _halved_order(count)
        columns = [part.view(dtype) for part in _halved(given, count)]
        in_order = [columns[order.index(place)] for place in range(count)]
        parts = [bits(part.to(dtype)) for part in self.function(in_order, *others)]
        return out.copy_(_paired([parts[place] for place in order]))

    def _by_kernel(self, matrix: Tensor, out: Tensor, others: Sequence[Any]) -> bool:
        """Apply what was compiled; return: did it? Else nothing can be compiled here."""
        kind = str([(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in others])
        count, dtype = matrix.shape[1], matrix.dtype
        power = count > 1 and not count & (count - 1)
        if matrix.device.type == "cpu" and dtype.itemsize == 4 and power:
            # Columns as halves of integers of 64 bits, and halves of these, are instructions on
            # many numbers at a time; every fourth number, say, is read one after the other.
            matrix, out = matrix.view(-1).view(torch.int64), out.view(-1).view(torch.int64)
        return self._kernel(matrix, out, count, dtype, *others, kind=kind) is not None


def _can_compile() -> bool:
    """Tell whether torch.compile would do anything here; not inside of what is compiled itself."""
    return not torch.compiler.is_compiling() and not torch._dynamo.config.disable


def bits(values: Tensor) -> Tensor:
    """View numbers as integers of their size, which rise with them where those are positive."""
    return values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)


def _halved(pairs: Tensor, count: int) -> list[Tensor]:
    """Cut rows of ``count`` numbers, two in an integer of 64 bits, into columns."""
    low, high = pairs.to(torch.int32), (pairs >> 32).to(torch.int32)
    if count == 2:
        return [low, high]
    return [x for half in (low, high) for x in _halved(half.view(torch.int64), count // 2)]


def _halved_order(count: int) -> list[int]:
    """Return which columns `_halved` gives, in its order.

    >>> _halved_order(8)
    [0, 4, 2, 6, 1, 5, 3, 7]
    """
    if count == 2:
        return [0, 1]
    return [2 * place + half for half in (0, 1) for place in _halved_order(count // 2)]


def _paired(columns: Sequence[Tensor]) -> Tensor:
    """Join what `_halved` cut."""
    half = len(columns) // 2
    low, high = (
        columns
        if half == 1
        else (_paired(x).view(torch.int32) for x in (columns[:half], columns[half:]))
    )
    return (low.long() & 0xFFFFFFFF) | (high.long() << 32)
