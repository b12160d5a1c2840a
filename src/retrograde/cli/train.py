"""``retrograde train``: a training run by a recipe, resumable and measured."""

import itertools
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro

from retrograde.cli import output
from retrograde.cli.flags import DataFolder, Methods, RecipeFields, RecipeFile, Switch, said
from retrograde.cli.options import Given
from retrograde.cli.signals import stop_request
from retrograde.errors import OptionError
from retrograde.lab import tensorboard
from retrograde.lab.recipe import Recipe
from retrograde.lab.trainer import CHECKPOINT_SECONDS, Progress, train
from retrograde.report.table import Table, pairs


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
        result["folder"] = str(run_folder)
        if self.json:
            output.print_json(result)
        else:
            output.print_table(_table(recipe, result))
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


def _table(recipe: Recipe, result: dict[str, Any]) -> Table:
    flops, timing = result["flops"], result["timing"] or {}
    rows = [("methods", recipe.label), ("test accuracy", f"{result['test']['accuracy']:.2%}")]
    if result["zeros"] is not None:
        zeros = f"{result['zeros']:.1%} (of their own {result['own_zeros']:.1%})"
        rows.append(("zeros in the gradients", zeros))
    rows += [
        ("FLOPs, dense-equivalent", f"{flops['dense']:.3g}"),
        *(
            (f"FLOPs, {name}", f"{flops[name]:.3g} ({flops[name] / flops['dense']:.1%})")
            for name in ("needed", "executed", "discounted")
        ),
        ("fallbacks", str(result["fallbacks"])),
    ]
    if (ratio := timing.get("forecast_ratio")) is not None:
        rows.append(("forward and backward pass", f"forecast ×{ratio:.2f} of the plain model's time"))
    if (forecast := timing.get("backward_forecast")) is not None:
        both = f"{timing['backward_seconds'] * 1e3:.2f} ms a step, forecast {forecast * 1e3:.2f} ms"
        rows.append(("attached backward passes", both))
    seconds = f"{result['seconds']:.1f} s ({result['step_seconds'] * 1e3:.1f} ms a step)"
    return pairs("", [*rows, ("training time", seconds), ("folder", result["folder"])])
