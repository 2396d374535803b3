r"""Preconditioners of optimizers: a diagonal D for every parameter, read from their state.

A step is :math:`\theta \leftarrow \theta - \mathrm{lr} \cdot m / D`, elementwise, with m the
optimizer's direction, an average of gradients without its bias. Adam, say, takes gradient steps in
the metric :math:`\|x\|_D^2 = \sum_i D_i x_i^2`, and a proximal step that belongs to them is one in
this metric. Decoupled weight decay and RMSprop's momentum come on top and do not change D.

Sources: the documentation and the code of torch.optim, and for steps in such metrics Yun, Lozano,
Yang, Adaptive Proximal Gradient Methods for Structured Neural Networks, NeurIPS 2021.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

# From a parameter's optimizer state and its param group's settings to D.
#
# The state is one that a step has filled. D has the parameter's shape and is new memory, in float32
# (float64 for float64 state), and positive wherever the optimizer's eps is. It is elementwise: the
# entries of the state that are shaped like the parameter may be replaced by slices of them, and D
# then has the slice's shape.
Preconditioner = Callable[[Mapping[str, Any], Mapping[str, Any]], Tensor]


def preconditioner(optimizer: Optimizer) -> Preconditioner | None:
    r"""Return what computes D for ``optimizer``; None stands for the identity, :math:`D = 1`.

    With t the number of steps and :math:`c = 1 - \beta_2^t`:

    - Adam, AdamW, NAdam: :math:`\sqrt{v / c} + \epsilon`, with amsgrad of the largest v so far
    - RAdam: :math:`(\sqrt{v} + \epsilon) / (\sqrt{c} \, r_t)` where it rectifies, otherwise 1
    - Adamax: its infinity norm u, which has :math:`\epsilon` in it
    - Adagrad: :math:`(\sqrt{\mathrm{sum}} + \epsilon) (1 + (t - 1) \, \mathrm{lr\_decay})`
    - RMSprop: :math:`\sqrt{v} + \epsilon`, centered :math:`\sqrt{v - g^2} + \epsilon`
    - SGD: the identity

    A subclass is what the nearest of its bases is. For a class that is not known, this warns once
    and returns None; `register_preconditioner` makes it known. Nothing waits for an accelerator.

    >>> weights = torch.nn.Parameter(torch.zeros(3))
    >>> optimizer = Adam([weights], lr=0.1, eps=0.5)
    >>> weights.grad = torch.tensor([0.0, 1.0, -2.0])
    >>> optimizer.step()
    >>> metric = preconditioner(optimizer)
    >>> metric(optimizer.state[weights], optimizer.param_groups[0])
    tensor([0.5000, 1.5000, 2.5000])
    >>> preconditioner(SGD([weights])) is None
    True
    """
    kind = type(optimizer)
    for base in kind.__mro__:
        if base in _ADAPTERS:
            return _ADAPTERS[base]
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(
            f"metric: how {kind.__module__}.{kind.__qualname__} scales its steps is not known, so "
            "metric='identity' is used, as for SGD. Pass that to silence this, or call "
            f"register_preconditioner({kind.__name__}, adapter), where adapter(state, param_group) "
            "gives what the step is divided by",
            UserWarning,
            stacklevel=2,
        )
    return None


def register_preconditioner(optimizer: type[Optimizer], adapter: Preconditioner | None) -> None:
    """Register D of an optimizer class, or replace it; its subclasses inherit it.

    Args:
        optimizer: the class.
        adapter: see `Preconditioner`; None for the identity.

    Raises:
        ValueError: ``optimizer`` is no class of optimizers, or ``adapter`` is not callable.

    >>> class Rooted(SGD):
    ...     "Divides by the root of its state 'energy'."
    >>> register_preconditioner(Rooted, lambda state, param_group: state["energy"].sqrt())
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise ValueError(
            f"optimizer must be a subclass of torch.optim.Optimizer, got {optimizer!r}"
        )
    if adapter is not None and not callable(adapter):
        raise ValueError(
            "adapter must be a function from a parameter's state and its param group to a tensor, "
            f"or None for the identity, got {adapter!r}"
        )
    _ADAPTERS[optimizer] = adapter


