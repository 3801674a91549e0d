"""One check of the doctor: what was measured, what it may be, and what to do. Does NOT know models."""

from dataclasses import dataclass

from alignblind_mi.errors import AlignblindError

STATUSES = ("ok", "warn", "fail", "skipped")
PROBLEMS = (AlignblindError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class Check:
    """One check. `measured` in `unit` is held against `rule` ("<=" or ">=") `bound`; NaN where nothing could be measured.

    status: ok; warn (numbers can be trusted, but know this); fail (they cannot, or a study would stop); skipped (`found` says why).
    """

    check: str
    status: str
    found: str
    measured: float = float("nan")
    rule: str = "<="
    bound: float = float("nan")
    unit: str = ""
    advice: str = ""


def at_most(check: str, measured: float | int, bound: float | int, unit: str, found: str, advice: str, *, worse: str = "fail") -> Check:
    """A check that is passed by a number up to a bound."""
    good = measured <= bound
    return Check(check, "ok" if good else worse, found, float(measured), "<=", float(bound), unit, "" if good else advice)


def at_least(check: str, measured: float | int, bound: float | int, unit: str, found: str, advice: str, *, worse: str = "fail") -> Check:
    """A check that is passed by a number from a bound on."""
    good = measured >= bound
    return Check(check, "ok" if good else worse, found, float(measured), ">=", float(bound), unit, "" if good else advice)
