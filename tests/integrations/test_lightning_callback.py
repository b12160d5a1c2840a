"""The callback in Lightning: when it attaches, what it tells, logs, saves and leaves, and its errors."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import retrograde as rg
from retrograde.engine.layers import AttachedLayer
from retrograde.errors import AttachError, NoEffectError, OptionError, RetrogradeWarning, StateError

L = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from retrograde.integrations.lightning import RetrogradeCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::retrograde.errors.RetrogradeWarning"),
]


class Hooks:
    """A small classifier's training, for a module of either package."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])  # type: ignore[attr-defined]
        self.log("train_loss", loss)  # type: ignore[attr-defined]
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        found = self.net(batch[0])  # type: ignore[attr-defined]
        self.log("val_loss", nn.functional.cross_entropy(found, batch[1]))  # type: ignore[attr-defined]
        self.log("accuracy", (found.argmax(1) == batch[1]).float().mean())  # type: ignore[attr-defined]

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)  # type: ignore[attr-defined]


class Classifier(Hooks, L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def loader(seed: int = 0) -> DataLoader[Any]:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), 8)


def make(folder: Path, *callbacks: Any, package: Any = L, **options: Any) -> Any:
    """A trainer of one epoch, 8 steps, with a validation every 4 and a log every 2."""
    chosen = {
        "max_epochs": 1,
        "val_check_interval": 4,
        "log_every_n_steps": 2,
        "logger": importlib.import_module(f"{package.__name__}.loggers").CSVLogger(folder),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    return package.Trainer(accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), **chosen)


def fit(trainer: Any, module: Any = None, **options: Any) -> Any:
    module = Classifier() if module is None else module
    trainer.fit(module, loader(), loader(1), **options)
    return module


def attached(model: nn.Module) -> bool:
    return any(isinstance(module, AttachedLayer) for module in model.modules())


# Attaching.


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_attached_until_the_end(name: str, tmp_path: Path) -> None:
    """In trainers of both packages; afterwards the very module is plain, and can be tested."""
    package = pytest.importorskip(name)
    seen: list[bool] = []

    class Module(Hooks, package.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            seen.append(attached(self))

    callback = RetrogradeCallback(rg.Dither(), skip="net.2")
    trainer = make(tmp_path, callback, package=package)
    module = fit(trainer, Module())
    assert seen == [True] * 8
    assert callback.session is not None
    assert callback.session.step == 8
    assert [row.name for row in callback.session.plan.rows if row.methods] == ["net.0"]
    assert not attached(module)
    assert trainer.test(module, loader(1), ckpt_path="best", verbose=False)


def test_left_attached(tmp_path: Path) -> None:
    """Then a second `fit` goes on with the same session, and keys are those of the checkpoints."""
    callback = RetrogradeCallback(rg.Perforate(period=3), fold=False)
    trainer = make(tmp_path, callback)
    module = fit(trainer)
    assert attached(module)
    assert trainer.test(module, loader(1), ckpt_path="best", verbose=False)
    fit(make(tmp_path, callback), module)
    assert callback.session is not None
    assert callback.session.step == 16


def test_fitted_again_after_the_fold(tmp_path: Path) -> None:
    callback = RetrogradeCallback(rg.Dither())
    module = fit(make(tmp_path, callback))
    first = callback.session
    fit(make(tmp_path, callback), module)
    assert callback.session is not first
    assert callback.session is not None
    assert callback.session.step == 8


def test_closure_and_accumulation(tmp_path: Path) -> None:
    """Lightning computes gradients inside of the optimizer's step: methods that change them see them."""
    weights: list[Tensor] = []
    for methods in ([], [RetrogradeCallback(rg.Decorrelate(mode="precondition", rank=8, every=2))]):
        torch.manual_seed(0)
        module = fit(make(tmp_path, *methods, accumulate_grad_batches=2))
        weights.append(module.net[0].weight.detach())
    assert not torch.equal(*weights)
    (callback,) = methods
    assert callback.session is not None
    assert callback.session.step == 4


class Late(Hooks, L.LightningModule):
    """Makes layers when Lightning asks for them."""

    def __init__(self, *, first: bool, attach: bool) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8) if first else nn.Identity()
        self.net = nn.Identity()
        self._attach = attach

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = nn.Sequential(self.first, network())
            if self._attach:
                rg.attach(self, rg.Dither())


def test_layers_made_late(tmp_path: Path) -> None:
    """None, or some, at the time when methods are attached: both are refused, and attaching in the hook is not."""
    with pytest.raises(NoEffectError, match=r"retrograde\.attach\(self"):
        fit(make(tmp_path, RetrogradeCallback(rg.Dither())), Late(first=False, attach=False))
    with pytest.raises(AttachError, match="made 2 layers after it was attached"):
        fit(make(tmp_path, RetrogradeCallback(rg.Dither())), Late(first=True, attach=False))
    callback = RetrogradeCallback()
    checkpoints = L.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=8, filename="at")
    module = fit(make(tmp_path, callback, checkpoints), Late(first=True, attach=True))
    assert callback.session is not None
    assert callback.session.step == 8
    assert not attached(module)
    trainer = make(tmp_path, callback := RetrogradeCallback(), max_epochs=2)
    fit(trainer, Late(first=True, attach=True), ckpt_path=tmp_path / "at.ckpt")
    assert callback.session is not None
    assert callback.session.step == 16


