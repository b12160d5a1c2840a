"""The claims of a folder, and what is known of each."""

from pathlib import Path

import pytest
from small_claims import made_up

from retrograde.errors import OptionError, RunError
from retrograde.lab.claims.library import Entry, Library, Script
from retrograde.lab.claims.result import write_result

WORDS = 'title = "t"\nclaim = "c"\nsource = "s"\n'
PLAIN = WORDS + "[contestants.plain]\nsource = { accuracy = 0.9 }\n"


@pytest.fixture
def library(tmp_path: Path) -> Library:
    for name, text in {
        "dither/mnist": PLAIN,
        "dither/cifar": PLAIN,
        "later/imagenet": WORDS + 'pending = "no data"\n',
    }.items():
        path = tmp_path / "repro" / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "repro" / "script.py").touch()
    return Library(tmp_path / "repro")


def publish(library: Library, name: str, digest: str | None = None) -> None:
    claim = library.claim(name)
    result = made_up({"plain": {"accuracy": [0.5]}})
    update = {"claim": name, "hash": digest or claim.hash, "verdict": "partly"}
    write_result(result.model_copy(update=update), library.path(claim))


def test_claims_are_the_toml_files(library: Library, tmp_path: Path) -> None:
    assert library.ids() == ["dither/cifar", "dither/mnist", "later/imagenet"]
    assert [entry.claim.id for entry in library.entries()] == library.ids()
    assert library.path(library.claim("dither/mnist")) == tmp_path / "results" / "dither" / "mnist.json"


def test_statuses(library: Library) -> None:
    publish(library, "dither/mnist")
    publish(library, "dither/cifar", "0123")
    found = {entry.claim.id: (entry.status, entry.verdict) for entry in library.entries()}
    assert found == {
        "dither/cifar": ("stale", None),
        "dither/mnist": ("run", "partly"),
        "later/imagenet": ("pending", None),
    }


def test_not_run(library: Library) -> None:
    entry = library.entry("dither/mnist")
    assert (entry.status, entry.result, entry.verdict) == ("not run", None, None)


def test_a_changed_definition_makes_its_result_stale(library: Library) -> None:
    publish(library, "dither/mnist")
    assert library.entry("dither/mnist").status == "run"
    path = library.folder / "dither" / "mnist.toml"
    path.write_text("# a comment changes nothing\n" + PLAIN)
    assert library.entry("dither/mnist").status == "run"
    path.write_text("seeds = 4\n" + PLAIN)
    entry = library.entry("dither/mnist")
    assert entry.status == "stale"
    assert entry.result is not None, "there to be shown"
    assert entry.to_dict()["verdict"] == "not run"


def test_an_entry_as_plain_values(library: Library) -> None:
    publish(library, "dither/mnist")
    assert library.entry("dither/mnist").to_dict() == {
        "id": "dither/mnist",
        "method": "dither",
        "title": "t",
        "claim": "c",
        "source": "s",
        "source_figures": {"plain": {"accuracy": 0.9}},
        "status": "run",
        "pending": None,
        "verdict": "partly",
        "hash": library.claim("dither/mnist").hash,
    }
    pending: Entry = library.entry("later/imagenet")
    assert pending.to_dict()["pending"] == "no data"


def test_an_unknown_claim_names_the_nearest(library: Library) -> None:
    with pytest.raises(OptionError, match=r"no claim 'dither/minst'.* 'dither/mnist'"):
        library.claim("dither/minst")


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"no folder .*nowhere"):
        Library(tmp_path / "nowhere")


def test_a_damaged_result_is_refused(library: Library) -> None:
    publish(library, "dither/mnist")
    library.path(library.claim("dither/mnist")).write_text("{}")
    with pytest.raises(RunError, match=r"mnist\.json does not fit"):
        library.entry("dither/mnist")


def test_scripts_say_themselves_what_they_are(library: Library) -> None:
    texts = {
        "grow": "How does ``time`` grow?\n\n    python repro/grow.py [--quick]\n\nResults: results/grow.json",
        "twice": "Two files.\n\n    python repro/twice.py\n\nResults: results/grow.json, results/a/b.json",
        "shown": "Shown.\n\n    python repro/shown.py\n\nResults: printed",
        "helper": "Code that the others share.",
    }
    for name, text in texts.items():
        (library.folder / f"{name}.py").write_text(f'"""{text}\n"""\n')
    library.results.mkdir()
    (library.results / "grow.json").touch()
    grow, shown, twice = library.scripts()
    assert grow == Script(
        name="grow",
        question="How does time grow?",
        command="python repro/grow.py [--quick]",
        results=("results/grow.json",),
        status="run",
    )
    assert (shown.status, shown.results) == ("printed", ())
    assert (twice.status, twice.results) == ("not run", ("results/grow.json", "results/a/b.json"))


def test_every_script_of_the_checkout_is_listed() -> None:
    folder = Path(__file__).parents[3] / "repro"
    assert [one.name for one in Library(folder).scripts()] == sorted(
        path.stem
        for path in folder.glob("*.py")
        if path.stem != "reports"  # what scripts share
    )
