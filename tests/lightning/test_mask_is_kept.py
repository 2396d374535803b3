"""A fixed mask holds whatever optimizers step, and whoever writes weights between two steps."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_wgsef import WGSEF, Constant, Homotopy, WGSEFCallback, load_slim
from tests.helpers.trainers import make_trainer

K = 4

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`")


class Net(pl.LightningModule):
    """Two hidden layers of 16; ``make`` is given the parameters, and the module."""

    def __init__(self, make: Any = None, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )
        self.make = make or (lambda parameters: torch.optim.Adam(parameters, 1e-2))
        self.automatic_optimization = not manual

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return self.make(list(self.net.parameters()))


def data() -> Any:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 6, generator=generator)
    y = (x @ torch.randn(6, 3, generator=generator)).argmax(1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)


def alive(net: nn.Sequential) -> list[int]:
    """Input channels with a weight that is not zero, counted by hand."""
    return [sum(bool(net[i].weight[:, j].any()) for j in range(16)) for i in (2, 4)]


def fit(model: pl.LightningModule, callbacks: Any = None, **more: Any) -> Any:
    """Train for six epochs; return the callback and what was said."""
    callback = WGSEFCallback(k=K)
    both = [callback, *(callbacks or [])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        arguments = {"max_epochs": 6, **more}
        validate = arguments.pop("validate", False)
        trainer = make_trainer(both, **arguments)
        trainer.fit(model, data(), data() if validate else None)
    return callback, [str(x.message) for x in caught]


def assert_kept(model: Any, callback: WGSEFCallback) -> None:
    assert callback.regularizer.frozen
    assert alive(model.net) == [K, K]
    assert [int(mask.sum()) for mask in callback.regularizer.masks.values()] == [K, K]


class Stepping(Net):
    """Each batch steps the optimizers that ``turns`` names, by number of epoch."""

    def __init__(self, make: Any, turns: Any) -> None:
        super().__init__(make, manual=True)
        self.turns = turns

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for number in self.turns(self.current_epoch):

            def closure() -> Tensor:
                self.net.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizers[number].step(closure)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-2)


def pair(parameters: Any) -> Any:
    return [adam(parameters), torch.optim.SGD(parameters, 0.05, momentum=0.9)]


def encoder_in_both(parameters: Any) -> Any:
    return [adam(parameters), adam(parameters[:4])]


def adam_then_lbfgs(parameters: Any) -> Any:
    return [adam(parameters), torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)]


class SAM(torch.optim.Optimizer):
    """Its two steps as one, or called by hand (davda54/sam)."""

    def __init__(self, parameters: Any, rho: float = 0.05) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.05, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups
        self.rho = rho

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=self.rho)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss


class Lookahead(torch.optim.Optimizer):
    """Every third step the weights are set between the slow and the fast ones."""

    def __init__(self, parameters: Any, hooked: bool = True) -> None:
        self.optimizer = adam(parameters)
        if hooked:
            super().__init__(parameters, {"lr": 1e-2})
        else:  # as some libraries write it: torch knows nothing of this step
            self.state, self.defaults = self.optimizer.state, self.optimizer.defaults
            self._optimizer_step_pre_hooks = OrderedDict()
            self._optimizer_step_post_hooks = OrderedDict()
        self.param_groups = self.optimizer.param_groups
        self.slow = [p.detach().clone() for p in parameters]
        self.number = 0

    def step(self, closure: Any = None) -> Any:
        return self.turn(closure)

    @torch.no_grad()
    def turn(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = self.optimizer.step(closure)
        self.number += 1
        if self.number % 3 == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss


class UnhookedLookahead(Lookahead):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, hooked=False)

    def step(self, closure: Any = None) -> Any:
        return self.turn(closure)


class Twice(torch.optim.SGD):
    """A step of the class above, whose hooks fire inside, and more."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.add_(1e-3 * torch.randn_like(p))
        return loss


