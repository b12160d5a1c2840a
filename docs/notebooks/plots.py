"""Line plots as SVG, for notebooks: no package is needed to draw or to show them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEFT, RIGHT, TOP, FOOT = 640, 326, 70, 210, 46, 50
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
FONT = "-apple-system,'Segoe UI','Helvetica Neue',Arial,sans-serif"


@dataclass(frozen=True)
class Line:
    """A curve: `dashed` for what is predicted, `points` for what is measured."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False
    points: bool = False


@dataclass(frozen=True)
class Plot:
    """What a notebook shows of it is `_repr_svg_`."""

    title: str
    x: str
    y: str
    lines: Sequence[Line]
    log: bool = False

    def _repr_svg_(self) -> str:
        scale = math.log10 if self.log else float
        xs = [scale(v) for line in self.lines for v in line.x]
        ys = [scale(v) for line in self.lines for v in line.y]
        across = _axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
        up = _axis(min(ys), max(ys), HEIGHT - FOOT, TOP)
        parts = [_text(LEFT, 22, self.title, size=15, weight=600)]
        parts += [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, self.x, anchor="middle")]
        parts += [_text(LEFT, TOP - 8, self.y, size=11)]
        for low, high, place, horizontal in ((min(xs), max(xs), across, True), (min(ys), max(ys), up, False)):
            for tick in _log_ticks(low, high) if self.log else _ticks(low, high):
                at, shown = place(tick), _power(tick) if self.log else f"{tick:.3g}"
                if horizontal:
                    parts.append(_text(at, HEIGHT - FOOT + 16, shown, size=11, anchor="middle"))
                else:
                    parts.append(_text(LEFT - 8, at + 4, shown, size=11, anchor="end"))
                    parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}" stroke="#e3e6ea"/>')
        for at, line in enumerate(self.lines):
            colour = COLOURS[line.colour % len(COLOURS)]
            places = [(across(scale(a)), up(scale(b))) for a, b in zip(line.x, line.y, strict=True)]
            dash = ' stroke-dasharray="6 4"' if line.dashed else ""
            path = "L".join(f"{a:.1f} {b:.1f}" for a, b in places)
            if not line.points:
                parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
            else:
                parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places]
            y = TOP + 14 + 18 * at
            key = f'<path d="M{WIDTH - RIGHT + 12} {y - 4}h22" stroke="{colour}" stroke-width="1.8"{dash}/>'
            if line.points:
                key = f'<circle cx="{WIDTH - RIGHT + 23}" cy="{y - 4}" r="3" fill="{colour}"/>'
            parts += [key, _text(WIDTH - RIGHT + 40, y, line.label, size=11)]
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'font-family="{FONT}">'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(parts)}</svg>'
        )


def _axis(low: float, high: float, start: float, end: float):
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) or 1.0))
    step = next(s for s in (step / 5, step / 2, step, 2 * step) if (high - low) / s <= 6)
    first = math.ceil(low / step - 1e-9)
    return [step * at for at in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Logarithms of 1, 2 and 5 times powers of ten, or of the powers alone where these are too many."""
    for digits, every in (((1, 2, 5), 1), ((1,), 1), ((1,), 2), ((1,), 5)):
        powers = [p for p in range(math.floor(low), math.ceil(high) + 1) if p % every == 0]
        found = [p + math.log10(d) for p in powers for d in digits]
        found = [tick for tick in found if low - 1e-9 <= tick <= high + 1e-9]
        if len(found) <= 7:
            return found
    return [low, high]


def _power(tick: float) -> str:
    """10 to the power of a tick, as a decimal number where that is short."""
    if -3 - 1e-9 <= tick < 4:
        return f"{10**tick:.3g}"
    power = math.floor(tick + 1e-9)
    digit, raised = (
        round(10 ** (tick - power)),
        str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")),
    )
    return f"10{raised}" if digit == 1 else f"{digit}·10{raised}"


def _text(x: float, y: float, text: str, *, size: int = 12, weight: int = 400, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="#24292f">{escape(text)}</text>'
    )
