"""The callback in Hugging Face's `Trainer`: when it attaches, what it tells, logs, saves and leaves, and its errors."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import retrograde as rg
from retrograde.engine.layers import AttachedLayer
from retrograde.errors import AttachError, OptionError, RetrogradeWarning, StateError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from retrograde.integrations.transformers import SESSION_FILE, RetrogradeCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::retrograde.errors.RetrogradeWarning"),
]


class Classifier(nn.Module):
    """No model of the library's: whatever returns a loss can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.last(self.first(x).relu())
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(seed: int = 0) -> list[dict[str, Any]]:
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(seed))
    return [{"x": each, "labels": int(each.sum() > 0)} for each in x]


def make(
    folder: Path, callback: Any, arguments: dict[str, Any] | None = None, **options: Any
) -> "transformers.Trainer":
    """A trainer of 8 steps, with an evaluation and a checkpoint every 2."""
    chosen = {
        "max_steps": 8,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 2,
        **(arguments or {}),
    }
    args = transformers.TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, **chosen)
    model = {} if "model_init" in options else {"model": Classifier()}
    sets = {"train_dataset": rows(), "eval_dataset": rows(1)}
    return transformers.Trainer(**{**model, **sets, **options}, args=args, callbacks=[callback])


def attached(model: nn.Module) -> bool:
    return any(isinstance(module, AttachedLayer) for module in model.modules())


def scores(callback: RetrogradeCallback) -> list[Any]:
    assert callback.session is not None
    return callback.session.state_dict()["scores"]


# Attaching.


def test_attached_until_the_end(tmp_path: Path) -> None:
    """From when the trainer is made, on the named layers alone; afterwards the very model is plain."""
    callback = RetrogradeCallback(rg.Dither(), skip="last")
    trainer = make(tmp_path, callback)
    assert isinstance(trainer.model.first, AttachedLayer)
    assert not isinstance(trainer.model.last, AttachedLayer)
    trainer.train()
    assert callback.session is not None
    assert callback.session.step == 8
    assert callback.session.model is trainer.model
    assert not attached(trainer.model)
    assert type(trainer.model.first) is nn.Linear


def test_left_attached(tmp_path: Path) -> None:
    """And then a second training goes on with the same session."""
    callback = RetrogradeCallback(rg.Dither(), fold=False)
    trainer = make(tmp_path, callback)
    trainer.train()
    assert attached(trainer.model)
    trainer.train()
    assert callback.session is not None
    assert callback.session.step == 16


def test_trained_again_after_the_fold(tmp_path: Path) -> None:
    callback = RetrogradeCallback(rg.Dither())
    trainer = make(tmp_path, callback)
    trainer.train()
    first = callback.session
    trainer.train()
    assert callback.session is not first
    assert callback.session is not None
    assert callback.session.step == 8


def test_optimizer_of_the_users(tmp_path: Path) -> None:
    """It will do where no method adds parameters; else it is refused, and the model is left plain."""
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters())
    callback = RetrogradeCallback(rg.Dither())
    make(tmp_path, callback, model=model, optimizers=(optimizer, None)).train()
    assert callback.session is not None
    assert callback.session.step == 8
    with pytest.raises(AttachError, match="optimizer was made before"):
        make(tmp_path, RetrogradeCallback(rg.Perforate()), model=model, optimizers=(optimizer, None))
    assert not attached(model)
    assert type(model.first) is nn.Linear


def test_session_that_is_there(tmp_path: Path) -> None:
    """Without methods: the user attached, and made the optimizer."""
    model = Classifier()
    session = rg.attach(model, rg.Perforate(period=3))
    optimizer = torch.optim.AdamW(model.parameters())
    callback = RetrogradeCallback()
    make(tmp_path, callback, model=model, optimizers=(optimizer, None)).train()
    assert callback.session is session
    assert session.step == 8


def test_model_init(tmp_path: Path) -> None:
    """The trainer makes another model when it trains, and its optimizer before it tells a callback."""
    callback = RetrogradeCallback(rg.Dither())
    trainer = make(tmp_path, callback, model_init=Classifier)
    trainer.train()
    assert callback.session is not None
    assert callback.session.model is trainer.model
    assert callback.session.step == 8
    with pytest.raises(AttachError, match="inside of model_init"):
        make(tmp_path, RetrogradeCallback(rg.Perforate()), model_init=Classifier).train()

    def attached_model() -> nn.Module:
        model = Classifier()
        rg.attach(model, rg.Perforate())
        return model

    callback = RetrogradeCallback()
    make(tmp_path, callback, model_init=attached_model).train()
    assert callback.session is not None
    assert callback.session.step == 8


