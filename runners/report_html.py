"""The report as one HTML page that needs nothing else: no script, no request, fit for print."""

import dataclasses
import datetime
import io
import math
import pathlib
import re

import jinja2
import matplotlib as mpl
from matplotlib import dates, ticker
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from runners.words import count, log_warnings, milliseconds, percent, size, span
from schemas.batches import Lane
from schemas.reports import AlarmCount, Completeness, Conservation, Fill, Report, TableMatch

EMERGENCY_COLOUR, ROUTINE_COLOUR = "#b3261e", "#1a5f8a"
_COLOURS = {Lane.EMERGENCY: EMERGENCY_COLOUR, Lane.ROUTINE: ROUTINE_COLOUR}
_INK, _FAINT = "#1f2933", "#d9dfe5"
# Told apart also in grey and by most colour-blind people: Okabe and Ito's, then darker.
_SERIES = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"),
    *("#8a8f00", "#5b3f8c", "#00695c", "#7f3f00", "#455a64", "#ad1457"),
)
_RC = {
    "svg.fonttype": "none",  # Text stays text: it can be read, searched and scaled.
    "font.size": 8.5,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e9edf1",
    "grid.linewidth": 0.6,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
}
# Where a person looks on a scale of time: 60 s is a minute, not 100 s.
_LAG_TICKS_MS = (0.1, 1, 10, 100, 1e3, 10e3, 60e3, 600e3, 3.6e6, 36e6, 86.4e6 * 7)
_TEMPLATES = pathlib.Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Tile:
    """One statement of the verdict; `good` None where nothing was measured."""

    good: bool | None
    title: str
    text: str


