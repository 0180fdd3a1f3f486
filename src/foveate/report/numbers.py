"""Numbers as a reader wants them: significant digits, true minus signs, a dash for a gap."""

from __future__ import annotations

import math

MISSING = "—"
MINUS = "−"


def significant(value: float | None, digits: int = 3) -> str:
    """`value` in plain notation with at least `digits` significant digits; a dash for None."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def speedup(value: float | None) -> str:
    """A ratio of times with two decimals."""
    return MISSING if value is None else f"{value:.2f}"


def percent(share: float | None) -> str:
    """A share in [0, 1] as percent, without the sign: the header carries it."""
    if share is None:
        return MISSING
    decimals = 0 if share in (0, 1) else 1
    return f"{100 * share:.{decimals}f}"


def change(value: float | None) -> str:
    """A change that is already in percent, always signed: "+0.6%", "−0.1%", "±0%"."""
    if value is None:
        return MISSING
    rounded = round(value, 1 if abs(value) >= 0.1 else 2)
    if rounded == 0:
        return "±0%"
    return f"{rounded:+,}%".replace("-", MINUS)


def divergence(value: float | None) -> str:
    """A KL divergence in nats with two significant digits, in powers of ten when it is tiny."""
    if value is None or value == 0 or abs(value) >= 1e-4:
        return significant(value, 2)
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}".replace("-", MINUS)


def megabytes(count: float | None) -> str:
    """Bytes as megabytes (10⁶ bytes)."""
    return significant(None if count is None else count / 1e6)


def kilobytes(count: float | None) -> str:
    """Bytes as kilobytes (10³ bytes)."""
    return significant(None if count is None else count / 1e3)
