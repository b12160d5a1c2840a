"""``retrograde plan``: what would happen to each layer, and why, without training anything."""

import shlex
from dataclasses import dataclass
from functools import partial

from retrograde.cli import output
from retrograde.cli.flags import DataFolder, Methods, RecipeFields, RecipeFile, Switch
from retrograde.cli.options import Given
from retrograde.errors import OptionError
from retrograde.lab import data as lab_data
from retrograde.lab import measure, models
from retrograde.planning import make_plan


@dataclass(frozen=True)
class PlanCommand:
    """Show what attaching methods would do to each layer of a model, and why, without training it.

    Options of the chosen methods are flags: `retrograde plan --method dither --help` lists them.

    Attributes:
        recipe: TOML recipe. Command-line flags override it.
        method: Methods to attach, all of them together.
        data_dir: Folder that holds data sets.
        json: Print JSON.
    """

    fields: RecipeFields
    recipe: RecipeFile = None
    method: Methods = ()
    data_dir: DataFolder = None
    json: Switch = False

    def run(self, given: Given) -> int:
        """Print to stdout."""
        recipe = given.build(self.fields, self.method, self.data_dir)
        if not recipe.methods:
            raise OptionError("plan needs at least one method. Add --method NAME; see `retrograde methods`.")
        data = recipe.load_data(self.data_dir)
        model = models.build(recipe.model, data, seed=recipe.seed)
        x, y = lab_data.first_batch(data.train, recipe.batch_size, augment=recipe.augment)
        plan = make_plan(
            model,
            recipe.make_methods(),
            only=recipe.only,
            skip=recipe.skip,
            steps=recipe.length(data),
            example=partial(measure.batch_loss, model, x, y, recipe.precision, recipe.label_smoothing),
            decline=recipe.decline,
        )
        slower = [
            row.name
            for row in plan.attached
            if row.forecast is not None and row.forecast.attached > row.forecast.plain
        ]
        if self.json:
            found = {"model": recipe.model, "methods": recipe.methods, "slower": slower}
            output.print_json({**found, **plan.to_dict()})
        else:
            output.print_table(plan)
            _warn_slower(slower)
        return 0


def _warn_slower(names: list[str]) -> None:
    """A layer that attaching makes slower is worth a sentence: the figures alone are easily read past."""
    if names:
        them = ("1 layer is", "it") if len(names) == 1 else (f"{len(names)} layers are", "them")
        output.print_line(
            f"\n{them[0]} forecast slower attached than plain: {', '.join(names)}.\n"
            f"Add --decline to leave {them[1]} plain, or name layers: --skip {' '.join(map(shlex.quote, names[:3]))}"
            f"{' …' if len(names) > 3 else ''}"
        )
