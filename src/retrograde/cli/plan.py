"""``retrograde plan``: what would happen to each layer, and why, without training anything."""

import shlex
from dataclasses import dataclass
from functools import partial

from retrograde.cli import output
from retrograde.cli.flags import DataFolder, Methods, PlanFields, RecipeFile, Switch
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

    fields: PlanFields
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
        model = models.build(recipe.model, data, seed=recipe.seed, options=recipe.model_options)
        x, y = lab_data.first_batch(data.train, recipe.batch_size, augment=recipe.augment)
        measure.check_fit(recipe.model, model, data, x, y)
        methods = recipe.make_methods()
        plan = make_plan(
            model,
            methods,
            only=recipe.only,
            skip=recipe.skip,
            steps=recipe.length(data),
            example=partial(measure.batch_loss, model, x, y, recipe.precision, recipe.label_smoothing),
            decline=recipe.decline,
        )
        # Other methods are there for something else, and never declined.
        fast = {method.name for method in methods if method.saves_time}
        slower = [
            row.name
            for row in plan.attached
            if row.forecast and row.forecast.attached > row.forecast.plain and fast.issuperset(row.methods)
        ]
        content = {"model": recipe.model, "methods": recipe.methods, "slower": slower, **plan.to_dict()}
        output.tell(content, plan, *_warning(slower), as_json=self.json)
        return 0


def _warning(slower: list[str]) -> list[str]:
    """Layers that attaching makes slower are worth a sentence: the figures alone are easily read past."""
    if not slower:
        return []
    layers, them = ("1 layer is", "it") if len(slower) == 1 else (f"{len(slower)} layers are", "them")
    names = " ".join(map(shlex.quote, slower[:3])) + (" …" if len(slower) > 3 else "")
    return [
        f"\n{layers} forecast slower attached than plain: {', '.join(slower)}.",
        f"Leave {them} plain with --decline, the default, or by name: --skip {names}",
    ]