def test_nothing_to_attach(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="given no methods"):
        make(tmp_path, RetrogradeCallback())
    with pytest.raises(OptionError, match="no option sklp"):
        RetrogradeCallback(rg.Dither(), sklp="last")  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="no methods to attach"):
        RetrogradeCallback(skip="last")
    with pytest.raises(OptionError):
        RetrogradeCallback("dither")  # type: ignore[arg-type]


def test_gradient_accumulation_and_autocast(tmp_path: Path) -> None:
    """A step of the optimizer is one of the session."""
    callback = RetrogradeCallback(rg.Dither())
    make(tmp_path, callback, {"gradient_accumulation_steps": 2, "bf16": True}).train()
    assert callback.session is not None
    assert callback.session.step == 8


# Scores.


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


@pytest.mark.parametrize(
    ("arguments", "options", "metric", "sign"),
    [
        ({}, {}, "eval_loss", -1),
        ({"metric_for_best_model": "accuracy"}, {}, "eval_accuracy", 1),
        ({"metric_for_best_model": "accuracy", "greater_is_better": False}, {}, "eval_accuracy", -1),
        ({}, {"metric": "accuracy"}, "eval_accuracy", 1),
        ({"metric_for_best_model": "accuracy"}, {"metric": "eval_loss"}, "eval_loss", -1),
        ({}, {"metric": "accuracy", "greater_is_better": False}, "eval_accuracy", -1),
    ],
)
def test_scores(
    arguments: dict[str, Any], options: dict[str, Any], metric: str, sign: int, tmp_path: Path
) -> None:
    """Each evaluation within training, and none outside of it."""
    callback = RetrogradeCallback(rg.Dither(), fold=False, **options)
    trainer = make(tmp_path, callback, arguments, compute_metrics=accuracy)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    log = trainer.state.log_history
    assert scores(callback) == [[each["step"], sign * each[metric]] for each in log if metric in each][:4]
    assert len(scores(callback)) == 4


def test_several_sets(tmp_path: Path) -> None:
    """Each is an evaluation of its own, of which one has the metric."""
    callback = RetrogradeCallback(rg.Dither(), metric="second_loss")
    trainer = make(tmp_path, callback, eval_dataset={"first": rows(1), "second": rows(2)})
    trainer.train()
    found = [each["eval_second_loss"] for each in trainer.state.log_history if "eval_second_loss" in each]
    assert [-score for _, score in scores(callback)] == found


def test_no_such_metric(tmp_path: Path) -> None:
    """An error where the user named it, a warning where nobody did."""
    with pytest.raises(OptionError, match=r"no metric 'eval_f1'.*eval_loss"):
        make(tmp_path, RetrogradeCallback(rg.Dither(), metric="f1")).train()
    trainer = make(tmp_path, RetrogradeCallback(rg.Dither()), eval_dataset={"first": rows(1)})
    with pytest.warns(RetrogradeWarning, match=r"no metric 'eval_loss'.*eval_first_loss"):
        trainer.train()


def test_score_that_is_no_number(tmp_path: Path) -> None:
    """A warning, and training goes on."""
    callback = RetrogradeCallback(rg.Dither(), metric="nothing", fold=False)
    trainer = make(tmp_path, callback, compute_metrics=lambda _: {"nothing": float("nan")})
    with pytest.warns(RetrogradeWarning, match="eval_nothing is nan"):
        trainer.train()
    assert scores(callback) == []


# The log.


