"""The callback under a real Trainer on real digits."""

from __future__ import annotations

import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_wgsef import WGSEF, Constant, Homotopy, WGSEFCallback
from lightning_wgsef.training.options import ARGUMENTS, DEFAULTS, PruningOptions, Settings
from tests.helpers.groups import dense_network, raises_naming
from tests.helpers.products import every_value
from tests.helpers.trainers import NAMESPACES, alive, loader, make_module, make_trainer, namespace

BUDGET = {"conv2": 2, "fc": 3}


@pytest.mark.parametrize("name", NAMESPACES)
@pytest.mark.parametrize("as_list", [True, False])
def test_only_change_to_a_script(name: str, as_list: bool) -> None:
    model = make_module(name)
    keys = list(model.state_dict())
    callback = WGSEFCallback(k=0.25)
    assert isinstance(callback, namespace(name).Callback)
    make_trainer([callback] if as_list else callback, name).fit(model, loader())
    assert alive(model) == BUDGET
    assert callback.regularizer.frozen
    assert list(model.state_dict()) == keys
    assert not model.trainer.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.filterwarnings("ignore:lam = .* had not reached the budget")
def test_first_lines_of_the_package_description() -> None:
    model = make_module(optimizer="sgd")
    callback = WGSEFCallback(k=0.25, lam=Constant(1e-2), grouping="channel", freeze=0.5)
    make_trainer([callback]).fit(model, loader())
    assert alive(model) == BUDGET


@pytest.mark.parametrize("grouping", ["filter", "channel", "element"])
def test_budget_is_met_exactly(grouping: str) -> None:
    model = make_module()
    callback = WGSEFCallback(k=0.25, grouping=grouping)
    make_trainer([callback]).fit(model, loader())
    groups = callback.regularizer.groups
    for layer in groups.layers:
        expected = int(layer.count * 0.25 + 0.5)
        assert int(callback.regularizer.masks[layer.name].sum()) == expected == layer.budget
    if grouping == "filter":  # a dead filter's output is exactly zero
        dead = ~callback.regularizer.masks["conv1"]
        with torch.no_grad():
            outputs = model.eval().bn1(model.conv1(torch.randn(4, 1, 8, 8)))
        assert outputs[:, dead].abs().max() == 0
        assert outputs[:, ~dead].abs().max() > 0


