"""Numbers as people read them; the exact value always stands beside them in the page."""

from __future__ import annotations

import math
import re

__all__ = ["change", "count", "duration", "number", "percent", "percent_tick", "size", "size_tick", "tick"]


def number(value: float) -> str:
    """Four significant digits above one, three below: `2,499`, `6.439`, `0.0403`, `1.20e-05`."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else ("infinite" if value > 0 else "minus infinite")
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.2e}"
    if abs(value) < 1:
        return f"{value:#.3g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def tick(value: float) -> str:
    """A number beside an axis: as short as it can be written."""
    return f"{value:,.10g}"


def percent_tick(fraction: float) -> str:
    """A fraction beside an axis."""
    return f"{100 * fraction:.10g}%"


def size_tick(value: float) -> str:
    """Bytes beside an axis."""
    return re.sub(r"\.?0+ ", " ", size(value)) if "." in size(value) else size(value)


def percent(fraction: float) -> str:
    """`50.0%`; two decimals where one would hide that something is left."""
    text = f"{fraction:.1%}"
    return f"{fraction:.2%}" if text in ("0.0%", "100.0%") and fraction not in (0, 1) else text


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    shown = f"{value:,.0f}" if value == round(value) and step == 0 else f"{value:#.3g}".rstrip(".")
    return f"{shown} {units[step]}"


def size(value: float) -> str:
    """Bytes in powers of a thousand, as disks and hubs count: `13.5 GB`."""
    return _scaled(value, ("bytes", "kB", "MB", "GB", "TB"))


def count(value: float) -> str:
    """`260,032`, `24.4 million`, `6.74 billion`."""
    return f"{value:,.0f}" if abs(value) < 1e6 else _scaled(value / 1e6, ("million", "billion", "trillion"))


def duration(seconds: float) -> str:
    """`0.41 s`, `4 min 12 s`, `2 h 3 min`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def change(before: float, after: float) -> str:
    """`no change`, `+3.1%`, `−25.0%`, and from a factor of two on `×4.12`."""
    if before == after:
        return "no change"
    ratio = after / before if before else math.inf
    if not math.isfinite(ratio) or ratio < 0:
        return ""
    if ratio >= 2:
        return f"×{ratio:,.3g}" if ratio < 1000 else f"×{ratio:,.0f}"
    text = f"{ratio - 1:+.1%}".replace("-", "−")
    return "≈ 0%" if text in ("+0.0%", "−0.0%") else text
