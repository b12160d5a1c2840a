"""``retrograde repro``: the claims of the sources, run again and judged."""

import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated

import tyro

from retrograde.cli import output
from retrograde.cli.flags import DataFolder, Switch, said
from retrograde.cli.options import Given
from retrograde.cli.signals import stop_request
from retrograde.errors import OptionError, RunError
from retrograde.lab.claims import metrics, wording
from retrograde.lab.claims.grid import Grid, Places, default_folder
from retrograde.lab.claims.jobs import State
from retrograde.lab.claims.library import Library
from retrograde.lab.claims.result import Result, write_result
from retrograde.lab.claims.verify import run_again
from retrograde.report.comparison import Comparison
from retrograde.report.table import NONE, make_table
from retrograde.report.tables import checks_table, figures_table

_ClaimName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="METHOD/NAME")]


_AS_DEFINED = "as the definition says"


@dataclass(frozen=True)
class List:
    """List the claims: what each source says, whether it has been run, and the verdict; and every other experiment.

    Attributes:
        folder: Folder with the definitions of the claims. Their results lie in results/ beside it.
        json: Print JSON.
    """

    folder: Path = Path("repro")
    json: Switch = False

    def run(self, given: Given) -> int:
        """Print to stdout."""
        library = Library(self.folder)
        entries, scripts = library.entries(), library.scripts()
        if self.json:
            output.print_json(
                {
                    "claims": [entry.to_dict() for entry in entries],
                    "scripts": [script.to_dict() for script in scripts],
                }
            )
            return 0
        claims = make_table(
            ("claim", "the source says", "status", "verdict"),
            ((e.claim.id, e.claim.claim, e.status, e.verdict or NONE) for e in entries),
            texts=4,
            caption="`retrograde repro run CLAIM` runs a claim, `retrograde repro show CLAIM` prints its result",
        )
        output.print_table(claims)
        if scripts:
            rows = (
                (
                    one.name,
                    one.question,
                    ", ".join(one.results) if one.status == "run" else one.status,
                    one.command,
                )
                for one in scripts
            )
            columns = ("script", "its question", "results", "command")
            output.print_line("")
            output.print_table(make_table(columns, rows, texts=4, caption="not claims: scripts"))
        return 0


@dataclass(frozen=True)
class Run:
    """Run a claim: search every variant's settings, train all seeds in turns, judge, write results/CLAIM.json.

    Re-running the same command resumes it: finished runs are kept. A changed definition starts new runs.

    Attributes:
        claim: Name of the claim, as `retrograde repro list` prints it.
        quick: Run a short form within two minutes. It decides nothing and is written into its run folder.
        device: Device to train on.
        seeds: Number of paired seeds. Fewer than the definition asks for publish nothing.
        jobs: Seeds trained at once, each on its share of the cores. Times can be trusted with 1 only.
        data_dir: Folder that holds data sets.
        runs: Folder for the runs.
        folder: Folder with the definitions of the claims. Their results lie in results/ beside it.
        json: Print JSON.
    """

    claim: _ClaimName
    quick: Switch = False
    device: Annotated[str | None, said(_AS_DEFINED, "{auto,cpu,cuda}")] = None
    seeds: Annotated[int | None, said(_AS_DEFINED, "INT")] = None
    jobs: int = 1
    data_dir: DataFolder = None
    runs: Annotated[Path | None, said("runs/repro/METHOD/NAME", "PATH")] = None
    folder: Path = Path("repro")
    json: Switch = False

    def run(self, given: Given) -> int:
        """Run, publish, print."""
        library = Library(self.folder)
        claim = library.claim(self.claim)
        if claim.pending:
            raise OptionError(f"{claim.id} cannot be run yet: {claim.pending}")
        whole = claim
        if self.quick:
            claim = claim.shortened()
        if self.seeds is not None:
            if self.seeds < 1:
                raise OptionError(f"repro: seeds={self.seeds} runs nothing. Give 1 or more.")
            claim = claim.model_copy(update={"seeds": self.seeds})
        folder = self.runs or default_folder(claim.id, quick=self.quick)
        grid = Grid(claim, Places(folder, self.data_dir, self.jobs, self.device))
        with shown(claim.id) as show, stop_request() as stop:
            result = grid.run(quick=self.quick, command=self._command(), show=show, stop=stop)
        published = not self.quick and claim.seeds >= whole.seeds
        if published:
            # More seeds than it asks for are no other claim.
            result.hash = whole.hash
        path = library.path(claim) if published else folder / "result.json"
        write_result(result, path)
        present(result, path, as_json=self.json)
        return 0

    def _command(self) -> str:
        words = ["retrograde repro run", self.claim]
        for name, value in (("device", self.device), ("seeds", self.seeds)):
            words += [f"--{name} {value}"] if value is not None else []
        words += ["--quick"] if self.quick else []
        words += [f"--jobs {self.jobs}"] if self.jobs > 1 else []
        return " ".join(words)


