"""A dense layer that stores its weight as a sparse matrix, to predict."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor, nn

# What torch warns of, whoever makes a sparse tensor.
BETA = "Sparse .* tensor support is in beta state"


class SparseLinear(nn.Module):
    """`nn.Linear` with its weight in compressed rows (CSR) or blocks of rows (BSR), to predict.

    The state holds plain tensors: ``values`` with the stored weights, shape (n,), or (n, rows,
    columns) of blocks; ``row_starts`` and ``columns``, int32, where they are; ``bias``. A state
    whose indices fit no matrix of this shape is a `ValueError`.

    Args:
        weight: sparse, as ``to_sparse_csr`` or ``to_sparse_bsr`` make it, shape (out, in).
        bias: shape (out,).

    >>> from lightning_wgsef.export.sparse_storage import to_sparse
    >>> network = nn.Linear(9, 1)
    >>> network.weight.data = torch.tensor([[0.0, 2.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0]])
    >>> layer = to_sparse(network, "csr", torch.ones(1, 9))
    >>> layer.values.tolist(), layer.columns.tolist(), layer.row_starts.tolist()
    ([2.0, 3.0], [1, 4], [0, 2])
    """

    row_starts: Tensor
    columns: Tensor
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.values = nn.Parameter(weight.values().detach().clone(), requires_grad=False)
        self.register_buffer("row_starts", weight.crow_indices().to(torch.int32, copy=True))
        self.register_buffer("columns", weight.col_indices().to(torch.int32, copy=True))
        frozen = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.register_parameter("bias", frozen)
        # An index beyond the matrix would read foreign memory.
        self.register_load_state_dict_post_hook(_check_indices)  # type: ignore[no-untyped-call]  # torch gives none

    @property
    def weight(self) -> Tensor:
        """The weight as a sparse tensor that shares the memory of the state."""
        shape = self.out_features, self.in_features
        return sparse_matrix(self.row_starts, self.columns, self.values, shape)

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`: shape (.., in_features) to (.., out_features)."""
        rows, weight = input.reshape(-1, self.in_features), self.weight
        # W X^T: several times as fast as X W^T, for which torch turns the sparse matrix around.
        # For a single row the product with a vector is faster still, but only without blocks.
        if len(rows) == 1 and weight.layout == torch.sparse_csr:
            outputs = torch.mv(weight, rows[0])[None]
        else:
            outputs = torch.mm(weight, rows.T).T.contiguous()
        if self.bias is not None:
            outputs = outputs + self.bias
        return outputs.view(*input.shape[:-1], self.out_features)


def sparse_matrix(
    starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int], check: bool = False
) -> Tensor:
    """A matrix in compressed rows, or in blocks of rows, that shares the memory of its parts.

    Raises:
        ValueError: with ``check``, indices that fit no matrix of this shape.

    >>> starts, columns = torch.tensor([0, 1]), torch.tensor([7])
    >>> sparse_matrix(starts, columns, torch.ones(1), (1, 4), check=True)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: indices of a sparse layer of shape (1, 4): ...
    """
    layout = torch.sparse_csr if values.dim() == 1 else torch.sparse_bsr
    made = partial(torch.sparse_compressed_tensor, starts, columns, values, shape, layout=layout)
    if not check:
        return made(check_invariants=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=BETA)
            return made(check_invariants=True)
    except RuntimeError as error:
        raise ValueError(f"indices of a sparse layer of shape {shape}: {error}") from error


def _check_indices(layer: SparseLinear, _: object) -> None:
    shape = layer.out_features, layer.in_features
    try:
        sparse_matrix(layer.row_starts, layer.columns, layer.values, shape, check=True)
    except ValueError:
        layer.row_starts.zero_()  # an empty matrix: what was loaded must not be used
        raise
