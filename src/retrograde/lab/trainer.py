"""The training loop of experiments: resumable to the bit, and measured."""

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from retrograde.accounting.memory import peak_bytes
from retrograde.assignment import assign
from retrograde.errors import CheckpointError, OptionError
from retrograde.lab import data as lab_data
from retrograde.lab import files, machine, measure, models
from retrograde.lab.checkpoint import Checkpoint, State, misfit, read_checkpoint, restore
from retrograde.lab.data import Data
from retrograde.lab.generators import Generators, seeded
from retrograde.lab.recipe import Recipe
from retrograde.lab.record import (
    Description,
    Epoch,
    Flops,
    Outcome,
    Plan,
    Reading,
    Scores,
    Step,
    read_description,
)
from retrograde.lab.tensorboard import open_writer
from retrograde.patterns import escape
from retrograde.planning import make_plan
from retrograde.session import Session, attached

_LOG_EVERY = 10
_SHARPNESS_ROWS = 512
_FORWARD_ROWS = 128
_MEMORY_SAMPLES = 8
"""Steps of a run, about, before which the activations that a forward pass keeps are counted."""
CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True)
class Progress:
    """Where a run is, for a progress display.

    Attributes:
        epoch: from 1.
        step: steps done in the whole run.
        steps: steps of the whole run.
        loss: mean training loss of the epoch so far.
        validation: figures of the last finished epoch; empty before it.
    """

    epoch: int
    step: int
    steps: int
    loss: float
    validation: dict[str, float]


class Control(TypedDict, total=False):
    """How a run is watched, stopped and gone on with: arguments of `Trainer`."""

    resume: bool
    progress: Callable[[Progress], None]
    stop: Callable[[], bool]
    checkpoint_seconds: float


def train(
    recipe: Recipe, folder: Path, *, data_dir: Path | None = None, **control: Unpack[Control]
) -> dict[str, Any]:
    """Run `recipe` to its end and leave everything in `folder`.

    Args:
        recipe: what to train.
        folder: the run folder; made when missing.
        data_dir: where data sets lie; None reads ``RETROGRADE_DATA``.
        control: as of `Trainer`.

    Returns:
        The content of ``result.json``.

    Raises:
        KeyboardInterrupt: `stop` said so.
        CheckpointError: the folder holds a run and `resume` is off, or its checkpoint is unusable.
    """
    trainer = Trainer(recipe, folder, recipe.load_data(data_dir), **control)
    for _ in trainer.epochs():
        pass
    return trainer.finish()


