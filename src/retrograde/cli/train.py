"""``retrograde train``: a training run by a recipe, resumable and measured."""

import itertools
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

import tyro

from retrograde.cli import output
from retrograde.cli.flags import DataFolder, Methods, RecipeFields, RecipeFile, Switch, said
from retrograde.cli.options import Given
from retrograde.cli.signals import stop_request
from retrograde.errors import OptionError
from retrograde.lab import tensorboard
from retrograde.lab.recipe import Recipe
from retrograde.lab.record import read_run
from retrograde.lab.trainer import CHECKPOINT_SECONDS, Progress, train
from retrograde.report.tables import run_table


@dataclass(frozen=True)
class Train:
    """Train a model; leave metrics.jsonl, a checkpoint, TensorBoard logs and the folded model in a run folder.

    Options of the chosen methods are flags: `retrograde train --method dither --help` lists them. A run that was
    interrupted or killed continues with --resume and the name of its folder.

    Attributes:
        recipe: TOML recipe. Command-line flags override it.
        method: Methods to attach, all of them together. Without any this is plain backpropagation.
        run_folder: Folder of the run.
        resume: Continue from the checkpoint in the run folder.
        data_dir: Folder that holds data sets.
        checkpoint_seconds: Time between checkpoints. One is written after each epoch as well.
        json: Print the result as JSON.
    """

    fields: RecipeFields
    recipe: RecipeFile = None
    method: Methods = ()
    run_folder: Annotated[Path | None, said("a new one below runs/", "PATH", "--out")] = None
    resume: Switch = False
    data_dir: DataFolder = None
    checkpoint_seconds: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = CHECKPOINT_SECONDS
    json: Switch = False

    def run(self, given: Given) -> int:
        """Train, then print the result."""
        if self.resume and self.run_folder is None:
            raise OptionError("--resume continues a run, and none is named. Add --run-folder PATH.")
        recipe = given.build(self.fields, self.method, self.data_dir)
        run_folder = self.run_folder or _new_folder(recipe)
        if not tensorboard.is_available():
            output.log.print("no TensorBoard logs: install retrograde[tensorboard] to have them", style="dim")
        output.log.print(f"run folder: {run_folder}", style="dim", highlight=False, markup=False)
        with output.progress(recipe.label, "loading data") as show, stop_request() as stop:

            def step(now: Progress) -> None:
                validation = f"  validation {now.validation['accuracy']:.1%}" if now.validation else ""
                show(f"epoch {now.epoch}  loss {now.loss:.3f}{validation}", now.step, now.steps)

            result = train(
                recipe,
                run_folder,
                data_dir=self.data_dir,
                resume=self.resume,
                progress=step,
                stop=stop,
                checkpoint_seconds=self.checkpoint_seconds,
            )
        table, folder = run_table(read_run(run_folder)), str(run_folder)
        output.tell({**result, "folder": folder}, table, f"folder: {folder}", as_json=self.json)
        return 0


def _new_folder(recipe: Recipe) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    model = recipe.model.replace(":", ".")
    methods = "+".join(recipe.methods) or "plain"
    folder = Path("runs") / f"{stamp}-{Path(recipe.data).name}-{model}-{methods}"
    candidates = itertools.chain(
        [folder], (folder.with_name(f"{folder.name}-{n}") for n in itertools.count(2))
    )
    return next(candidate for candidate in candidates if not candidate.exists())
