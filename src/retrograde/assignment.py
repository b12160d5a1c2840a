"""Which methods act on which layer, as the user says it: the same on all, or by patterns over the layers' names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from retrograde.engine.slots import Method
from retrograde.errors import OptionError, PatternError
from retrograde.patterns import PatternRow, escape, matches_any, pattern_row, some

Methods = Method | Sequence[Method]
Given = Methods | Mapping[str, Methods | None]
"""One method, several, or by pattern over layer names: the first that matches a layer decides; None leaves it plain."""


@dataclass(frozen=True)
class Assignment:
    """Methods by pattern; the first pattern that matches a layer decides.

    Attributes:
        entries: patterns with their methods, none of which leaves a layer plain.
        by_pattern: whether the user wrote patterns, each of which must then match something.
        otherwise: why the other layers are plain, where the user wrote none.
    """

    entries: tuple[tuple[str, tuple[Method, ...]], ...]
    by_pattern: bool = False
    otherwise: str = ""

    @property
    def methods(self) -> tuple[Method, ...]:
        """All of them, each once."""
        return distinct(methods for _, methods in self.entries)

    def for_run(self, steps: int | None) -> "Assignment":
        """The same, with whole steps in place of shares of a run of so many steps.

        Raises:
            OptionError: `steps` is below 1, or a method has a share and `steps` is None.
        """
        if steps is not None and steps < 1:
            raise OptionError(f"steps={steps} must be 1 or more, the optimizer steps of the whole run.")
        entries = tuple(
            (pattern, tuple(m.for_run(steps) for m in methods)) for pattern, methods in self.entries
        )
        return replace(self, entries=entries)

    def of(self, called: Sequence[str]) -> tuple[tuple[Method, ...], str | None]:
        """The methods of a layer that is called so, and the pattern that matched; None where none did."""
        for pattern, methods in self.entries:
            if matches_any(pattern, called):
                return methods, pattern
        return (), None

    def why_plain(self, called: Sequence[str]) -> str:
        """Why a layer that is called so has no methods."""
        pattern = self.of(called)[1]
        if not self.by_pattern:
            return self.otherwise
        return "no pattern of `methods` matches" if pattern is None else f"None in `methods`, by {pattern!r}"

    def check(self, candidates: Mapping[str, Sequence[str]], strict: bool) -> tuple[PatternRow, ...]:
        """What each pattern matched of the layers with all their names.

        Raises:
            PatternError: strict, and a pattern decides about no layer.
        """
        if not self.by_pattern:
            return ()
        rows: list[PatternRow] = []
        deciding = {name: self.of(called)[1] for name, called in candidates.items()}
        for pattern, _ in self.entries:
            matches = {name for name, called in candidates.items() if matches_any(pattern, called)}
            if strict and matches and all(deciding[name] != pattern for name in matches):
                raise PatternError(
                    f"pattern {pattern!r} in `methods` matches {some(sorted(matches))}, for which earlier patterns "
                    "have decided already. Put it before them, or leave it out."
                )
            if strict and not matches:
                raise PatternError(
                    f"pattern {pattern!r} in `methods` matches no layer of the model. Layers: {some(list(candidates))}."
                )
            rows.append(pattern_row("methods", pattern, matches, candidates))
        return tuple(rows)


def distinct(groups: Iterable[Iterable[Method]]) -> tuple[Method, ...]:
    """Every setting of a method once, in the order in which they come first."""
    found: list[Method] = []
    for methods in groups:
        found += [method for method in methods if method not in found]
    return tuple(found)


def assign(given: Given) -> Assignment:
    """What the user gave to `attach`, checked.

    Raises:
        OptionError: no method, something else than methods, one of them twice for a layer, or two settings of a method
            that decides for the whole model.
    """
    if not isinstance(given, Mapping):
        return Assignment((("*", _checked(given)),))
    entries: list[tuple[str, tuple[Method, ...]]] = []
    for pattern, methods in given.items():
        if not isinstance(pattern, str) or not pattern.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
            raise PatternError(
                f"`methods` holds the pattern {pattern!r}. Use a layer's full name or a glob over names, such as "
                "'features.*'."
            )
        entries.append((pattern, () if methods is None else _checked(methods)))
    made = Assignment(tuple(entries), by_pattern=True)
    if not made.methods:
        raise OptionError(
            'attach was given no method for any pattern. Give at least one, for example {"*": retrograde.Dither()}.'
        )
    for method in made.methods:
        others = [other for other in made.methods if other.name == method.name and other != method]
        if others and _decides_for_all(method):
            raise OptionError(
                f"attach was given two settings of {method.name!r}: {method!r} and {others[0]!r}. It decides for the "
                "whole model, so give one, under as many patterns as you like."
            )
    return made


def exactly(layers: Mapping[str, Sequence[Method]]) -> Assignment:
    """Methods by full layer names, as they were in an earlier session; all other layers stay plain."""
    entries = [(escape(name), tuple(methods)) for name, methods in layers.items()]
    return Assignment(tuple(entries), otherwise="plain in the session that goes on")


def _decides_for_all(method: Method) -> bool:
    cls = type(method)
    return cls.conductor is not Method.conductor or cls.branches is not Method.branches


def _checked(methods: Methods) -> tuple[Method, ...]:
    if isinstance(methods, Method):
        chosen: tuple[Method, ...] = (methods,)
    elif isinstance(methods, Sequence) and not isinstance(methods, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        chosen = tuple(methods)
    else:
        hint = " Call it: the class alone is no method." if callable(methods) else ""
        raise OptionError(
            f"attach was given {methods!r} for its methods.{hint} Pass a method, a list of them, or a dict of patterns."
        )
    if not chosen:
        raise OptionError("attach was given no method. Pass at least one, for example retrograde.Dither().")
    for method in chosen:
        if not isinstance(method, Method):  # pyright: ignore[reportUnnecessaryIsInstance]
            hint = " Call it: the class alone is no method." if callable(method) else ""
            raise OptionError(f"attach was given {method!r}, which is not a retrograde.Method.{hint}")
    names = [method.name for method in chosen]
    for name in names:
        if names.count(name) > 1:
            raise OptionError(f"attach was given {name!r} {names.count(name)} times. Give each method once.")
    return chosen
