"""``retrograde plan``: what would happen to each layer, and why, without training anything."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from retrograde.cli import output
from retrograde.cli.flags import RecipeFlags
from retrograde.cli.options import Given
from retrograde.errors import OptionError
from retrograde.lab import data as lab_data
from retrograde.lab import measure, models
from retrograde.planning import make_plan


@dataclass(frozen=True)
class PlanCommand:
    """Show what attaching methods would do to each layer of a model, and why.

    Options of the chosen methods are flags too: --scale 2, or --dither.scale 2.

    Attributes:
        recipe: TOML recipe; flags given beside it win.
        method: methods to attach.
        data_dir: folder that holds data sets; default: the environment variable RETROGRADE_DATA.
        json: print JSON.
    """

    fields: Annotated[Any, tyro.conf.arg(name="")] = field(default_factory=RecipeFlags)
    recipe: Path | None = None
    method: tuple[str, ...] = ()
    data_dir: Path | None = None
    json: bool = False

    def run(self, given: Given) -> int:
        """Print to stdout."""
        recipe = given.build(self.fields, self.method)
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
            example=partial(measure.batch_loss, model, x, y, recipe.precision, recipe.label_smoothing),
            decline=recipe.decline,
        )
        if self.json:
            output.print_json({"model": recipe.model, "methods": recipe.methods, **plan.to_dict()})
        else:
            output.print_table(plan)
        return 0


# The flags' class is made from the recipe; a checker cannot follow that, tyro can.
PlanCommand.__annotations__["fields"] = Annotated[RecipeFlags, tyro.conf.arg(name="")]
