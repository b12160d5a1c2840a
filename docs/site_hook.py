"""Makes what the site has beside the pages in ``docs/``: the README, the commands' help, files that pages link.

Pages link files of the repository by relative paths, so that they can be read without the site as well. In the site a
file outside ``docs/`` becomes a page of its own below ``source/``, where ``#name`` leads to a Python file's function or
class. A link to a file or a definition that is not there, and a public name that no page documents, stop the build.
"""

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import posixpath
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = "docs"
SOURCE = "source"
_LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]+)?(?=\))")
_DIRECTIVE = re.compile(r"^::: retrograde\.(\w+)$", re.MULTILINE)
_HIDDEN = "---\nsearch:\n  exclude: true\nhide: [navigation]\n---\n\n"
_LANGUAGES = {".toml": "toml", ".yml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    if missing := undocumented(texts.values()):
        raise PluginError("Public names that no page documents:\n" + "\n".join(missing))
    texts["index.md"] = moved_readme()
    made = {"index.md": texts["index.md"], "command-line.md": command_line()}
    targets = {target for uri, text in texts.items() for target in outside(text, uri)}
    for target in sorted(targets):
        path = ROOT / target
        if path.suffix == ".json":
            files.append(File.generated(config, f"{SOURCE}/{target}", abs_src_path=str(path)))
        else:
            made[source_page(target)] = source_text(path, target)
    for uri, text in made.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links out of ``docs/`` to the pages below ``source/``."""
    uri = page.file.src_uri
    if uri.startswith(f"{SOURCE}/"):
        return markdown
    return _LINK.sub(lambda match: link(match[1], match[2] or "", uri), markdown)


# Links.


def resolved(path: str, uri: str) -> str:
    """A link of the page `uri` as a path from the repository's root."""
    return posixpath.normpath(posixpath.join(DOCS, posixpath.dirname(uri), path))


def outside(text: str, uri: str) -> Iterator[str]:
    """Files and folders outside ``docs/`` that a page links.

    Raises:
        PluginError: one does not exist.
    """
    for match in _LINK.finditer(text):
        target = resolved(match[1], uri)
        if target.split("/")[0] != DOCS:
            if not (ROOT / target).exists():
                raise PluginError(f"{uri} links {match[1]}, and there is no {target} in the repository.")
            yield target


def link(path: str, fragment: str, uri: str) -> str:
    """A link as the site needs it."""
    target = resolved(path, uri)
    if target.split("/")[0] == DOCS:
        return path + fragment
    place = f"{SOURCE}/{target}" if target.endswith(".json") else source_page(target)
    return posixpath.relpath(place, posixpath.dirname(uri) or ".") + fragment


def source_page(target: str) -> str:
    return f"{SOURCE}/{target}.md"


def source_text(path: Path, target: str) -> str:
    """A file as a page: Markdown as it is, other text as code; a folder as a list of its files."""
    if path.is_dir():
        names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
        listed = "\n".join(f"- `{name}`" for name in names if "__pycache__" not in name)
        return f"{_HIDDEN}# {target}\n\n{listed}\n"
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return _HIDDEN + text
    if path.suffix == ".py":
        return f"{_HIDDEN}# {target}\n\n{definitions(text)}\n"
    return f"{_HIDDEN}# {target}\n\n{code(text, _LANGUAGES.get(path.suffix, 'text'))}\n"


def definitions(text: str) -> str:
    """Python, with a heading before each function and class at the top level, so that it can be linked."""
    lines, parts, done = text.splitlines(), [], 0
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(each.lineno for each in node.decorator_list)]) - 1
            parts.append(code("\n".join(lines[done:first]), "python", done + 1))
            done = node.end_lineno or node.lineno
            parts.append(f"## `{node.name}` {{ #{node.name} }}")
            parts.append(code("\n".join(lines[first:done]), "python", first + 1))
    parts.append(code("\n".join(lines[done:]), "python", done + 1))
    return "\n\n".join(filter(None, parts))


def code(text: str, language: str, first: int = 1) -> str:
    """A block of code with its line numbers; nothing where there is no line."""
    first += len(text) - len(text.lstrip("\n"))
    text = text.strip("\n")
    return f'````{language} linenums="{first}"\n{text}\n````' if text.strip() else ""


# Pages that are made.


def moved_readme() -> str:
    """The README, its links as seen from ``docs/``."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")

    def move(match: re.Match[str]) -> str:
        inside = match[1].removeprefix(f"{DOCS}/")
        return (inside if inside != match[1] else f"../{match[1]}") + (match[2] or "")

    return _LINK.sub(move, text)


def command_line() -> str:
    """What every command says to ``--help``."""
    parts = ["# Command line", "What each command says to `--help`.", fenced(helped())]
    for command in commands(helped()):
        parts += [f"## retrograde {command}", fenced(helped(command))]
    return "\n\n".join(parts) + "\n"


def commands(text: str) -> list[str]:
    """The names of the commands, as the usage lists them.

    Raises:
        PluginError: it lists none.
    """
    found = re.search(r"\{([a-z,]+)\}", text)
    if found is None:
        raise PluginError(f"`retrograde --help` lists no commands:\n{text}")
    return found[1].split(",")


def helped(*command: str) -> str:
    from retrograde.cli import main

    said = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "88"
    try:
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([*command, "--help"])
    finally:
        os.environ.pop("COLUMNS")
        if before is not None:
            os.environ["COLUMNS"] = before
    return re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())


def fenced(text: str) -> str:
    return f"````text\n{text.rstrip()}\n````"


# Public names.


def undocumented(pages: Any, package: types.ModuleType | None = None) -> list[str]:
    """Public names of the package that no page has a ``:::`` for, or that say nothing about themselves or a part."""
    module = importlib.import_module("retrograde") if package is None else package
    shown = {name for text in pages for name in _DIRECTIVE.findall(text)}
    missing: list[str] = []
    for name, value in public(module).items():
        if name not in shown:
            missing.append(f"{name}: no page has `::: retrograde.{name}`")
        missing += [f"{name}{part}: no docstring" for part in silent(value)]
    return missing


def public(module: types.ModuleType) -> dict[str, Any]:
    """What ``retrograde/__init__.py`` imports to be used: modules of the package are public where it names them."""
    source = inspect.getsource(module)
    named = re.findall(r" as (\w+)$", source, re.MULTILINE)
    return {name: getattr(module, name) for name in named if not name.startswith("_")}


def silent(value: Any) -> Iterator[str]:
    """Parts of a public object that have no docstring: itself, methods, properties, and fields of dataclasses."""
    if isinstance(value, types.ModuleType):
        for name, part in vars(value).items():
            if not name.startswith("_") and getattr(part, "__module__", None) == value.__name__:
                yield from (f".{name}{rest}" for rest in silent(part))
        return
    said = inspect.getdoc(value) or ""
    if not said:
        yield ""
    if not inspect.isclass(value):
        return
    for name, part in vars(value).items():
        if name.startswith("_") or not isinstance(part, types.FunctionType | property | classmethod):
            continue
        if not inspect.getdoc(getattr(value, name)):
            yield f".{name}"
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            own = field.name in vars(value).get("__annotations__", {}) and not field.name.startswith("_")
            if own and not re.search(rf"^\s*{field.name}: ", said, re.MULTILINE):
                yield f".{field.name}"