@pytest.mark.parametrize("accumulate", [1, 3])
def test_acts_once_for_every_step_of_the_optimizer(accumulate: int) -> None:
    model = make_module()
    callback = WGSEFCallback(k=0.25)
    trainer = make_trainer([callback], accumulate_grad_batches=accumulate)
    trainer.fit(model, loader())
    (part,) = callback.regularizer.pruners
    assert trainer.global_step == 2 * -(-20 // accumulate)
    assert part.total_steps == trainer.global_step
    assert part.taken == int(0.5 * trainer.global_step + 0.5)  # counted until the freeze
    assert alive(model) == BUDGET


@every_value("stop, optimizer", itertools.product([13, 20, 27, 39, 60], ["sgd", "adam"]))
def test_resume_is_bit_identical(tmp_path: Any, optimizer: str, stop: int) -> None:
    """Stops in the first epoch, at its end, just before the freeze and after it (at step 40)."""

    def fit(**arguments: Any) -> Any:
        model = make_module(optimizer=optimizer)
        saver = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1)
        callback = WGSEFCallback(k=0.25)
        trainer = make_trainer([callback, saver], max_epochs=4, enable_checkpointing=True)
        trainer.fit(model, loader(), **arguments)
        return model, callback

    whole, first = fit()
    path = next(tmp_path.glob(f"*step={stop}.ckpt"))
    resumed, second = fit(ckpt_path=path, weights_only=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert alive(resumed) == BUDGET
    for a, b in zip(
        first.regularizer.masks.values(), second.regularizer.masks.values(), strict=True
    ):
        assert torch.equal(a, b)
    state = torch.load(path, weights_only=True)["callbacks"]["WGSEFCallback"]
    assert [part["taken"] for part in state["attachments"]] == [min(stop, 40)]
    assert (state["attachments"][0]["masks"] is None) == (stop < 40)


def test_resuming_a_finished_run_keeps_its_masks(tmp_path: Any) -> None:
    model = make_module()
    trainer = make_trainer([WGSEFCallback(k=0.25)])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    callback = WGSEFCallback(k=0.25)
    again = make_trainer([callback])  # as many epochs: nothing is left to train
    again.fit(make_module(), loader(), ckpt_path=tmp_path / "first.ckpt")
    again.save_checkpoint(tmp_path / "second.ckpt")
    last = make_module()
    more = make_trainer([callback], max_epochs=3)
    more.fit(last, loader(), ckpt_path=tmp_path / "second.ckpt")
    assert alive(last) == BUDGET
    assert callback.regularizer.pruners[0].taken == 20  # frozen since then, not begun anew
    assert callback.regularizer.frozen


def test_dense_checkpoint_without_callback_state(tmp_path: Any) -> None:
    dense = make_module()
    trainer = make_trainer([], max_epochs=1)
    trainer.fit(dense, loader())
    trainer.save_checkpoint(tmp_path / "dense.ckpt")
    model = make_module()
    callback = WGSEFCallback(k=0.25, lam=Homotopy(length=10))
    make_trainer([callback]).fit(model, loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert alive(model) == BUDGET


@pytest.mark.parametrize("with_path", [True, False])
def test_fine_tuning_a_pruned_checkpoint(tmp_path: Any, with_path: bool) -> None:
    model = make_module()
    trainer = make_trainer([WGSEFCallback(k=0.25)])
    trainer.fit(model, loader())
    trainer.save_checkpoint(tmp_path / "pruned.ckpt")
    zeros = model.conv2.weight == 0

    tuned = make_module(optimizer="sgd")
    weights = torch.load(tmp_path / "pruned.ckpt", weights_only=True)["state_dict"]
    tuned.load_state_dict(weights, strict=True)
    callback = WGSEFCallback(masks=tmp_path / "pruned.ckpt" if with_path else "from_zeros")
    make_trainer([callback]).fit(tuned, loader())
    assert alive(tuned) == BUDGET
    assert torch.equal(tuned.conv2.weight == 0, zeros)
    assert not torch.equal(tuned.conv2.weight, model.conv2.weight)

    (tmp_path / "pruned.ckpt").unlink()  # a resumed run needs the file no more
    tuned.trainer.save_checkpoint(tmp_path / "tuned.ckpt")
    resumed = make_module(optimizer="sgd")
    again = WGSEFCallback(**{**callback.arguments, "k": 0.5})
    trainer = make_trainer([again], max_epochs=3)
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "tuned.ckpt")
    assert alive(resumed) == BUDGET
    assert torch.equal(resumed.conv2.weight == 0, zeros)


def test_fine_tuning_weights_that_are_not_pruned() -> None:
    with pytest.raises(ValueError, match="no group is zero in conv2, fc"):
        make_trainer([WGSEFCallback(masks="from_zeros")]).fit(make_module(), loader())


@pytest.mark.filterwarnings("ignore:.* fixes the mask at step 30")
def test_second_fit_goes_on_and_another_model_starts_anew() -> None:
    model, other = make_module(), make_module()
    callback = WGSEFCallback(k=0.25, lam=Homotopy(length=30))
    with pytest.warns(UserWarning, match="before the mask was frozen"):
        make_trainer([callback], max_epochs=1, limit_train_batches=15).fit(model, loader())
    assert callback.regularizer.pruners[0].taken == 15
    assert all(BUDGET[name] < count for name, count in alive(model).items())
    make_trainer([callback], max_epochs=1).fit(model, loader())
    assert alive(model) == BUDGET
    with pytest.warns(UserWarning, match="before the mask was frozen"):
        make_trainer([callback], max_epochs=1, limit_train_batches=5).fit(other, loader())
    assert callback.regularizer.pruners[0].taken == 5
    assert all(BUDGET[name] < count for name, count in alive(other).items())


def test_interrupted_fit_lets_go_of_the_optimizer_and_can_go_on() -> None:
    class Interrupt(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 7:
                raise RuntimeError("interrupted")

    model = make_module()
    callback = WGSEFCallback(k=0.25, lam=Homotopy(length=20))
    trainer = make_trainer([callback, Interrupt()])
    with pytest.raises(RuntimeError, match="interrupted"):
        trainer.fit(model, loader())
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert callback.regularizer.pruners[0].taken == 7
    make_trainer([callback]).fit(model, loader())
    assert alive(model) == BUDGET


def test_manual_optimization_with_two_optimizers() -> None:
    class TwoOptimizers(type(make_module())):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
            for number, optimizer in enumerate(self.optimizers()):
                if number == 0 or batch_idx % 2 == 0:
                    optimizer.zero_grad()
                    loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
                    self.manual_backward(loss)
                    optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            body = [p for n, p in self.named_parameters() if not n.startswith("fc")]
            return [torch.optim.SGD(body, lr=0.05), torch.optim.Adam(self.fc.parameters())]

    model = TwoOptimizers()
    callback = WGSEFCallback(k=0.25, lam=Homotopy(length=18))
    with pytest.warns(UserWarning, match="before the mask was frozen.*'fc': "):
        make_trainer([callback], max_epochs=1).fit(model, loader())
    assert [part.taken for part in callback.regularizer.pruners] == [18, 10]
    assert [part.frozen for part in callback.regularizer.pruners] == [True, False]
    assert alive(model)["conv2"] == 2
    assert alive(model)["fc"] > 3


def test_layer_outside_all_optimizers_is_named() -> None:
    class BodyOnly(type(make_module())):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            body = [p for n, p in self.named_parameters() if not n.startswith("fc")]
            return torch.optim.SGD(body, lr=0.05)

    model = BodyOnly()
    with pytest.warns(UserWarning, match="fc: no optimizer trains these layers"):
        make_trainer([WGSEFCallback(k=0.25)]).fit(model, loader())
    assert alive(model) == {"conv2": 2, "fc": 12}


def test_two_callbacks_on_their_own_layers_and_overlapping() -> None:
    model = make_module()
    first = WGSEFCallback(k=0.5, grouping="filter", include="conv1", name="filters")
    second = WGSEFCallback(k=0.25, include=["conv2", "fc"], name="channels")
    make_trainer([first, second]).fit(model, loader())
    assert alive(model) == BUDGET
    assert int(first.regularizer.masks["conv1"].sum()) == 4
    third = WGSEFCallback(k=0.5, grouping="filter", include="conv2", name="more")
    with pytest.raises(ValueError, match=r"overlap.*conv2\.weight.*'conv2' \(\w+\) of another"):
        make_trainer([second, third]).fit(make_module(), loader())


@pytest.mark.parametrize("called", [None, "mine"])
@pytest.mark.parametrize("name", NAMESPACES)
def test_two_callbacks_of_one_name_are_told_to_take_two(name: str, called: str | None) -> None:
    both = [WGSEFCallback(name=called), WGSEFCallback(grouping="filter", name=called)]
    trainer = make_trainer(both, name)
    with raises_naming("grouping 'channel' and 'filter'", f"name={called!r}", "name='first'"):
        trainer.fit(make_module(name), loader())
    assert both[0].regularizer is both[1].regularizer is None


@pytest.mark.parametrize(("called", "key"), [(None, "WGSEFCallback"), ("a", "WGSEFCallback[a]")])
def test_the_key_of_the_saved_state(tmp_path: Any, called: str | None, key: str) -> None:
    trainer = make_trainer([WGSEFCallback(k=0.25, name=called)])
    trainer.fit(make_module(), loader())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert list(torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]) == [key]


def test_constant_lam_keeps_the_budget_even_if_it_does_not_converge() -> None:
    model = make_module()
    callback = WGSEFCallback(k=0.25, lam=Constant(1e-2), grouping="channel")
    with pytest.warns(UserWarning, match=r"by step 30, three.*'conv2': 6, 'fc': 9"):
        make_trainer([callback]).fit(model, loader())
    assert alive(model) == BUDGET
    assert callback.regularizer.pruners[0].taken == 30  # of 40


@pytest.mark.filterwarnings("ignore:.* fixes the mask at step 1000")
def test_training_that_ends_before_the_freeze_says_so() -> None:
    model = make_module()
    callback = WGSEFCallback(k=0.25, lam=Homotopy(length=1000))
    with pytest.warns(UserWarning, match=r"ended before the mask was frozen.*'conv2': 8"):
        make_trainer([callback], max_epochs=1).fit(model, loader())


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"lam": Homotopy(length=21)}, r"Homotopy\(.*length=21.*\) fixes the mask at step 21"),
        ({"freeze": 21}, "freeze=21 fixes the mask at step 21"),
        ({"lam": Constant(0.1), "freeze": 50}, "freeze=50 fixes the mask at step 50"),
    ],
)
@pytest.mark.parametrize("length", [{"max_epochs": 1}, {"max_epochs": -1, "max_steps": 20}])
@pytest.mark.filterwarnings("ignore:training ended before the mask was frozen")
def test_a_freeze_beyond_the_end_of_training_is_said_at_the_start(
    arguments: dict[str, Any], cause: str, length: dict[str, int]
) -> None:
    class Stops(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = True

    trainer = make_trainer([WGSEFCallback(**arguments), Stops()], min_epochs=0, **length)
    with pytest.warns(UserWarning, match=cause + ", but training ends at step 20 .*Train longer"):
        trainer.fit(make_module(), loader())
    assert trainer.global_step <= 20


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("arguments", [{"grouping": "structure"}, {"costs": "flops"}])
def test_the_example_has_the_precision_of_the_trainer(precision: str, arguments: Any) -> None:
    model = make_module()
    model.example_input_array = torch.zeros(1, 1, 8, 8)
    callback = WGSEFCallback(k=0.5, **arguments)
    make_trainer([callback], max_epochs=1, precision=precision).fit(model, loader())
    assert callback.regularizer.frozen


@pytest.mark.parametrize("name", NAMESPACES)
@pytest.mark.parametrize("strategy", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_flatten_weights_are_refused(name: str, strategy: str) -> None:
    kind = getattr(namespace(f"{name}.strategies"), strategy)
    instance = kind.__new__(kind)  # to make one needs a GPU, or DeepSpeed
    trainer = SimpleNamespace(strategy=instance)
    with pytest.raises(ValueError, match=f"strategy={strategy}.*use 'ddp', or ModelParallel"):
        WGSEFCallback(k=0.5).setup(trainer, make_module(name), "fit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k must be .*got 0"),
        ({"k": -3}, "k must be .*got -3"),
        ({"k": 1.01}, r"k must be .*got 1\.01"),
        ({"k": float("nan")}, "k must be .*got nan"),
        ({"k": 0.5, "lam": -0.1}, r"lam must be .*got -0\.1"),
        ({"k": 0.5, "lam": float("nan")}, "lam must be .*got nan"),
        (
            {"k": 0.5, "grouping": "chanel"},
            "grouping must be 'channel', 'element', .*chan",
        ),
        ({"k": 0.5, "freeze": "soon"}, "freeze must be .*'soon'"),
        ({"k": 0.5, "debias": -1.0}, "debias must be .*got -1"),
    ],
)
def test_bad_arguments_are_named_on_construction(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WGSEFCallback(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 9}, "k = 9 is more than the 8 groups of layer 'conv2'"),
        ({"k": 0.5, "include": "conv7"}, "include: the pattern 'conv7' matches no layer"),
        ({"k": 0.5, "exclude": ["nope*"]}, r"exclude: the pattern 'nope\*' matches no layer"),
        ({"k": {"nope": 0.5}}, "k: the pattern 'nope' matches no layer"),
        ({"k": 0.5, "exclude": "*"}, "has no layer that grouping='channel' can group"),
        ({"k": 0.5, "masks": "gone.ckpt"}, r"masks: 'gone\.ckpt' cannot be read"),
    ],
)
def test_what_does_not_fit_the_model_is_named_before_training(
    arguments: dict, message: str
) -> None:
    class NoStep(type(make_module())):
        def training_step(self, *_: Any) -> None:
            raise AssertionError("training has started")

    with pytest.raises(ValueError, match=message):
        make_trainer([WGSEFCallback(**arguments)]).fit(NoStep(), loader())