def page(report: Report, zone: datetime.tzinfo = datetime.UTC) -> str:
    """Returns the page; the same report and zone give the same bytes.

    Args:
      zone: of the times that are shown.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "count": count,
        "ms": milliseconds,
        "size": size,
        "percent": percent,
        "time": lambda us: _time(us, zone).strftime("%Y-%m-%d %H:%M:%S"),
        "span": lambda us: milliseconds(us / 1000),
        "left": span,
        "words": lambda text: text.replace("_", " "),
    }
    return environment.get_template("report.html.j2").render(
        report=report,
        tiles=tiles(report),
        headline=headline(report),
        zone=_zone_name(report, zone),
        lag_charts=[(link, lag_chart(report, link, zone)) for link in _with_points(report)],
        throughput_chart=throughput_chart(report, zone) if report.points else "",
        backlog_chart=backlog_chart(report, zone) if report.backlog else "",
        lag_by_link=_lag_by_link(report),
        conservation=_by_link(report.conservation),
        completeness=_completeness(report),
        # What dead letters hold is told there, once.
        unequal=[
            part
            for part in report.completeness
            if part.fill is not Fill.EQUAL and not report.complete
        ],
        matches=_matches(report),
        unlike=[m for m in report.comparison.tables if not m.equal] if report.comparison else [],
        strangers=[m for m in report.comparison.stores if not m.equal] if report.comparison else [],
        log_warnings=[text for text, _ in log_warnings(report.health)],
        kept=[health for health in report.health if health.seconds_left is not None],
        alarms=_alarms(report),
        reviews_open=max((part.reviews_open for part in report.tending), default=0),
        lanes=Lane,
        colours={lane.value: colour for lane, colour in _COLOURS.items()},
    )


def headline(report: Report) -> str:
    """Returns the verdict in one sentence."""
    if report.unreachable:
        ends = ", ".join(report.unreachable)
        return f"Not everything could be asked: {ends} did not answer."
    if not report.sound:
        return "The data are not as they should be. What is wrong stands below, the worst first."
    if report.breaches:
        return "The data are whole and right; some arrived later than promised."
    if report.stores_equal is None:
        return "Every change is accounted for. Contents were not compared this time."
    return "Every change arrived, once, and every store has the same records as its sources."


def tiles(report: Report) -> tuple[Tile, ...]:
    """Returns the statements of the verdict."""
    total = report.total
    if report.law_holds:
        law = f"All {count(total.captured)} changes captured are accounted for."
    else:
        law = "Captured changes are not all accounted for, or a link has no ledger."
    short = sum(part.short + part.different for part in report.completeness)
    windows = sum(part.windows for part in report.completeness)
    if report.complete and short:
        complete = f"All but {count(short)} of {count(windows)} windows are equal; dead letters"
        complete += " hold what these lack."
    elif report.complete:
        complete = f"All {count(windows)} windows of the manifests are equal at both ends."
    else:
        complete = f"{count(short)} of {count(windows)} windows are not equal, or a gap is open."
    comparison = report.comparison
    if comparison is None:
        equal = "Contents were not compared."
    elif comparison.equal:
        equal = f"{count(comparison.rows)} rows read in {comparison.seconds:.1f} s, all the same."
    else:
        wrong = sum(not match.equal for match in (*comparison.tables, *comparison.stores))
        equal = f"{count(wrong)} comparisons of a table differ."
        if comparison.unreachable:
            equal += f" {count(len(comparison.unreachable))} ends could not be read."
    if report.breaches:
        met = f"{len(report.breaches)} of {len(report.objectives)} objectives are broken."
    elif report.blurred:
        met = (
            f"{len(report.blurred)} of {len(report.objectives)} cannot be told: the logs of their "
            "sources tell commits in whole seconds. The others are met."
        )
    else:
        met = f"All {len(report.objectives)} objectives are met."
    measured = any(part.value is not None for part in report.objectives)
    return (
        Tile(report.law_holds, "Nothing is lost or doubled", law),
        Tile(report.complete, "Every window is complete", complete),
        Tile(report.stores_equal, "The stores are equal", equal),
        Tile(
            report.objectives_met if measured else None,
            "Objectives are met",
            met if measured else "Nothing was measured.",
        ),
    )


def lag_chart(report: Report, link: str, zone: datetime.tzinfo) -> str:
    """Returns an SVG: p50, p90 and p99 of both lanes over time, logarithmic, and the limits."""
    with mpl.rc_context(_RC | {"svg.hashsalt": f"lag {link}"}):
        figure, axes = _figure(2.35)
        for lane in Lane:
            points = [p for p in report.points if p.link == link and p.lane is lane and p.rows]
            if not points:
                continue
            times = [_time(p.start_us, zone) for p in points]
            colour = _COLOURS[lane]
            lows, highs = ([max(getattr(p, q), 0.01) for p in points] for q in ("p50_ms", "p99_ms"))
            axes.fill_between(times, lows, highs, color=colour, alpha=0.13, linewidth=0)
            for name, width, alpha in (
                ("p50_ms", 1.6, 1),
                ("p90_ms", 0.7, 0.6),
                ("p99_ms", 1.1, 1),
            ):
                values = [max(getattr(p, name), 0.01) for p in points]
                marker = "o" if len(points) == 1 else None
                axes.plot(
                    times, values, color=colour, linewidth=width, alpha=alpha, marker=marker, ms=3
                )
                if name != "p90_ms":
                    _end_label(axes, times[-1], values[-1], name.removesuffix("_ms"), colour)
        axes.set_yscale("log")
        _limits(axes, report, link)
        axes.yaxis.set_major_locator(ticker.FixedLocator(_LAG_TICKS_MS))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: milliseconds(value)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
        _time_axis(axes, zone)
        return _svg(figure, f"Lag of {link} over time")


def throughput_chart(report: Report, zone: datetime.tzinfo) -> str:
    """Returns an SVG: delivered rows a second over time, links stacked."""
    rates: dict[str, dict[int, float]] = {link: {} for link in report.links}
    for point in report.points:
        series = rates.setdefault(point.link, {})
        series[point.start_us] = series.get(point.start_us, 0.0) + point.rows / point.seconds
    moments = sorted({at for series in rates.values() for at in series})
    with mpl.rc_context(_RC | {"svg.hashsalt": "throughput"}):
        figure, axes = _figure(2.6, 9.6)
        axes.stackplot(
            [_time(at, zone) for at in moments],
            [[series.get(at, 0.0) for at in moments] for series in rates.values()],
            colors=[_series_colour(i) for i in range(len(rates))],
            labels=list(rates),
            linewidth=0,
            alpha=0.85,
        )
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: count(value)))
        _finish(axes, "rows a second, delivered", zone, stacked=True)
        return _svg(figure, "Throughput over time")


def backlog_chart(report: Report, zone: datetime.tzinfo) -> str:
    """Returns an SVG: log of the sources that is not yet applied, over time."""
    with mpl.rc_context(_RC | {"svg.hashsalt": "backlog"}):
        figure, axes = _figure(2.6, 9.6)
        highest = 1
        for i, link in enumerate(report.links):
            own = [p for p in report.backlog if p.link == link and p.backlog_bytes is not None]
            sizes = [p.backlog_bytes for p in own]
            times = [_time(p.at_us, zone) for p in own]
            axes.plot(times, sizes, color=_series_colour(i), linewidth=1.1, label=link)
            highest = max([highest, *sizes])
        # Four steps at most, each a round number of the unit: a power of two bytes.
        axes.yaxis.set_major_locator(ticker.MultipleLocator(2 ** math.ceil(math.log2(highest / 4))))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: size(value)))
        _finish(axes, "log not yet applied", zone, stacked=False)
        return _svg(figure, "Backlog over time")


def _series_colour(i: int) -> str:
    return _SERIES[i % len(_SERIES)]


def _finish(axes, label: str, zone: datetime.tzinfo, stacked: bool) -> None:
    axes.set_ylim(bottom=0)
    axes.set_title(label, loc="left", fontsize=8.5, color=_INK)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(1.0, 1.02),
        frameon=False,
        fontsize=8,
        handlelength=1,
        reverse=stacked,
    )
    _time_axis(axes, zone)


def _figure(height: float, width: float = 4.8):
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _limits(axes, report: Report, link: str) -> None:
    low, high = axes.get_ylim()
    for measured in report.objectives:
        if measured.link != link or measured.lane is None:
            continue
        limit_ms = measured.limit * (1000 if measured.unit == "s" else 1)
        axes.axhline(limit_ms, color=_COLOURS[measured.lane], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.annotate(
            f"objective {milliseconds(limit_ms)}",
            (0, limit_ms),
            xycoords=("axes fraction", "data"),
            xytext=(2, 2),
            textcoords="offset points",
            color=_COLOURS[measured.lane],
            fontsize=7.5,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.6},
            zorder=1.5,  # Under the lines: what was measured is never hidden.
        )
        high = max(high, limit_ms * 2)
    axes.set_ylim(low, high)


def _end_label(axes, x, y, text: str, colour: str) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        color=colour,
        fontsize=7.5,
        annotation_clip=False,
    )


def _time_axis(axes, zone: datetime.tzinfo) -> None:
    locator = dates.AutoDateLocator(tz=zone, minticks=3, maxticks=6)
    axes.xaxis.set_major_locator(locator)
    formatter = dates.ConciseDateFormatter(locator, tz=zone, show_offset=False)
    formatter.formats[4] = formatter.formats[5] = formatter.zero_formats[4] = "%H:%M"
    formatter.zero_formats[5] = "%H:%M"
    formatter.formats[5] = "%H:%M:%S"
    axes.xaxis.set_major_formatter(formatter)
    axes.margins(x=0.02)


def _svg(figure: Figure, title: str) -> str:
    """Returns the figure as an SVG element that fills its place and says what it is."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _with_points(report: Report) -> list[str]:
    known = {point.link for point in report.points}
    return [link for link in report.links if link in known]


