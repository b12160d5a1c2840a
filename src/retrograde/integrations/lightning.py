"""Better backward passes in Lightning: ``Trainer(callbacks=[RetrogradeCallback(rg.Dither())])``.

For both packages, ``lightning`` and ``pytorch_lightning``.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any, Literal, Unpack

from torch import nn

from retrograde.assignment import Given
from retrograde.errors import AttachError, NoEffectError, OptionError
from retrograde.extras import missing
from retrograde.integrations.callback import AttachOptions, SessionCallback

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    # Trainers of either package take a callback of the other: what is in use serves, and the other is not imported.
    _packages = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    try:
        Callback = importlib.import_module(_packages[0]).Callback
    except ImportError as error:
        try:
            Callback = importlib.import_module(_packages[1]).Callback
        except ImportError:
            raise missing(__name__, "lightning", f"the package lightning ({error})") from error

_LATER = (
    "Attach at the end of the hook that makes them: retrograde.attach(self, …), and give the trainer "
    "RetrogradeCallback() without methods."
)


class RetrogradeCallback(SessionCallback, Callback):
    """Attaches methods to a `LightningModule`, and goes with it through validation, checkpoints, log and end.

    - The module is attached when `fit` sets up, before it is moved, its optimizers are made and a checkpoint is read.
    - Each validation within training is told to the methods (`Session.validated`).
    - The session's state is the callback's state in Lightning's checkpoints, and ``fit(ckpt_path=…)`` resumes from it.
    - Every ``log_every_n_steps`` the loggers get `Session.metrics` since the last time, under ``retrograde/``.
    - When `fit` ends the module is folded in place: a plain one for whatever comes after.

    Args:
        methods: as for `retrograde.attach`; None takes the session of a module that was attached before, or in its
            ``setup`` or ``configure_model``.
        monitor: the logged metric that the methods are told. None takes what the trainer's checkpoints monitor, or else
            its early stopping, or else ``val_loss``.
        mode: ``"max"`` when a higher metric is better; with ``"min"`` the methods are told its negative. None takes the
            mode of what monitors, or else ``"max"`` unless the name ends in ``loss``.
        fold: fold the module in place when `fit` ends; False leaves it attached. `Perforate` adds keys, so with it
            ``test(ckpt_path="best")`` after `fit` needs False.
        log_layers: log the figures of each layer, too.
        **options: `retrograde.attach`'s ``only``, ``skip``, ``strict``, ``seed``, ``steps``, ``example`` and
            ``decline``.

    Attributes:
        session: None before `fit`.

    Raises:
        OptionError: an option does not exist, or `methods` are not methods.
    """

    def __init__(
        self,
        methods: Given | None = None,
        *,
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        fold: bool = True,
        log_layers: bool = False,
        **options: Unpack[AttachOptions],
    ) -> None:
        if mode not in ("min", "max", None):
            raise OptionError(f"RetrogradeCallback: mode={mode!r} must be 'min', 'max' or None.")
        super().__init__(methods, monitor, fold, log_layers, options)
        self._mode = mode
        self._layers: set[int] = set()
        self._logged = 0

    def setup(self, trainer: "Trainer", pl_module: "LightningModule", stage: str) -> None:
        """Attach, when `fit` begins.

        Raises:
            AttachError: the module is attached already.
            NoEffectError: a method would touch no layer.
        """
        if stage != "fit":
            return
        self._scores, self._lacking, self._logged = 0, None, 0
        if self._methods is None:
            return
        try:
            self._attach(pl_module)
        except NoEffectError as error:
            raise NoEffectError(
                f"{error} Layers that configure_model or setup make come later. {_LATER}"
            ) from error
        # What a method itself gives a layer is of the session.
        self._layers = _with_parameters(pl_module)

    def on_load_checkpoint(
        self, trainer: "Trainer", pl_module: "LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        """Take back the session's state, when `fit` resumes.

        Raises:
            StateError: it is of another model.
        """
        if not _fitting(trainer):
            return
        self._complete(pl_module)
        state = checkpoint["callbacks"].get(self.state_key)
        if not state:
            self._begin_anew(
                "the checkpoint has no session's state: it was written without this callback, or after training had "
                "ended."
            )
            return
        self._logged = int(state["logged"])
        self._load(state["session"])

    def state_dict(self) -> dict[str, Any]:
        """The session's state, plain values and tensors; empty when there is no session or it has ended."""
        if self.session is None or not self._is_on(self.session.model):
            return {}
        return {"session": self.session.state_dict(), "logged": self._logged}

    def on_fit_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """See that the session has all of the module.

        Raises:
            AttachError: the module made layers after it was attached, or is not attached.
        """
        self._complete(pl_module)

    def _complete(self, module: nn.Module) -> None:
        if self._methods is None:
            self._attach(module)
            return
        names = [
            name for name, each in module.named_modules() if id(each) not in self._layers and _owns(each)
        ]
        if names:
            raise AttachError(
                f"the module made {len(names)} layers after it was attached ({names[0]!r} is the first), so they are "
                f"plain. {_LATER}"
            )

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Give the loggers the session's figures."""
        step = trainer.global_step
        # Given to the trainer by its logging, unseen by type checkers.
        every: int = trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        if trainer.loggers and every and step // every > self._logged // every:
            self._logged = step
            figures = self._figures()
            for logger in trainer.loggers:
                logger.log_metrics(figures, step=step)

    def on_validation_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Tell the methods the score, within training.

        Raises:
            OptionError: there is no such metric.
        """
        if not _fitting(trainer) or trainer.sanity_checking:
            return
        watching: list[Any] = [trainer.checkpoint_callback, trainer.early_stopping_callback]
        modes = {name: each.mode for each in watching if (name := getattr(each, "monitor", None)) is not None}
        name = self._metric or next(iter(modes), "val_loss")
        mode = self._mode or modes.get(name) or ("min" if name.endswith("loss") else "max")
        self._report(trainer.callback_metrics, name, mode == "max")
        self._check_scores()

    def on_fit_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Fold the module in place."""
        self._end()


def _fitting(trainer: "Trainer") -> bool:
    return trainer.state.fn == "fit"


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _with_parameters(module: nn.Module) -> set[int]:
    return {id(each) for each in module.modules() if _owns(each)}
