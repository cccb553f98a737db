"""Numbers in words that a person reads at a glance: counts, times, sizes, shares, warnings."""

import math
from collections.abc import Iterable

from schemas.reconcile_schedule import Standing, State
from schemas.reports import Health, Risk


def count(number: float) -> str:
    """Returns a whole number, its thousands apart."""
    return f"{number:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def milliseconds(value: float) -> str:
    """Returns a time given in ms, in its fitting unit and three digits: `18.2 ms`, `5 min`."""
    if value < 0:
        return "-" + milliseconds(-value)
    for limit, scale, unit in ((1e3, 1, "ms"), (60e3, 1e3, "s"), (3.6e6, 60e3, "min")):
        if value < limit:
            return f"{_three(value / scale)} {unit}"
    return f"{_three(value / 3.6e6)} h"


def size(value: float) -> str:
    """Returns bytes in powers of 1024."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{_three(value)} {unit}"
        value /= 1024
    return f"{_three(value)} TiB"


def span(seconds: float) -> str:
    """Returns a time as people plan with it: `40 s`, `90 min`, `26 h`, `9.5 days`."""
    for limit, scale, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{_three(math.floor(seconds / scale))} {unit}"
    return f"{_three(seconds / 86_400)} days"


def log_warnings(healths: Iterable[Health]) -> list[tuple[str, Risk]]:
    """Returns a line for each link whose log may soon be gone, the nearest first."""
    near = [health for health in healths if health.log_risk is not Risk.NONE]
    near.sort(key=lambda health: (health.seconds_left, health.link))
    return [
        (
            f"{health.link}: its source may remove log that it needs in {span(health.seconds_left)}"
            if health.seconds_left
            else f"{health.link}: its source may remove log that it needs at any moment",
            health.log_risk,
        )
        for health in near
    ]


def reconciliation(one: Standing, now_us: int) -> tuple[str, str]:
    """Returns a line of how a job that reconciles stands, and its colour."""
    name = f"{one.job.replace('_', '-')} reconciliation"
    parts, colour = [], "green"
    if one.ended_us is None:
        parts.append("has not been made yet")
        colour = ""
    else:
        ago = span(max(0, now_us - one.ended_us) / 1e6)
        parts.append(f"{one.result.replace('unsound', 'not sound')}, ended {ago} ago")
        if one.result == State.FAILED:
            parts.append(one.detail)
        else:
            parts.append(f"{count(one.rows)} rows")
            parts.append(f"{count(one.differing)} differed and {count(one.mended)} were mended")
        if one.result != State.SOUND:
            colour = "red"
    if one.running_us is not None:
        parts.append(f"one has been running for {span(max(0, now_us - one.running_us) / 1e6)}")
    if one.overdue_s:
        parts.append(f"overdue for {span(one.overdue_s)}")
        colour = "red"
    return f"{name}: {', '.join(parts)}", colour


def percent(share: float) -> str:
    """Returns a share in percent, never rounded up to a hundred."""
    return "100 %" if share == 1 else f"{math.floor(share * 10_000) / 100:.2f} %"


def _three(value: float) -> str:
    """Returns a number with three digits, no more than two of them behind the point."""
    if value <= 0:
        return "0"
    digits = min(2, max(0, 2 - math.floor(math.log10(value))))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