def test_log(tmp_path: Path) -> None:
    """Each log of training has the figures since the last one; those of evaluations have none."""
    seen: list[dict[str, float]] = []

    class Reporter(transformers.TrainerCallback):
        """As the library's own, which come before the users'."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    callback = RetrogradeCallback(rg.Dither(scale=2.0))
    trainer = make(tmp_path, callback)
    trainer.callback_handler.callbacks.insert(0, Reporter())
    trainer.train()
    training = [each for each in seen if "loss" in each]
    assert len(training) == 4
    assert all(0 < each["retrograde/zeros"] <= 1 for each in training)
    assert len({each["retrograde/zeros"] for each in training}) > 1
    assert not any(key.startswith("retrograde/layers") for each in seen for key in each)
    assert all(("retrograde/zeros" in each) == ("loss" in each) for each in seen)
    history = [each for each in trainer.state.log_history if "loss" in each]
    assert [each["retrograde/zeros"] for each in history] == [each["retrograde/zeros"] for each in training]


def test_log_of_layers(tmp_path: Path) -> None:
    trainer = make(tmp_path, RetrogradeCallback(rg.Dither(), log_layers=True))
    trainer.train()
    assert "retrograde/layers/first/zeros" in trainer.state.log_history[0]


# Checkpoints. That resumed runs are equal to others is in test_documented.py.


def test_session_file(tmp_path: Path) -> None:
    """Of each checkpoint, and it can be resumed from without a trainer, too."""
    callback = RetrogradeCallback(rg.Dither(), only="first")
    make(tmp_path, callback).train()
    assert {path.parent.name for path in tmp_path.glob(f"*/{SESSION_FILE}")} == {
        f"checkpoint-{step}" for step in (2, 4, 6, 8)
    }
    session = rg.resume(Classifier(), tmp_path / "checkpoint-4" / SESSION_FILE)
    assert session.step == 4
    assert session.methods == (rg.Dither(),)


def test_no_file_where_nothing_resumes(tmp_path: Path) -> None:
    make(tmp_path, RetrogradeCallback(rg.Dither()), {"save_only_model": True}).train()
    assert not list(tmp_path.glob(f"*/{SESSION_FILE}"))


def test_checkpoint_elsewhere(tmp_path: Path) -> None:
    """It must be named, even where the output folder has another run's checkpoint of the same step."""
    make(tmp_path / "a", RetrogradeCallback(rg.Dither())).train()
    make(tmp_path / "b", RetrogradeCallback(rg.Dither(scale=3.0))).train()
    at = str(shutil.copytree(tmp_path / "a" / "checkpoint-4", tmp_path / "kept"))
    for folder in ("b", "c"):
        with pytest.raises(StateError, match="not the checkpoint that it was resumed from"):
            make(tmp_path / folder, RetrogradeCallback(rg.Dither())).train(resume_from_checkpoint=at)
    callback = RetrogradeCallback(rg.Dither())
    make(tmp_path / "c", callback, {"resume_from_checkpoint": at}).train(resume_from_checkpoint=at)
    assert callback.session is not None
    assert callback.session.step == 8


def test_checkpoint_without_session(tmp_path: Path) -> None:
    """Cut off, or of a run without the callback: a warning, and the methods begin."""
    make(tmp_path, RetrogradeCallback(rg.Dither())).train()
    (tmp_path / "checkpoint-4" / SESSION_FILE).unlink()
    callback = RetrogradeCallback(rg.Dither())
    trainer = make(tmp_path, callback)
    with pytest.warns(RetrogradeWarning, match=r"checkpoint-4 has no retrograde_session\.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.session is not None
    assert callback.session.step == 4


def test_layers_that_a_forecast_declines(tmp_path: Path) -> None:
    """They are attached where they were in the checkpoint's run, whatever is forecast when it is resumed."""
    methods = {"first": rg.Decorrelate(rank=8), "last": rg.Dither()}
    make(tmp_path, RetrogradeCallback(methods)).train()
    batch = {"x": torch.randn(4, 8), "labels": torch.zeros(4, dtype=torch.long)}
    model = Classifier()
    callback = RetrogradeCallback(methods, strict=False, fold=False, example=lambda: model(**batch)["loss"])
    trainer = make(tmp_path, callback, model=model)
    assert not isinstance(model.last, AttachedLayer)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.session is not None
    assert callback.session.step == 8
    assert isinstance(model.last, AttachedLayer)


def test_damaged_session(tmp_path: Path) -> None:
    make(tmp_path, RetrogradeCallback(rg.Dither())).train()
    (tmp_path / "checkpoint-4" / SESSION_FILE).write_bytes(b"nothing")
    with pytest.raises(StateError, match="cannot be read"):
        make(tmp_path, RetrogradeCallback(rg.Dither())).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-4")
        )
