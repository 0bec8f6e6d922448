"""Numbers as people read them."""

import math
from typing import TypeGuard

ABSENT = "–"
BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


def is_number(value: object) -> TypeGuard[int | float]:
    """A finite number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: object, digits: int = 4) -> str:
    """Integers in groups of thousands, others with so many significant digits; a dash for what is none."""
    if not is_number(value):
        return ABSENT
    if isinstance(value, int) or abs(value) >= 10**digits and abs(value) < 1e15:
        return f"{value:,.0f}"
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e15:
        mantissa, _, exponent = f"{value:.{digits - 2}e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"
    decimals = max(digits - 1 - math.floor(math.log10(abs(value))), 0)
    text = f"{value:,.{decimals}f}"
    fewer = text.rstrip("0").rstrip(".")
    # Digits that are zero because the value was written with fewer are no precision.
    return fewer if "." in text and float(fewer.replace(",", "")) == value else text


def percent(value: object, decimals: int = 1) -> str:
    if not is_number(value):
        return ABSENT
    return f"{100 * value:.{decimals}f} %"


def short(value: float) -> str:
    """Three digits and a letter: 1.38 M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            scaled = value / size
            return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f} {letter}"
    return number(value, 3)


def num_bytes(value: float) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(BYTES) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.0f} B" if power == 0 else f"{value:.3g} {BYTES[power]}"


def duration(seconds: float) -> str:
    """In the two largest units: 3 h 12 min, 4 min 5 s, 1.53 s, 12.4 ms."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.5:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    raise AssertionError(seconds)
