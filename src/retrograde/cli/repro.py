"""``retrograde repro``: the claims of the sources, run again and judged."""

import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from retrograde.lab.claims.definition import Claim
from retrograde.lab.claims.grid import Grid, Places, default_folder
from retrograde.lab.claims.library import Library
from retrograde.lab.claims.result import Result, write_result
from retrograde.lab.claims.verify import run_again
from retrograde.report.comparison import Comparison
from retrograde.report.table import NONE, make_table
from retrograde.report.tables import checks_table, figures_table

_ClaimName = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="METHOD/NAME")]


_AS_DEFINED = "as the definition says"


@dataclass(frozen=True, kw_only=True)
class _OnClaims:
    """What all of these commands take.

    Attributes:
        folder: Folder with the definitions of the claims. Their results lie in results/ beside it.
        json: Print JSON.
    """

    folder: Path = Path("repro")
    json: Switch = False


@dataclass(frozen=True, kw_only=True)
class List(_OnClaims):
    """List the claims: what each source says, whether it has been run, and the verdict; and every other experiment."""

    def run(self, given: Given) -> int:
        """Print to stdout."""
        library = Library(self.folder)
        entries, scripts = library.entries(), library.scripts()
        claims = make_table(
            ("claim", "the source says", "status", "verdict"),
            ((e.claim.id, e.claim.claim, e.status, e.verdict or NONE) for e in entries),
            texts=4,
            caption="`retrograde repro run CLAIM` runs a claim, `retrograde repro show CLAIM` prints its result",
        )
        others = make_table(
            ("script", "its question", "results", "command"),
            (
                (
                    one.name,
                    one.question,
                    ", ".join(one.results) if one.status == "run" else one.status,
                    one.command,
                )
                for one in scripts
            ),
            texts=4,
            caption="not claims: scripts",
        )
        content = {
            "claims": [one.to_dict() for one in entries],
            "scripts": [asdict(one) for one in scripts],
        }
        output.tell(content, claims, *(["", others] if scripts else []), as_json=self.json)
        return 0


@dataclass(frozen=True, kw_only=True)
class Run(_OnClaims):
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
    """

    claim: _ClaimName
    quick: Switch = False
    device: Annotated[str | None, said(_AS_DEFINED, "{auto,cpu,cuda}")] = None
    seeds: Annotated[int | None, said(_AS_DEFINED, "INT")] = None
    jobs: int = 1
    data_dir: DataFolder = None
    runs: Annotated[Path | None, said("runs/repro/METHOD/NAME", "PATH")] = None

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
        places = Places(folder, self.data_dir, self.jobs, self.device)
        result = run_grid(claim, places, self._command(), quick=self.quick)
        published = not self.quick and claim.seeds >= whole.seeds
        if published:
            # More seeds than it asks for are no other claim.
            result.hash = whole.hash
        path = library.path(claim) if published else folder / "result.json"
        write_result(result, path)
        present(result, f"result: {path}", as_json=self.json)
        return 0

    def _command(self) -> str:
        words = ["retrograde repro run", self.claim]
        for name, value in (("device", self.device), ("seeds", self.seeds)):
            words += [f"--{name} {value}"] if value is not None else []
        words += ["--quick"] if self.quick else []
        words += [f"--jobs {self.jobs}"] if self.jobs > 1 else []
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class Show(_OnClaims):
    """Print the result of a claim.

    Attributes:
        claim: Name of the claim.
    """

    claim: _ClaimName

    def run(self, given: Given) -> int:
        """Print to stdout."""
        library = Library(self.folder)
        entry = library.entry(self.claim)
        if entry.result is None:
            why = entry.claim.pending or f"run it with `retrograde repro run {self.claim}`"
            raise RunError(f"{self.claim} has no result: {why}.")
        if entry.status == "stale":
            output.log.print("the definition has changed since: run the claim again", style="yellow")
        present(entry.result, f"result: {library.path(entry.claim)}", as_json=self.json)
        return 0


@dataclass(frozen=True, kw_only=True)
class Verify(_OnClaims):
    """Run a random cell of a published result again, and compare.

    Attributes:
        claim: Name of the claim.
        seed: Seed of the random choice.
        data_dir: Folder that holds data sets.
    """

    claim: Annotated[str | None, tyro.conf.Positional, said("any that has a result", "[METHOD/NAME]")] = None
    seed: Annotated[int | None, said("another one each time", "INT")] = None
    data_dir: DataFolder = None

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
        with (
            output.progress(entry.claim.id, counted=False) as show,
            stop_request() as stop,
            tempfile.TemporaryDirectory() as folder,
        ):
            tell = partial(show, "one cell again", total=1.0)
            found = run_again(
                entry.claim, entry.result, Path(folder), self.data_dir, random, tell=tell, stop=stop
            )
        verdict = "identical" if found.identical else "agrees" if found.agrees else "DOES NOT AGREE"
        rows = (
            (metrics.ALL[name].label, *(wording.figure(name, one) for one in (value, found.found[name])))
            for name, value in found.published.items()
        )
        output.tell(
            {"claim": entry.claim.id, **asdict(found)},
            make_table(("metric", "published", "now"), rows),
            f"{entry.claim.id}, {found.contestant}, seed {found.seed}: {verdict}",
            as_json=self.json,
        )
        return 0 if found.agrees else 1


def run_grid(claim: Claim, places: Places, command: str, *, quick: bool = False) -> Result:
    """All of a claim's runs, with a bar of the time left."""
    with output.progress(claim.title, counted=False) as show, stop_request() as stop:
        return Grid(claim, places).run(quick=quick, command=command, show=show, stop=stop)


def present(result: Result, last: str, *, as_json: bool) -> None:
    """The result on stdout, with a last line."""
    figures = figures_table(Comparison(result, {}), source=False)
    verdict = f"{'quick, which decides nothing' if result.quick else 'verdict'}: {result.verdict}"
    output.tell(
        result.model_dump(mode="json"),
        replace(figures, caption=f"{result.title}. {figures.caption}"),
        *(["", checks_table(result), verdict] if result.findings else []),
        last,
        as_json=as_json,
    )


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