@pytest.mark.parametrize(
    ("make", "turns"),
    [
        (pair, lambda epoch: [0, 1]),
        (pair, lambda epoch: [epoch % 2]),
        (pair, lambda epoch: [1, 1, 0]),
        (encoder_in_both, lambda epoch: [0, 1]),
        (encoder_in_both, lambda epoch: [1, 0]),
        (adam_then_lbfgs, lambda epoch: [int(epoch > 0)]),
        (adam_then_lbfgs, lambda epoch: [int(epoch < 1)]),
        (SAM, lambda epoch: [0]),
        (Lookahead, lambda epoch: [0]),
        (UnhookedLookahead, lambda epoch: [0]),
        (lambda p: Twice(p, 0.05), lambda epoch: [0]),
    ],
)
def test_every_optimizer_that_steps_a_grouped_weight(make: Any, turns: Any) -> None:
    """The mask holds after every batch from the freeze on, not only at the end."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # its class has hooks from here on
    seen = []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if callback.regularizer.frozen:
                seen.append(alive(module.net))

    model, callback = Stepping(make, turns), WGSEFCallback(k=K)
    make_trainer([callback, Look()], max_epochs=6).fit(model, data())
    assert_kept(model, callback)
    assert len(seen) >= 8
    assert all(one == [K, K] for one in seen)


@pytest.mark.parametrize("make", [SAM, Lookahead, lambda p: Twice(p, 0.05)])
def test_a_step_made_of_steps_counts_once(make: Any) -> None:
    torch.optim.SGD([nn.Parameter(torch.ones(1))])
    callback, _ = fit(Stepping(make, lambda epoch: [0]), max_epochs=1)
    assert [pruner.taken for pruner in callback.regularizer.pruners] == [4]  # frozen at half of 8


def test_sam_in_two_steps_by_hand() -> None:
    class Manual(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            for step in (self.optimizers().first_step, self.optimizers().second_step):
                self.net.zero_grad()
                self.manual_backward(self.loss(batch))
                step()

    model = Manual(SAM, manual=True)
    callback, said = fit(model)
    assert_kept(model, callback)
    assert not [x for x in said if "proximal" in x or "frozen" in x]


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("known", [True, False])
def test_optimizers_exchanged_in_mid_run(at: int, known: bool) -> None:
    """In the Trainer, or in the module alone, where the Trainer sees nothing of it."""

    class Exchange(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == at:
                new = torch.optim.SGD(module.net.parameters(), 0.05)
                if known:
                    trainer.optimizers = [new]
                else:
                    module.optimizers = lambda: new

    model = Stepping(adam, lambda epoch: [0])
    callback, _ = fit(model, [Exchange()])
    assert_kept(model, callback)


def test_a_plain_loop_with_two_optimizers_and_weights_written_by_hand() -> None:
    model = Net().net
    first, second = pair(list(model.parameters()))
    regularizer = WGSEF(model, k=K, lam=Homotopy(length=8)).attach(first, second)
    for number in range(10):
        for optimizer in (first, second):
            optimizer.zero_grad()
            model(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
        assert regularizer.pruners[0].taken == min(number + 1, 8)
    assert alive(model) == [K, K]
    assert regularizer.keep_masks() == []
    with torch.no_grad():
        model[4].weight.add_(1.0)
    assert regularizer.keep_masks() == ["4"]
    assert alive(model) == [K, K]
    model[4].weight = nn.Parameter(torch.ones(3, 16))
    with pytest.raises(ValueError, match=r"^4: the mask is lost: other parameters"):
        regularizer.keep_masks()
    assert not regularizer.frozen
    assert int(regularizer.masks["2"].sum()) == K
    regularizer.detach()
    assert "step" not in vars(first)


def test_a_step_that_raised_is_forgotten() -> None:
    model = Net().net
    optimizer = adam(model.parameters())
    regularizer = WGSEF(model, k=K, lam=Constant(0.1), freeze=5).attach(optimizer)

    def fails() -> float:
        raise RuntimeError("out of memory")

    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 6)).square().mean().backward()
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step(fails)
        optimizer.step()
    assert regularizer.pruners[0].taken == 3


def write(net: nn.Sequential) -> None:
    with torch.no_grad():
        net[2].weight.add_(1.0)


class Planted(pl.Callback):
    """Write weights by hand, in a hook; note what each validation sees."""

    def __init__(self, hook: str) -> None:
        self.seen: list[list[int]] = []
        setattr(self, hook, self.plant)

    def plant(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.current_epoch >= 4 and not trainer.sanity_checking:
            write(module.net)

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.current_epoch >= 4:
            self.seen.append(alive(module.net))


@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_epoch_start"])
def test_planted_before_validation(hook: str) -> None:
    model, planted = Net(), Planted(hook)
    callback, said = fit(model, [planted], validate=True)
    assert planted.seen == [[K, K]] * len(planted.seen)
    assert len(planted.seen) == 16
    assert_kept(model, callback)
    (words,) = [x for x in said if "not zero" in x]
    assert words.startswith("net.2: groups that the mask holds at zero were not zero before valid")


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("when", ["epoch", "step"])
def test_planted_before_a_checkpoint(when: str, weights_only: bool, tmp_path: Any) -> None:
    often = {"every_n_epochs": 1} if when == "epoch" else {"every_n_train_steps": 1}
    saver = pl.callbacks.ModelCheckpoint(
        tmp_path, "{step}", save_top_k=-1, save_weights_only=weights_only, **often
    )
    hook = "on_train_epoch_end" if when == "epoch" else "on_train_batch_end"
    model = Net()
    callback, said = fit(model, [Planted(hook), saver], enable_checkpointing=True)
    assert_kept(model, callback)
    last = torch.load(tmp_path / "step=47.ckpt" if when == "step" else tmp_path / "step=48.ckpt")
    saved = Net()
    saved.load_state_dict(last["state_dict"])
    assert alive(saved.net) == [K, K]
    assert len([x for x in said if "not zero before the weights were saved" in x]) == 1


def test_planted_at_the_end_and_before_slim_to(tmp_path: Any) -> None:
    """Best weights, from before the freeze, that the module loads when training is over."""

    class Best(Net):
        def on_train_epoch_end(self) -> None:
            if self.current_epoch == 1:
                self.best = copy.deepcopy(self.net.state_dict())

        def on_train_end(self) -> None:
            self.net.load_state_dict(self.best)

    model = Best()
    model.example_input_array = torch.randn(2, 6)
    callback = WGSEFCallback(k=K, slim_to=tmp_path / "slim.safetensors")
    with pytest.warns(UserWarning, match=r"not zero after training \(on_train_end\)"):
        make_trainer([callback], max_epochs=6).fit(model, data())
    assert_kept(model, callback)
    small = load_slim(tmp_path / "slim.safetensors", Best)
    assert [small.net[2].in_features, small.net[4].in_features] == [K, K]


def test_planted_in_on_train_end_of_another_callback() -> None:
    model = Net()
    callback, said = fit(model, [Planted("on_train_end")])
    assert_kept(model, callback)
    assert [x for x in said if "net.2: groups that the mask holds at zero were not zero after" in x]


def test_a_replaced_layer_is_an_error_with_its_name(tmp_path: Any) -> None:
    class Replace(pl.Callback):
        def __init__(self, hook: str) -> None:
            setattr(self, hook, self.replace)

        def replace(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.current_epoch == 5 or hook == "on_train_end":
                module.net[4] = nn.Linear(16, 3)

    hook = "on_train_epoch_start"
    with pytest.raises(ValueError, match=r"^net\.4: the mask is lost"):
        fit(Net(), [Replace(hook)], validate=True)
    hook = "on_train_end"
    path = tmp_path / "slim.safetensors"
    callback = WGSEFCallback(k=K, slim_to=path, example_input=torch.randn(2, 6))
    with pytest.warns(UserWarning, match=r"slim_to: nothing was written: net\.4: the mask is lost"):
        make_trainer([callback, Replace(hook)], max_epochs=6).fit(Net(), data())
    assert not path.exists()
    assert not callback.regularizer.frozen
    assert int(callback.regularizer.masks["net.2"].sum()) == K


def test_nothing_is_said_or_written_where_masks_hold() -> None:
    model, twin = Net(), Net()
    _, said = fit(model, validate=True)
    assert not [x for x in said if "zero" in x]
    fit(twin)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True)
    )


@pytest.mark.filterwarnings("ignore:training ended before the mask was frozen")
@pytest.mark.parametrize("hidden", ["never", "without gradients"])
def test_an_epoch_without_a_proximal_step(hidden: str) -> None:
    class Manual(Net):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if hidden == "without gradients":
                self.optimizers().step()

    with pytest.warns(
        UserWarning, match=r"no proximal step was taken on net\.2, net\.4 in epoch 0"
    ):
        make_trainer([WGSEFCallback(k=K)], max_epochs=1).fit(Manual(manual=True), data())


def test_hooks_go_with_the_fit() -> None:
    from torch.optim import optimizer as hooks

    model = Net(UnhookedLookahead)
    before = len(hooks._global_optimizer_pre_hooks)
    fit(model)
    assert len(hooks._global_optimizer_pre_hooks) == before
    assert not model._state_dict_pre_hooks
    with pytest.raises(ValueError, match="stop"):
        make_trainer([WGSEFCallback(k=K), Stop()], max_epochs=1).fit(model, data())
    assert len(hooks._global_optimizer_pre_hooks) == before
    assert not model._state_dict_pre_hooks


class Stop(pl.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        raise ValueError("stop")


class Averaging(Net):
    """An average of its network in the module, kept by hand or by torch, and a teacher like it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.way = way
        if way == "torch":
            self.average = torch.optim.swa_utils.AveragedModel(self.net).requires_grad_(False)
        else:
            self.average = nn.ModuleDict({"net": copy.deepcopy(self.net).requires_grad_(False)})

    def averaged(self) -> nn.Module:
        return self.average.module if self.way == "torch" else self.average["net"]

    def on_train_batch_end(self, *_: Any) -> None:
        if self.way == "torch":
            self.average.update_parameters(self.net)
            return
        for mean, parameter in zip(self.average.parameters(), self.net.parameters(), strict=True):
            mean.data.lerp_(parameter.data, 0.1)


@pytest.mark.parametrize("way", ["torch", "hand"])
def test_an_average_inside_of_the_module_is_sparse_and_a_teacher_is_left_alone(way: str) -> None:
    model = Averaging(way)
    before = copy.deepcopy(model.teacher)
    callback, _ = fit(model, max_epochs=8)
    assert_kept(model, callback)
    assert alive(model.averaged()) == [K, K]
    for one, other in zip(model.teacher.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)