def _lag_by_link(report: Report) -> list[tuple]:
    """Returns health and both lanes' lag of every link."""
    health = {part.link: part for part in report.health}
    lag = {(part.link, part.lane): part for part in report.lag}
    return [
        (link, health.get(link), {lane.value: lag.get((link, lane)) for lane in Lane})
        for link in report.links
    ]


def _by_link(parts: tuple[Conservation, ...]) -> list[tuple[str, list[Conservation]]]:
    found: dict[str, list[Conservation]] = {}
    for part in parts:
        found.setdefault(part.link, []).append(part)
    return list(found.items())


def _completeness(report: Report) -> list[dict]:
    """Returns a row for every link and lane: all its tables together."""
    found: dict[tuple[str, Lane], list[Completeness]] = {}
    for part in report.completeness:
        found.setdefault((part.link, part.lane), []).append(part)
    return [
        {
            "link": link,
            "lane": lane,
            "tables": len(some),
            "windows": sum(part.windows for part in some),
            "unequal": sum(part.short + part.different for part in some),
            "source": sum(part.source_changes for part in some),
            "store": sum(part.store_changes for part in some),
        }
        for (link, lane), some in found.items()
    ]


def _matches(report: Report) -> list[dict]:
    """Returns a row for every store and campus: all its tables together."""
    found: dict[tuple[str, str], list[TableMatch]] = {}
    for match in report.comparison.tables if report.comparison else ():
        found.setdefault((match.campus, match.store), []).append(match)
    faults = ("missing", "extra", "different", "rotten")
    names = ("source_rows", "store_rows", *faults, "refused", "held", "moving")
    return [
        {"campus": campus, "store": store, "tables": len(some)}
        | {"equal": all(match.equal for match in some)}
        | {name: sum(getattr(match, name) for match in some) for name in names}
        for (campus, store), some in found.items()
    ]


def _alarms(report: Report) -> list[dict]:
    """Returns a row for every kind of alarm of a campus; what every store has is one alarm."""
    found: dict[tuple, list[AlarmCount]] = {}
    for part in report.alarms:
        place = (part.campus, part.rule, part.table, part.column, part.reason)
        found.setdefault(place, []).append(part)
    names = ("campus", "rule", "table", "column", "reason")
    return [
        dict(zip(names, place, strict=True))
        | {"open": max(part.open for part in some), "ever": max(part.ever or 0 for part in some)}
        for place, some in sorted(found.items())
    ]


def _time(us: int, zone: datetime.tzinfo) -> datetime.datetime:
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (epoch + datetime.timedelta(microseconds=us)).astimezone(zone)


def _zone_name(report: Report, zone: datetime.tzinfo) -> str:
    offset = _time(report.made_us, zone).strftime("%z")
    return "UTC" if offset == "+0000" else f"UTC{offset[:3]}:{offset[3:]}"