class Trainer:
    """One run: steps, evaluations, checkpoints and logs.

    `epochs` yields after each epoch, so that several runs can be interleaved and share what the machine does to them.

    Args:
        recipe: what to train.
        folder: the run folder; made when missing.
        data: the loaded data set.
        resume: go on from the folder's checkpoint.
        progress: called after every step.
        stop: asked after every step; true writes a checkpoint and raises KeyboardInterrupt.
        checkpoint_seconds: time between checkpoints within an epoch.
        group: runs of one group are compared with each other in reports.
        label: the run's name in reports; None makes one from the methods.
    """

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        data: Data,
        *,
        resume: bool = False,
        progress: Callable[[Progress], None] = lambda now: None,
        stop: Callable[[], bool] = lambda: False,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
        group: str | None = None,
        label: str | None = None,
    ) -> None:
        self.recipe, self.folder, self.data = recipe, folder, data
        self._peers = recipe.make_peers()
        self._methods = [*recipe.make_methods(), *(m for p in self._peers if (m := p.method()) is not None)]
        if (recipe.only or recipe.skip) and not self._methods:
            raise OptionError("`only` and `skip` choose layers for methods, and no method is given. Add one.")
        self._progress, self._stop, self._checkpoint_seconds = progress, stop, checkpoint_seconds
        with contextlib.ExitStack() as opened:
            self._opened = opened
            self._set_up(resume, group, label)
            # Without an error they stay open.
            self._opened = opened.pop_all()

    def _set_up(self, resume: bool, group: str | None, label: str | None) -> None:
        recipe, folder, data = self.recipe, self.folder, self.data
        checkpoint = self._begun() if resume else None
        if checkpoint is None:
            _refuse_used(folder)
        elif checkpoint.recipe != recipe.model_dump():
            changed = [k for k, v in recipe.model_dump().items() if checkpoint.recipe.get(k) != v]
            raise CheckpointError(
                f"the checkpoint in {folder} belongs to another recipe: {', '.join(changed)} differ. Resume with the "
                "recipe that the run was started with, or start a new run in another folder."
            )
        self.device = pick_device(recipe.device)
        self.model = models.build(recipe.model, data, seed=recipe.seed, options=recipe.model_options).to(
            self.device
        )
        x, y = self._first_batch()
        measure.check_fit(recipe.model, self.model, data, x, y)
        self._rows = len(x)
        self._plain_flops = measure.step_flops(self.model, x, y)
        self._cuda = [self.device] if self.device.type == "cuda" else []
        with seeded(recipe.seed, self._cuda):
            for peer in self._peers:
                self.model = peer.prepare(self.model, x[:2])
        self._steps_in_epoch = lab_data.steps_in_epoch(data.train, recipe.batch_size)
        self.steps = recipe.length(data)
        self.session = self._attach(x, y, checkpoint)
        self._saved_bytes = measure.saved_activation_bytes(self.model, x, y, recipe.precision)
        self._forward = torch.compile(self.model) if recipe.compile else self.model
        self.optimizer = recipe.make_optimizer(self.model, self._peers)
        self._selector = next((s for p in self._peers if (s := p.selector(recipe.seed)) is not None), None)
        self._second_pass = any(peer.second_pass for peer in self._peers)
        self._schedule = recipe.make_schedule(self.optimizer, self.steps)
        # Odd, because methods alternate between two or four kinds of steps.
        self._memory_stride = max(1, self.steps // _MEMORY_SAMPLES) | 1
        self._generators = Generators(self._cuda)
        self._parts: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "schedule": self._schedule,
            "session": self.session,
            "selector": self._selector,
        }
        with seeded(recipe.seed, self._cuda):
            self.state = State(rng=self._generators.state_dict())
        if checkpoint is not None:
            self._restore(checkpoint)
        else:
            self._begin(group, label)
        with files.writing(folder):
            self._metrics = self._opened.enter_context((folder / files.METRICS).open("ab"))
            # Lines written after the checkpoint belong to steps that will run again.
            self._metrics.truncate(0 if checkpoint is None else checkpoint.metrics_bytes)
            self._metrics.seek(0, os.SEEK_END)
            self._writer = open_writer(
                folder / "tensorboard", purge_step=None if checkpoint is None else self.state.step + 1
            )
            if self._writer is not None:
                self._opened.callback(self._writer.close)
        self._saved_at = time.monotonic()
        if checkpoint is None:
            self.save()

    # Running.

    def epochs(self) -> Iterator[int]:
        """Train; yields the number of each finished epoch."""
        try:
            while self.state.finished_epochs < math.ceil(self.steps / self._steps_in_epoch):
                epoch = self.state.finished_epochs + 1
                self._run_epoch(epoch)
                self._finish_epoch(epoch)
                yield epoch
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                self._write_result("interrupted", {})
            self.close()
            raise

    def finish(self, *, trial: bool = False, measures: Collection[str] = ()) -> dict[str, Any]:
        """Read the test set, once; write the result and the folded model.

        Args:
            trial: of a search, which must not read the test set and keeps no model: the result alone is written.
            measures: figures to take of the trained model: see `retrograde.lab.claims.definition.Measure`.
        """
        try:
            return self._write_result("finished", {} if trial else self._finish_model(measures))
        finally:
            self.close()

    def _finish_model(self, measures: Collection[str]) -> dict[str, Any]:
        """Test, fold and write the model; what the result says of that."""
        if self.state.best_weights is not None:
            self.model.load_state_dict(self.state.best_weights)
        test = measure.evaluate(self.model, self.data.test, self.device, self.recipe.precision)
        # What must fit is the most: methods keep other things when they have warmed up than in their first step.
        saved = measure.saved_activation_bytes(self.model, *self._first_batch(), self.recipe.precision)
        self._saved_bytes = max(self._saved_bytes, saved)
        taken: dict[str, float] = {}
        if "step_peak_bytes" in measures:
            taken["step_peak_bytes"] = self._step_peak()
        plain = self.session.fold() if self.session else self.model
        for peer in reversed(self._peers):
            plain = peer.finish(plain)
        files.save_model(self.folder, plain)
        if "auc" in measures:
            taken["auc"] = measure.auc(plain, self.data.test, self.device, self.recipe.precision)
        if "sharpness" in measures:
            x, y = lab_data.first_batch(self.data.train, _SHARPNESS_ROWS)
            taken["sharpness"] = measure.sharpness(plain, x.to(self.device), y.to(self.device))
        if not {"macs", "forward_seconds_128"}.isdisjoint(measures):
            x = lab_data.first_batch(self.data.train, _FORWARD_ROWS)[0].to(self.device)
            taken["macs"] = measure.macs_of(plain, x[:1])
            taken["forward_seconds_128"] = measure.forward_seconds(plain, x)
        return {"test": test, "measures": taken, "model_file": files.MODEL}

    def _step_peak(self) -> float:
        """Most bytes of tensors in one more step, which leaves the weights as they were."""
        x, y = self._first_batch()
        before = {name: value.clone() for name, value in self.model.state_dict().items()}

        def back() -> float:
            loss, _ = self._loss(x, y)
            loss.backward()
            return float(loss.detach())

        def step() -> None:
            back()
            self._take_step(back)

        self.model.train()
        most = peak_bytes(step)
        self.optimizer.zero_grad()
        self.model.load_state_dict(before)
        return float(most)

    def keep(self) -> None:
        """Write the checkpoint of a run that is broken off between two epochs, and close it."""
        if not self._metrics.closed:
            self.save()
            self.close()

    def close(self) -> None:
        """Close the log files, and let others train in the folder."""
        # What a full disk did not take has been reported when it was written.
        with contextlib.suppress(OSError):
            self._opened.close()

    def _run_epoch(self, epoch: int) -> None:
        self.model.train()
        done = self.state
        first, last = self._range(epoch - 1)
        parts = self.recipe.evaluations
        readings = {first + round((last - first) * (i + 1) / parts) for i in range(parts - 1)} - {last}
        batches = lab_data.batches(
            self.data.train,
            self.recipe.batch_size,
            seed=self.recipe.seed,
            epoch=epoch - 1,
            augment=self.recipe.augment,
            start=done.step - first,
        )
        with torch.random.fork_rng(self._cuda):
            self._generators.load_state_dict(done.rng)
            for x, y in itertools.islice(batches, last - done.step):
                if self.session is not None and done.step % self._memory_stride == 0:
                    # With some methods it differs from step to step.
                    batch = x.to(self.device), y.to(self.device)
                    found = measure.saved_activation_bytes(self.model, *batch, self.recipe.precision)
                    done.passes["saved_bytes"] += found
                    done.passes["samples"] += 1
                self._run_step(epoch, x, y)
                if done.step in readings:
                    self._evaluate(epoch)
                    scores: Scores = {**done.validation}
                    reading = Reading(epoch=epoch, step=done.step, validation=scores, seconds=done.seconds)
                    self._log(reading, {})
                done.rng = self._generators.state_dict()
                # Only between steps is there a state to save: a signal may come in the middle of an update.
                if self._stop():
                    self.save()
                    raise KeyboardInterrupt
                if time.monotonic() - self._saved_at > self._checkpoint_seconds:
                    self.save()

    def _range(self, epoch: int) -> tuple[int, int]:
        """The steps of the run before an epoch, counted from 0, and at its end."""
        first, last = (min(n * self._steps_in_epoch, self.steps) for n in (epoch, epoch + 1))
        return first, last

    def _run_step(self, epoch: int, x: Tensor, y: Tensor) -> None:
        done, began = self.state, time.perf_counter()
        x, y = x.to(self.device), y.to(self.device)
        if self._selector is not None:
            index = self._selector.select(partial(self._losses, x, y), len(x))
            done.passes["forward"] += 1
            x, y = x[index], y[index]
        loss, logits = self._pass(x, y)
        self._take_step(lambda: float(self._pass(x, y)[0].detach()))
        self._schedule.step()
        self.optimizer.zero_grad()
        value = float(loss.detach())
        took = time.perf_counter() - began
        done.step += 1
        done.seconds += took
        done.step_seconds.append(took)
        sums, count = done.epoch_sums, y.numel()
        sums["loss"] += value * count
        sums["correct"] += int((logits.argmax(-1) == y).sum())
        sums["count"] += count
        if done.step % _LOG_EVERY == 0 or done.step == self.steps:
            rate = float(self._schedule.get_last_lr()[0])
            step = Step(step=done.step, epoch=epoch, loss=value, learning_rate=rate, seconds=done.seconds)
            self._log(step, {"train/loss": value, "train/learning_rate": rate})
        mean = sums["loss"] / sums["count"]
        self._progress(Progress(epoch, done.step, self.steps, mean, done.validation))

    def _take_step(self, again: Callable[[], float]) -> None:
        """The optimizer's; `again` is a pass more, for one that takes two."""
        if self._second_pass:
            self.optimizer.step(again)
        else:
            self.optimizer.step()

    def _loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the logits."""
        with measure.autocast(self.device, self.recipe.precision):
            logits = self._forward(x)
            return measure.loss_of(logits.float(), y, self.recipe.label_smoothing), logits

    def _pass(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Forward and backward: the loss, and the logits."""
        loss, logits = self._loss(x, y)
        began = time.perf_counter()
        loss.backward()
        self.state.backward_seconds += time.perf_counter() - began
        for part in ("forward", "backward"):
            self.state.passes[part] += len(x) / self._rows
        return loss, logits

    def _losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Loss of each example (B,), without a graph."""
        with torch.no_grad(), measure.autocast(self.device, self.recipe.precision):
            return measure.losses_of(self._forward(x).float(), y)

    def _evaluate(self, epoch: int) -> None:
        """Read the validation split; keep the best."""
        done = self.state
        done.validation = measure.evaluate(
            self.model, self.data.validation, self.device, self.recipe.precision
        )
        if not done.best or done.validation["accuracy"] > done.best["accuracy"]:
            done.best = {"epoch": epoch, **done.validation}
            if self.recipe.keep == "best":
                done.best_weights = {k: v.clone() for k, v in self.model.state_dict().items()}

    def _finish_epoch(self, epoch: int) -> None:
        done = self.state
        sums = done.epoch_sums
        seen: Scores = {
            "loss": sums["loss"] / sums["count"],
            "accuracy": sums["correct"] / sums["count"],
        }
        self._evaluate(epoch)
        figures: dict[str, Any] = {}
        scalars = {f"validation/{name}": value for name, value in done.validation.items()}
        if self.session:
            self.session.validated(done.validation["accuracy"])
            figures = {**self.session.metrics(reset=True), "flops": self.session.flops().to_dict()}
            scalars |= {f"gradients/{name}": figures[name] for name in ("zeros", "own_zeros")}
        end = Epoch(
            epoch=epoch,
            step=done.step,
            train=seen,
            validation=dict(done.validation),
            seconds=done.seconds,
            step_seconds=median(done.step_seconds) if done.step_seconds else None,
            **figures,
        )
        self._log(end, scalars)
        done.step_seconds.clear()
        done.epoch_sums = dict.fromkeys(sums, 0.0)
        done.finished_epochs = epoch
        self.save()

    def _log(self, event: Step | Reading | Epoch, scalars: dict[str, float]) -> None:
        """Write a line of the metrics, and what TensorBoard shows of it."""
        with files.writing(self.folder / files.METRICS):
            self._metrics.write(files.to_json(event.to_dict()).encode() + b"\n")
            self._metrics.flush()
        if self._writer is not None:
            with files.writing(self.folder / "tensorboard"):
                for name, value in scalars.items():
                    self._writer.add_scalar(name, value, event.step)

    def _first_batch(self) -> tuple[Tensor, Tensor]:
        # Everything that the run will ask of its batches is asked here, before anything is written.
        x, y = lab_data.first_batch(self.data.train, self.recipe.batch_size, augment=self.recipe.augment)
        return x.to(self.device), y.to(self.device)

    def _attach(self, x: Tensor, y: Tensor, checkpoint: Checkpoint | None) -> Session | None:
        """Attach, with a forecast from the batch; a run that goes on has one, and the layers that it led to."""
        recipe = self.recipe
        if not self._methods:
            self._plan = make_plan(self.model, [])
            return None
        only, skip = recipe.only, recipe.skip
        rows = () if checkpoint is None else read_description(self.folder).plan.layers
        if any(row.status == "declined" for row in rows):
            only, skip = [escape(row.name) for row in rows if row.status == "attached"], None
            if not only:
                return None
        loss = partial(measure.batch_loss, self.model, x, y, recipe.precision, recipe.label_smoothing)
        session = attached(
            self.model,
            assign(self._methods).for_run(self.steps),
            only,
            skip,
            optimizer=None,
            strict=True,
            seed=recipe.seed,
            example=loss if checkpoint is None else None,
            decline=recipe.decline,
            plain=True,
        )
        self._plan = session.plan
        return session if self._plan.attached else None

    # State.

    def save(self) -> None:
        """Write the checkpoint."""
        # The checkpoint names a length of this file: the bytes must be on disk before it is.
        with files.writing(self.folder / files.METRICS):
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        files.save_checkpoint(
            self.folder,
            {
                **dict(self.state),
                **{k: None if part is None else part.state_dict() for k, part in self._parts.items()},
                "recipe": self.recipe.model_dump(),
                "clocked": self._backward_seconds(),
                "metrics_bytes": self._metrics.tell(),
            },
        )
        self._saved_at = time.monotonic()

    def _begun(self) -> Checkpoint:
        """The checkpoint of the folder's run, which no other process goes on with."""
        if not os.path.isdir(self.folder):
            raise CheckpointError(f"there is no run folder {self.folder}. Start the run without --resume.")
        self._opened.enter_context(files.locked(self.folder))
        # The end of the run will read it.
        read_description(self.folder)
        return read_checkpoint(self.folder)

    def _restore(self, state: Checkpoint) -> None:
        first, last = self._range(state.finished_epochs)
        if not first <= state.step <= last:
            why = f"{state.step} is not one of {first} to {last}, where {state.finished_epochs} epochs are finished"
            raise misfit(self.folder, "step", why)
        own = self._schedule.state_dict()
        if {k: type(v) for k, v in own.items()} != {k: type(v) for k, v in state.schedule.items()} or (
            state.schedule["last_epoch"] != state.step
        ):
            raise misfit(self.folder, "schedule", "it is another schedule, or at another step")
        for name, part in self._parts.items():
            if part is not None:
                restore(self.folder, name, part, getattr(state, name))
        with torch.random.fork_rng(self._cuda):
            restore(self.folder, "rng", self._generators, state.rng)
        self.state = State(**{name: getattr(state, name) for name in State.model_fields})

    def _begin(self, group: str | None, label: str | None) -> None:
        """Make the folder this run's own."""
        with files.writing(self.folder, ValueError):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._opened.enter_context(files.locked(self.folder))
        # Another process may have been faster.
        _refuse_used(self.folder)
        recipe = self.recipe
        description = Description(
            name=self.folder.name,
            label=label or recipe.label,
            baseline=recipe.plain,
            group=group or f"{recipe.data} · {recipe.model}",
            recipe=recipe.model_dump(),
            machine=machine.describe(self.device),
            commit=machine.commit(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            plan=Plan.model_validate(self._plan.to_dict()),
        )
        files.write_json(self.folder / files.RUN, description.to_dict())

    def _backward_seconds(self) -> dict[str, tuple[float, int]]:
        """Of each attached layer in the whole run, with the steps that they were for."""
        now = self.session.backward_seconds() if self.session else {}
        before = self.state.clocked
        return {
            name: (seconds + before.get(name, (0.0, 0))[0], steps + before.get(name, (0.0, 0))[1])
            for name, (seconds, steps) in now.items()
        }

    def _write_result(
        self, status: Literal["finished", "interrupted"], model: dict[str, Any]
    ) -> dict[str, Any]:
        """Write what is known; `model` is what `_finish_model` found, nothing where it has not run."""
        done, passes = self.state, self.state.passes
        again = self._second_pass or self._selector is not None
        flops = measure.whole_flops(
            self.session,
            self._plain_flops,
            done.step,
            passes=(passes["forward"], passes["backward"]) if again else None,
            precision=self.recipe.precision,
        )
        counts: dict[str, Any] = {}
        if self.session:
            summary = self.session.summary()
            forecast = read_description(self.folder).plan.forecast
            counts = {name: getattr(summary, name) for name in ("zeros", "own_zeros", "fallbacks")}
            counts["timing"] = measure.timing(self._backward_seconds(), forecast)
        # The host does not wait for a GPU's backward pass.
        timed = done.step and self.device.type == "cpu"
        samples = passes["samples"]
        outcome = Outcome(
            status=status,
            epochs=done.finished_epochs,
            steps=done.step,
            seconds=done.seconds,
            step_seconds=done.seconds / done.step if done.step else None,
            backward_seconds=done.backward_seconds / done.step if timed else None,
            parameters=sum(p.numel() for p in self.model.parameters()),
            best_validation=dict(done.best) or None,
            validation=dict(done.validation) or None,
            flops=Flops.model_validate(flops),
            saved_activation_bytes=self._saved_bytes,
            mean_saved_activation_bytes=passes["saved_bytes"] / samples if samples else self._saved_bytes,
            peak_memory_bytes=measure.peak_memory(self.device),
            **counts,
            **model,
        )
        files.write_json(self.folder / files.RESULT, outcome.to_dict())
        return outcome.to_dict()


def pick_device(name: str) -> torch.device:
    """The device of a recipe: ``auto`` is a GPU when there is one.

    Raises:
        OptionError: ``cuda`` without a CUDA device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("device='cuda': torch finds no CUDA device here. Use cpu, or auto.")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _refuse_used(folder: Path) -> None:
    # A run that was killed before its first checkpoint has nothing to lose.
    if any(os.path.exists(folder / name) for name in (files.CHECKPOINT, files.RESULT)):
        raise CheckpointError(
            f"the folder {folder} holds a run already, and starting anew would overwrite it. Go on with it (--resume), "
            "or choose another folder (--out)."
        )
