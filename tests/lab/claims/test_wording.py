"""How figures are written: one unit, one number of digits, and what differs in points."""

import pytest

from retrograde.lab.claims import wording
from retrograde.lab.claims.result import Finding
from retrograde.lab.claims.statistics import Estimate


def around(mean: float, half: float) -> Estimate:
    return Estimate(n=3, mean=mean, deviation=half, low=mean - half, high=mean + half)


@pytest.mark.parametrize(
    ("metric", "found", "written"),
    [
        ("accuracy", around(0.98134, 0.00131), "98.13 ± 0.13 %"),
        ("seconds", around(5.81, 0.953), "5.8 ± 1.0 s"),
        ("step_seconds", around(0.0123, 0.0004), "12.30 ± 0.40 ms"),
        ("saved_bytes", around(3 * 2**20, 2**19), "3.00 ± 0.50 MiB"),
        ("parameters", around(648010, 0), "648,010"),
        ("steps", around(1234, 0.5), "1,234 ± 0"),
        ("sharpness", around(12.34, 1.25), "12.3 ± 1.2"),
    ],
)
def test_spread(metric: str, found: Estimate, written: str) -> None:
    assert wording.spread(metric, found) == written


def finding(kind: str, metric: str, value: float, **more: object) -> Finding:
    content = {
        "says": "",
        "metric": metric,
        "kind": kind,
        "value": value,
        "low": None,
        "high": None,
        "bound": 0.5,
    }
    return Finding.model_validate({**content, "direction": "at least", "by": "mean", "holds": True, **more})


def test_what_a_check_found() -> None:
    assert wording.outcome(finding("figure", "zeros", 0.9767)) == "97.67 %"
    assert wording.outcome(finding("ratio", "seconds", 1.456)) == "×1.46"
    points = finding("difference", "accuracy", -0.0021, low=-0.004, high=-0.0002, remark="as it is")
    assert wording.outcome(points) == "−0.21 ± 0.19 points; as it is"


def test_what_it_is_held_against() -> None:
    assert wording.bound(finding("figure", "zeros", 0.9)) == "at least 50.00 %, the mean decides"
    interval = finding("ratio", "seconds", 0.9, by="interval", direction="at most")
    assert wording.bound(interval) == "at most ×0.50, the far end of the interval decides"