@dataclass(frozen=True)
class Show:
    """Print the result of a claim.

    Attributes:
        claim: Name of the claim.
        folder: Folder with the definitions of the claims. Their results lie in results/ beside it.
        json: Print the whole result as JSON.
    """

    claim: _ClaimName
    folder: Path = Path("repro")
    json: Switch = False

    def run(self, given: Given) -> int:
        """Print to stdout."""
        library = Library(self.folder)
        entry = library.entry(self.claim)
        if entry.result is None:
            why = entry.claim.pending or f"run it with `retrograde repro run {self.claim}`"
            raise RunError(f"{self.claim} has no result: {why}.")
        if entry.status == "stale":
            output.log.print("the definition has changed since: run the claim again", style="yellow")
        present(entry.result, library.path(entry.claim), as_json=self.json)
        return 0


@dataclass(frozen=True)
class Verify:
    """Run a random cell of a published result again, and compare.

    Attributes:
        claim: Name of the claim.
        seed: Seed of the random choice.
        data_dir: Folder that holds data sets.
        folder: Folder with the definitions of the claims. Their results lie in results/ beside it.
        json: Print JSON.
    """

    claim: Annotated[str | None, tyro.conf.Positional, said("any that has a result", "[METHOD/NAME]")] = None
    seed: Annotated[int | None, said("another one each time", "INT")] = None
    data_dir: DataFolder = None
    folder: Path = Path("repro")
    json: Switch = False

    def run(self, given: Given) -> int:
        """Train one cell; exit code 1 where it does not agree."""
        library, random = Library(self.folder), Random(self.seed)
        known = [library.entry(self.claim)] if self.claim else library.entries()
        entries = [entry for entry in known if entry.result and (self.claim or entry.status == "run")]
        if not entries:
            raise RunError(
                "no claim has a result that could be verified. Run one: `retrograde repro run CLAIM`."
            )
        entry = random.choice(entries)
        assert entry.result is not None
        with shown(entry.claim.id) as show, stop_request() as stop, tempfile.TemporaryDirectory() as folder:
            state = State(show, 1.0, "one cell again")

            def tell(done: float) -> None:
                state.finished = done
                state.show()

            found = run_again(
                entry.claim, entry.result, Path(folder), self.data_dir, random, tell=tell, stop=stop
            )
        if self.json:
            output.print_json({"claim": entry.claim.id, **found.to_dict()})
        else:
            verdict = "identical" if found.identical else "agrees" if found.agrees else "DOES NOT AGREE"
            rows = (
                (
                    metrics.ALL[name].label,
                    wording.figure(name, value),
                    wording.figure(name, found.found[name]),
                )
                for name, value in found.published.items()
            )
            title = f"{entry.claim.id}, {found.contestant}, seed {found.seed}: {verdict}"
            output.print_table(make_table(("metric", "published", "now"), rows))
            output.print_line(title)
        return 0 if found.agrees else 1


@contextmanager
def shown(what: str) -> Generator[Callable[[State], None]]:
    """A bar for a whole grid, with the time left."""
    with output.progress(what, counted=False) as show:
        yield lambda state: show(state.what, state.done, state.total)


def present(result: Result, path: Path | None, *, as_json: bool) -> None:
    """The result on stdout."""
    if as_json:
        output.print_json(result.model_dump(mode="json"))
        return
    figures = figures_table(Comparison(result, {}), source=False)
    output.print_table(replace(figures, caption=f"{result.title}. {figures.caption}"))
    if result.findings:
        output.print_line("")
        output.print_table(checks_table(result))
        output.print_line(
            f"{'quick, which decides nothing' if result.quick else 'verdict'}: {result.verdict}"
        )
    if path is not None:
        output.print_line(f"result: {path}")


Command = (
    Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Show, tyro.conf.subcommand("show")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


@dataclass(frozen=True)
class Repro:
    """The claims of the methods' sources: list them, run them, show the results, verify a random cell."""

    command: Annotated[Command, tyro.conf.arg(name="")]

    def run(self, given: Given) -> int:
        """Hand over."""
        return self.command.run(given)
