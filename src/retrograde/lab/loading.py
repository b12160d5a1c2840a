"""The network that a run has trained, as a module again."""

from pathlib import Path

from torch import nn

from retrograde.assignment import assign
from retrograde.errors import OptionError, RunError
from retrograde.lab import files, models
from retrograde.lab.data import first_batch
from retrograde.lab.recipe import make_recipe
from retrograde.lab.record import read_description
from retrograde.methods.perforate.dendrites import regrow
from retrograde.patterns import escape
from retrograde.session import attached


def load_run(
    folder: str | Path, *, model: str | None = None, data_dir: str | Path | None = None
) -> nn.Module:
    """The trained network of a finished run: folded, an ordinary module, in evaluation mode and on the CPU.

    It is built as the run built it, in the shape that peers gave it, with the dendrites that it grew. Its inputs are
    what they were in training: images standardised by the channels' means and deviations over the training rows, or,
    of a run with ``standardise=False``, pixels from 0 to 1.

    Args:
        folder: of a run of `retrograde train`, or of one within a comparison; `Step.run` of `rg.compress` is one.
        model: ``"module:callable"`` of a run whose network is your own code: a folder alone must not run any.
        data_dir: where data sets lie, by which a network's inputs and classes are known; None reads
            ``RETROGRADE_DATA``.

    Raises:
        RunError: there is no finished run, or it kept no network, as trials of a search do.
        OptionError: the run names code as its model, and `model` does not.
        DataError: the data set is not there.
    """
    folder = Path(folder)
    description, path = read_description(folder), folder / files.MODEL
    if not path.is_file():
        raise RunError(
            f"the run in {folder} has no {files.MODEL}: it has not finished, or is a trial of a search, which keeps no "
            "network. Resume it, or give the folder of a finished run."
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file, load_model

    recipe = make_recipe(description.recipe, str(folder / files.RUN))
    if model is not None:
        recipe = recipe.model_copy(update={"model": model})
    elif ":" in recipe.model:
        raise OptionError(
            f"load_run: {folder / files.RUN} names code as its model, {recipe.model!r}, which a folder alone must not "
            f"run. Where you trust that code, name it: load_run({str(folder)!r}, model={recipe.model!r})."
        )
    data = recipe.load_data(None if data_dir is None else Path(data_dir))
    network = models.build(recipe.model, data, seed=recipe.seed, options=recipe.model_options)
    peers, example = recipe.make_peers(), first_batch(data.train, 2)[0]
    for peer in peers:
        network = peer.prepare(network, example)
    try:
        state = load_file(path)
        if any("dendrites." in key for key in state):
            names = [escape(row.name) for row in description.plan.layers if row.status == "attached"]
            methods = assign(recipe.make_methods()).for_run(recipe.length(data))
            session = attached(network, methods, names, None, None, False, recipe.seed, None, False)
            regrow(network, state)
            network = session.fold()
        for peer in reversed(peers):
            network = peer.finish(network)
        load_model(network, path)
    except (SafetensorError, RuntimeError) as error:
        raise RunError(
            f"{path} does not fit {recipe.model}, as {folder / files.RUN} describes it: {error}. The model's code or "
            "the data has changed since, or the file is damaged: load it where they are the same, or train again."
        ) from error
    return network.eval()
