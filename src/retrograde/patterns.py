"""Layers chosen by glob patterns over their full names."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from retrograde.errors import PatternError

Choice = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""Glob patterns over full layer names, or a function of a layer's name and the layer."""

ROOT = "(root)"
"""What a layer that is the whole model is called."""


def escape(name: str) -> str:
    """The pattern that matches a layer of this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def matches_any(pattern: str, called: Iterable[str]) -> bool:
    """Whether a pattern matches one of the names that a layer is called by."""
    return any(fnmatchcase(name or ROOT, pattern) for name in called)


@dataclass(frozen=True)
class PatternRow:
    """What a pattern of the user's matched.

    Attributes:
        option: where it was given.
        pattern: itself.
        matches: how many layers it matches.
        partly: of layers that differ by a number alone it matches some and not others: ``"3 of 12 blocks.*.fc"``.
    """

    option: str
    pattern: str
    matches: int
    partly: str


def pattern_row(
    option: str, pattern: str, matches: set[str], candidates: Mapping[str, Sequence[str]]
) -> PatternRow:
    """The row of one pattern.

    Args:
        option: where it was given.
        pattern: itself.
        matches: full names of the layers that it matches.
        candidates: full name → all names of every layer that it could match.
    """
    families: dict[str, set[str]] = {}
    for name in candidates:
        families.setdefault(re.sub(r"\d+", "*", name), set()).add(name)
    partly = [
        f"{len(family & matches)} of {len(family)} {key}"
        for key, family in families.items()
        if 0 < len(family & matches) < len(family)
    ]
    return PatternRow(option, pattern, len(matches), ", ".join(partly))


def select(
    candidates: dict[str, list[str]],
    patterns: Choice,
    option: str,
    strict: bool,
    modules: Mapping[str, nn.Module],
) -> tuple[set[str], list[PatternRow]]:
    """The candidates that the user chose, by any of their names, and what each pattern matched.

    Args:
        candidates: full name → all names that the layer is called by.
        patterns: one or several, or a function.
        option: where the user gave them, for messages.
        strict: raise on a pattern that matches nothing.
        modules: the layers by full name.

    Raises:
        PatternError: a pattern is empty or, when strict, matches no layer; or a function chooses none.
    """
    names = list(candidates)
    if callable(patterns):
        found = {name for name in names if patterns(name or ROOT, modules[name])}
        if not found and strict:
            raise PatternError(
                f"the function given as `{option}` chose no layer of the model. It must return whether to choose a "
                f"layer, given its full name and the layer itself. Layers: {some(names)}."
            )
        return found, []
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise PatternError(
            f"`{option}` is an empty list of patterns, which would match no layer. Leave `{option}` out, or name "
            f"layers: {some(names)}."
        )
    found = set[str]()
    rows: list[PatternRow] = []
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PatternError(
                f"`{option}` holds {pattern!r}, which is not a layer pattern. Use a layer's full name or a glob over "
                f"names, such as 'features.*'. Layers: {some(names)}."
            )
        matches = {name for name, called in candidates.items() if matches_any(pattern, called)}
        if not matches and strict:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"Nearest names: {', '.join(near)}." if near else f"Layers: {some(names)}."
            raise PatternError(f"pattern {pattern!r} in `{option}` matches no layer of the model. {hint}")
        found |= matches
        rows.append(pattern_row(option, pattern, matches, candidates))
    return found, rows


def some(names: list[str]) -> str:
    """The first few names, for messages."""
    shown = ", ".join(name or ROOT for name in names[:8])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 8 else shown or "none"