@dataclass(frozen=True)
class Formula:
    """A preconditioner in two parts, of which the one that runs over all weights can be compiled.

    Attributes:
        keys: from settings to the entries of the state that are read for every weight.
        numbers: from state and settings to what is the same for all weights.
        of: from these entries and these numbers to D.
    """

    keys: Callable[[Mapping[str, Any]], Sequence[str]]
    numbers: Callable[[Mapping[str, Any], Mapping[str, Any]], Sequence[float | Tensor]]
    of: Callable[..., Tensor]

    def __call__(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
        """Return D."""
        return self.of(*self.tensors(state, group), *self.numbers(state, group))

    def tensors(self, state: Mapping[str, Any], group: Mapping[str, Any]) -> list[Tensor]:
        """Return the entries of the state that are read for every weight."""
        return [state[key] for key in self.keys(group)]


def _adam_numbers(state: Mapping[str, Any], group: Mapping[str, Any]) -> Sequence[float | Tensor]:
    correction = 1 - _number(group["betas"][1]) ** _steps(state)
    return correction**-0.5, group["eps"]


def _adam(square: Tensor, factor: float | Tensor, eps: float | Tensor) -> Tensor:
    return _wide(square).sqrt().mul_(factor).add_(eps)


def _radam(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    beta, steps, square = _number(group["betas"][1]), _steps(state), _wide(state["exp_avg_sq"])
    decayed = beta**steps
    # The length of the average, as if it were a plain one: over all of time, and so far.
    longest = 2 / (1 - beta) - 1
    length = longest - 2 * steps * decayed / (1 - decayed)
    if not isinstance(length, Tensor) and length <= 5:
        return torch.ones_like(square)
    rectifier = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    metric: Tensor = (square.sqrt() + group["eps"]) / ((1 - decayed) * rectifier) ** 0.5
    # Where a tensor says that the length is too short, the metric is no number and not taken.
    return torch.where(length > 5, metric, 1.0) if isinstance(length, Tensor) else metric


def _adamax(largest: Tensor, eps: float | Tensor) -> Tensor:
    # A step leaves eps at least: less are moments that were cleared since.
    return _wide(largest).clamp(min=eps)


def _adagrad(total: Tensor, eps: float | Tensor, decay: float | Tensor) -> Tensor:
    return (_wide(total).sqrt() + eps) * decay


def _rmsprop(square: Tensor, *others: Any) -> Tensor:
    square, (*means, eps) = _wide(square), others
    for mean in means:  # a variance; constant gradients leave a rounded zero of either sign
        square = (square - _wide(mean) ** 2).clamp(min=0)
    metric: Tensor = square.sqrt() + eps
    return metric


_ADAM = Formula(
    lambda group: ("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq",),
    _adam_numbers,
    _adam,
)

_ADAMAX = Formula(lambda group: ("exp_inf",), lambda state, group: (group["eps"],), _adamax)

_ADAGRAD = Formula(
    lambda group: ("sum",),
    lambda state, group: (group["eps"], 1 + (_steps(state) - 1) * group["lr_decay"]),
    _adagrad,
)

_RMSPROP = Formula(
    lambda group: ("square_avg", "grad_avg") if group["centered"] else ("square_avg",),
    lambda state, group: (group["eps"],),
    _rmsprop,
)

_ADAPTERS: dict[type[Optimizer], Preconditioner | None] = {
    Adam: _ADAM,
    AdamW: _ADAM,  # in older releases of torch no subclass of Adam
    NAdam: _ADAM,
    RAdam: _radam,
    Adamax: _ADAMAX,
    Adagrad: _ADAGRAD,
    RMSprop: _RMSPROP,
    SGD: None,
}

_warned: set[type[Optimizer]] = set()


def _steps(state: Mapping[str, Any]) -> float | Tensor:
    """Return the number of steps; 1 where a grad scaler skipped the first: its state is zero."""
    steps = _number(state["step"])
    return steps.clamp(min=1) if isinstance(steps, Tensor) else max(steps, 1.0)


def _number(value: float | Tensor) -> float | Tensor:
    """Return a setting or a counter, read if that does not wait for an accelerator.

    Otherwise a tensor of no dimension, in float64 where the device has it: in float32 the bias
    corrections of the first steps lose half their digits.
    """
    if not isinstance(value, Tensor) or _readable(value):
        return float(value)
    return value.to(torch.float32 if value.device.type == "mps" else torch.float64).squeeze()


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _wide(tensor: Tensor) -> Tensor:
    """Return the tensor in the type to compute in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
