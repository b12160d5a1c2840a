"""Layers chosen by glob patterns over their full names."""

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from retrograde.errors import PatternError

ROOT = "(root)"
"""What a layer that is the whole model is called."""


def escape(name: str) -> str:
    """The pattern that matches a layer of this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def select(
    candidates: dict[str, list[str]], patterns: str | Iterable[str], option: str, strict: bool
) -> set[str]:
    """The candidates that the patterns match by any of their names.

    Args:
        candidates: full name → all names that the layer is called by.
        patterns: one or several.
        option: where the user gave them, for messages.
        strict: raise on a pattern that matches nothing.

    Raises:
        PatternError: a pattern is empty or, when strict, matches no layer.
    """
    names = list(candidates)
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise PatternError(
            f"`{option}` is an empty list of patterns, which would match no layer. Leave `{option}` out, or name "
            f"layers: {some(names)}."
        )
    found: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PatternError(
                f"`{option}` holds {pattern!r}, which is no layer pattern. Use a layer's full name or a glob over "
                f"names, such as 'features.*'. Layers: {some(names)}."
            )
        matches = {
            n for n, called in candidates.items() if any(fnmatchcase(c or ROOT, pattern) for c in called)
        }
        if not matches and strict:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.4)
            hint = f"Nearest names: {', '.join(near)}." if near else f"Layers: {some(names)}."
            raise PatternError(f"pattern {pattern!r} in `{option}` matches no layer of the model. {hint}")
        found |= matches
    return found


def some(names: list[str]) -> str:
    """The first few names, for messages."""
    shown = ", ".join(name or ROOT for name in names[:8])
    return f"{shown}, … ({len(names)} in all)" if len(names) > 8 else shown or "none"