def test_nothing_to_attach(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="given no methods"):
        fit(make(tmp_path, RetrogradeCallback()))
    with pytest.raises(OptionError, match="no option sklp"):
        RetrogradeCallback(rg.Dither(), sklp="last")  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="mode='highest'"):
        RetrogradeCallback(rg.Dither(), mode="highest")  # type: ignore[arg-type]


# Scores.


@pytest.mark.parametrize(
    ("callback", "watching", "metric", "sign"),
    [
        ({}, None, "val_loss", -1),
        ({}, ("accuracy", "max"), "accuracy", 1),
        ({}, ("val_loss", "min"), "val_loss", -1),
        ({"monitor": "accuracy"}, ("val_loss", "min"), "accuracy", 1),
        ({"monitor": "accuracy", "mode": "min"}, None, "accuracy", -1),
    ],
)
@pytest.mark.parametrize("by", ["ModelCheckpoint", "EarlyStopping"])
def test_scores(
    callback: dict[str, Any], watching: Any, metric: str, sign: int, by: str, tmp_path: Path
) -> None:
    """Each validation within `fit`, but not the sanity check, and none outside of it."""
    mine = RetrogradeCallback(rg.Dither(), fold=False, **callback)
    others = []
    if watching:
        others = [getattr(L.callbacks, by)(monitor=watching[0], mode=watching[1])]
    found: list[float] = []

    class Listen(L.Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            if not trainer.sanity_checking and trainer.state.fn == "fit":
                found.append(float(trainer.callback_metrics[metric]))

    trainer = make(tmp_path, mine, Listen(), *others)
    module = fit(trainer)
    trainer.validate(module, loader(1), verbose=False)
    assert mine.session is not None
    assert mine.session.state_dict()["scores"] == [[4, sign * found[0]], [8, sign * found[1]]]


def test_no_such_metric(tmp_path: Path) -> None:
    """An error where the user named it, a warning where nobody did."""
    with pytest.raises(OptionError, match=r"no metric 'f1'.*val_loss"):
        fit(make(tmp_path, RetrogradeCallback(rg.Dither(), monitor="f1")))

    class Quiet(Classifier):
        def validation_step(self, batch: Any, index: int) -> None:
            self.net(batch[0])

    with pytest.warns(RetrogradeWarning, match=r"no metric 'val_loss'.*train_loss"):
        fit(make(tmp_path, RetrogradeCallback(rg.Dither())), Quiet())


# The log.


@pytest.mark.parametrize("layers", [False, True])
def test_log(layers: bool, tmp_path: Path) -> None:
    """Every two steps, the figures since the last time."""
    logged: list[tuple[int, dict[str, float]]] = []

    class Logger(L.loggers.CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if "retrograde/zeros" in metrics:
                logged.append((step, metrics))  # type: ignore[arg-type]
            super().log_metrics(metrics, step)

    callback = RetrogradeCallback(rg.Dither(scale=2.0), log_layers=layers)
    fit(make(tmp_path, callback, logger=Logger(tmp_path)))
    assert [step for step, _ in logged] == [2, 4, 6, 8]
    assert len({figures["retrograde/zeros"] for _, figures in logged}) > 1
    assert all(("retrograde/layers/net.0/zeros" in figures) == layers for _, figures in logged)


def test_no_logger(tmp_path: Path) -> None:
    callback = RetrogradeCallback(rg.Dither())
    fit(make(tmp_path, callback, logger=False))
    assert callback.session is not None
    assert callback.session.step == 8


# Checkpoints. That resumed runs are equal to others is in test_documented.py.


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of a run of one epoch."""
    saving = L.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=8, filename="at")
    fit(make(tmp_path, RetrogradeCallback(rg.Perforate(period=3)), saving))
    return tmp_path / "at.ckpt"


def test_state_in_the_checkpoint(checkpoint: Path) -> None:
    """Plain values and tensors."""
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["callbacks"]["RetrogradeCallback"]["session"]["layers"]["net.0"]["step"] == 8


def test_checkpoint_without_session(tmp_path: Path) -> None:
    """Of a run without the callback: a warning, and the methods begin."""
    saving = L.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=8, filename="at")
    fit(make(tmp_path, saving))
    callback = RetrogradeCallback(rg.Dither())
    with pytest.warns(RetrogradeWarning, match="no session's state"):
        fit(make(tmp_path, callback, max_epochs=2), ckpt_path=tmp_path / "at.ckpt")
    assert callback.session is not None
    assert callback.session.step == 8


def test_checkpoint_of_other_layers(checkpoint: Path, tmp_path: Path) -> None:
    callback = RetrogradeCallback(rg.Perforate(where="*", period=3), skip="net.0")
    with pytest.raises((StateError, RuntimeError), match=r"net\.0|other layers"):
        fit(make(tmp_path, callback, max_epochs=2), ckpt_path=checkpoint)


def test_testing_leaves_the_session(checkpoint: Path, tmp_path: Path) -> None:
    """A checkpoint that is loaded for a test is the module's alone."""
    callback = RetrogradeCallback(rg.Perforate(period=3), fold=False)
    trainer = make(tmp_path, callback, max_epochs=2)
    module = fit(trainer)
    trainer.test(module, loader(1), ckpt_path=checkpoint, verbose=False)
    assert callback.session is not None
    assert callback.session.step == 16
