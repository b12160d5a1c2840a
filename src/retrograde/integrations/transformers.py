"""Better backward passes in Hugging Face's `Trainer`: ``Trainer(…, callbacks=[RetrogradeCallback(rg.Dither())])``."""

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from retrograde import saving
from retrograde.assignment import Given
from retrograde.errors import StateError
from retrograde.extras import missing
from retrograde.integrations.callback import AttachOptions, SessionCallback

try:
    from transformers import TrainerCallback
    from transformers.trainer_callback import CallbackHandler
except ImportError as error:
    raise missing(__name__, "transformers", f"the package transformers ({error})") from error

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

SESSION_FILE = "retrograde_session.pt"
"""The session's file in a checkpoint's folder; `retrograde.resume` reads it too."""
_TRAINER_STATE = "trainer_state.json"


class RetrogradeCallback(SessionCallback, TrainerCallback):
    """Attaches methods to a `Trainer`'s model, and goes with it through evaluation, checkpoints, log and end.

    - The model is attached when the trainer is made, before its optimizer.
    - Each evaluation within training is told to the methods (`Session.validated`).
    - Each checkpoint gets the session's file, and ``train(resume_from_checkpoint=…)`` resumes from it.
    - Each training log gets `Session.metrics` since the last one, under ``retrograde/``.
    - When training ends the model is folded in place: a plain one for whatever comes after.

    Args:
        methods: as for `retrograde.attach`; None takes the session of a model that was attached before, which is for
            models that ``model_init`` makes and for optimizers that are given to the trainer.
        metric: the evaluation's metric that the methods are told, with or without ``eval_``. None takes the arguments'
            ``metric_for_best_model``, or else ``eval_loss``.
        greater_is_better: whether it is; else the methods are told its negative. None takes the arguments', or else
            True unless the name ends in ``loss``.
        fold: fold the model in place when training ends; False leaves it attached.
        log_layers: log the figures of each layer, too.
        **options: `retrograde.attach`'s ``only``, ``skip``, ``strict``, ``seed``, ``steps``, ``example`` and
            ``decline``.

    Attributes:
        session: None before the trainer is made.

    Raises:
        OptionError: an option does not exist, or `methods` are not methods.
    """

    def __init__(
        self,
        methods: Given | None = None,
        *,
        metric: str | None = None,
        greater_is_better: bool | None = None,
        fold: bool = True,
        log_layers: bool = False,
        **options: Unpack[AttachOptions],
    ) -> None:
        super().__init__(methods, metric, fold, log_layers, options)
        self._greater_is_better = greater_is_better
        self._training = False

    def on_init_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        *,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Attach: the trainer has its model, and makes the optimizer when it trains.

        Raises:
            AttachError: the trainer was given an optimizer, which lacks parameters that a method adds.
        """
        self._come_first()
        given = "Attach, make the optimizer, and then the trainer with RetrogradeCallback() without methods."
        self._attach(model, None if optimizer is None else given)

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Take back the session's state where a training is resumed.

        Raises:
            AttachError: the model is another one than when the trainer was made, and its optimizer lacks parameters
                that a method adds.
            StateError: the checkpoint is not where it is looked for, or its session is of another model.
        """
        self._come_first()
        self._attach(
            model,
            "Attach inside of model_init, or before the trainer is made, and give it RetrogradeCallback() without "
            "methods; a trainer that trains twice needs fold=False.",
        )
        self._training, self._scores, self._lacking = True, 0, None
        if state.global_step:
            self._resume(args, state)

    def _resume(self, args: "TrainingArguments", state: "TrainerState") -> None:
        at = args.resume_from_checkpoint or Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        folder = Path(at)
        if not _is_of(folder, state):
            raise StateError(
                f"the training was resumed at step {state.global_step}, and {folder} is not the checkpoint that it was "
                "resumed from, so the session's state is not found. Say where it is: "
                "TrainingArguments(resume_from_checkpoint=…), the same folder that train() is given."
            )
        if not (folder / SESSION_FILE).is_file():
            self._begin_anew(
                f"{folder} has no {SESSION_FILE}: the checkpoint was written without this callback, or its writing was "
                "cut off, and then an earlier one is whole."
            )
            return
        self._load(saving.read(folder / SESSION_FILE, known=False)[2])

    def on_save(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
    ) -> None:
        """Put the session's file into the checkpoint that was just written."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        # A hyperparameter search has folders of its own, which nothing is resumed from.
        if (
            self.session is None
            or not args.should_save
            or args.save_only_model
            or state.is_hyper_param_search
        ):
            return
        self.session.save(folder / SESSION_FILE)

    def on_evaluate(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        *,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the methods the score, within training."""
        if not self._training:
            return
        best = args.metric_for_best_model
        name = self._metric or best or "loss"
        greater = self._greater_is_better
        if greater is None and name == best:
            greater = args.greater_is_better
        greater = not name.endswith("loss") if greater is None else greater
        self._report(metrics or {}, name if name.startswith("eval_") else f"eval_{name}", greater)

    def on_step_begin(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
    ) -> None:
        """Complain of a metric that no evaluation of the last round had: with several sets of data, one has it.

        Raises:
            OptionError: there is no such metric.
        """
        self._check_scores()

    def on_log(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        *,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the session's figures to a log of training."""
        if self._training and logs is not None and "loss" in logs:
            figures = self._figures()
            logs.update(figures)
            # The trainer has noted its own already, and writes them into its checkpoints.
            state.log_history[-1].update(figures)

    def on_train_end(
        self, args: "TrainingArguments", state: "TrainerState", control: "TrainerControl", **kwargs: Any
    ) -> None:
        """Fold the model in place."""
        self._check_scores()
        self._training = False
        self._end()

    def _come_first(self) -> None:
        """Before the callbacks that write logs: they read what `on_log` has added.

        A trainer puts its users' callbacks behind its own, and tells them nothing of the others; but its handler is
        what calls.
        """
        frame = inspect.currentframe()
        while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
            frame = frame.f_back
        if frame is not None:
            callbacks: list[TrainerCallback] = frame.f_locals["self"].callbacks
            # In place, and none that follows moves: the handler is going through the list.
            callbacks.insert(0, callbacks.pop(next(i for i, each in enumerate(callbacks) if each is self)))


def _is_of(folder: Path, state: "TrainerState") -> bool:
    """Whether the folder is the checkpoint that a trainer's state was read from."""
    try:
        saved = json.loads((folder / _TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    # As text: a loss may be NaN, which equals nothing.
    history = [json.dumps(each, sort_keys=True) for each in (saved.get("log_history"), state.log_history)]
    return saved.get("global_step") == state.global_step and history[0] == history[1]