def test_training_without_an_end_is_named() -> None:
    trainer = make_trainer([WGSEFCallback(k=0.5)], max_epochs=-1)
    with pytest.raises(ValueError, match=r"Homotopy\(length=...\) = 0\.5 is a share of training"):
        trainer.fit(make_module(), loader())


def test_diverged_weights_stop_training_with_the_layers_name() -> None:
    class Diverge(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            with torch.no_grad():
                pl_module.conv2.weight[0, 0, 0, 0] = float("nan")

    with pytest.raises(FloatingPointError, match=r"weights of conv2.* are NaN or infinite"):
        make_trainer([WGSEFCallback(k=0.5), Diverge()]).fit(make_module(), loader())


def test_the_signature_is_that_of_the_options() -> None:
    """Names, types and defaults stand twice: here to be read, there to be used."""
    own = inspect.signature(WGSEFCallback.__init__).parameters
    shared = {name: own[name] for name in DEFAULTS}
    assert list(own)[1:4] == list(inspect.signature(Settings).parameters)[:3]
    assert {name: x.default for name, x in shared.items()} == DEFAULTS
    declared = PruningOptions.__annotations__
    assert {name: x.annotation for name, x in shared.items()} == {
        name: x.__forward_arg__ for name, x in declared.items()
    }
    assert tuple(list(own)[1 : 1 + len(ARGUMENTS)]) == ARGUMENTS
    assert tuple(WGSEFCallback(k=0.25).arguments) == ARGUMENTS


def test_a_misspelled_argument_is_named() -> None:
    with pytest.raises(TypeError, match=r"WGSEF.* got an unexpected keyword argument 'metrik'"):
        WGSEFCallback(metrik="auto")
    with pytest.raises(TypeError, match=r"WGSEF.* got an unexpected keyword argument 'metrik'"):
        WGSEF(dense_network(), metrik="auto")
    with pytest.raises(TypeError, match=r"WGSEF.* got an unexpected keyword argument 'slim_to'"):
        WGSEF(dense_network(), slim_to="x.safetensors")
