"""Line charts as inline SVG that takes colours and fonts from the page, light or dark; no scripts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator


WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 44, 16, 24, 36
MOST_POINTS = 120

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Values of one variant over steps: one list of (step, value) per seed, and the class that colours it."""

    title: str
    css_class: str
    seeds: Sequence[Sequence[Point]]
    statistics: list[tuple[float, float, float, float]] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", _statistics(self.seeds))


def _statistics(seeds: Sequence[Sequence[Point]]) -> list[tuple[float, float, float, float]]:
    """(step, mean, lowest, highest) over seeds, neighbouring steps averaged where there are too many to draw."""
    by_step: dict[float, list[float]] = {}
    for points in seeds:
        for step, value in points:
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    size = -(-len(steps) // MOST_POINTS) or 1
    result = []
    for start in range(0, len(steps), size):
        chunk = steps[start : start + size]
        columns = [(sum(v) / len(v), min(v), max(v)) for v in (by_step[step] for step in chunk)]
        means = [sum(column) / len(chunk) for column in zip(*columns, strict=True)]
        result.append((sum(chunk) / len(chunk), *means))
    return result


def line_chart(title: str, lines: Sequence[Line], stages: Mapping[str, float], percent: bool = False) -> Markup:
    """A chart of the lines' means with bands from the lowest to the highest seed.

    Args:
        stages: name -> step at which the stage starts; drawn as dotted separators.
        percent: the values are shares, written as percentages.
    """
    drawn = [line for line in lines if line.statistics]
    values = [value for line in drawn for _, _, low, high in line.statistics for value in (low, high)]
    x_high = max(line.statistics[-1][0] for line in drawn)
    y_ticks = [float(tick) for tick in MaxNLocator(5).tick_values(min(0, *values), max(values))]
    y_low, y_high = y_ticks[0], y_ticks[-1]
    x_ticks = [float(tick) for tick in MaxNLocator(5, integer=True).tick_values(0, x_high) if 0 <= tick <= x_high]

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / (x_high or 1)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - y_low) / (y_high - y_low)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in y_ticks:
        label = f"{100 * tick:.0f} %" if percent else f"{tick:g}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in x_ticks:
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for name, step in stages.items():
        if step > x_high:
            continue
        parts.append(
            f'<line class="stage" x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP - 6}" y2="{HEIGHT - BOTTOM}"/>'
        )
        parts.append(f'<text x="{x(step) + 4:.1f}" y="{TOP - 10}">{escape(name)}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">optimizer steps</text>')
    for line in drawn:
        if len(line.seeds) > 1:
            edge = [f"{x(step):.1f},{y(high):.1f}" for step, _, _, high in line.statistics]
            edge += [f"{x(step):.1f},{y(low):.1f}" for step, _, low, _ in reversed(line.statistics)]
            parts.append(f'<polygon class="band {line.css_class}" points="{" ".join(edge)}"/>')
    for index, line in enumerate(drawn):
        thickness = max(1.5, 4.5 - 1.5 * index)  # where lines coincide, the earlier ones show as a rim
        path = " ".join(f"{x(step):.1f},{y(mean):.1f}" for step, mean, _, _ in line.statistics)
        last = line.statistics[-1][1]
        shown = f"{100 * last:.1f} %" if percent else f"{last:.3g}"
        hover = f"<title>{escape(line.title)}: {shown} at the end</title>"
        look = f'class="line {line.css_class}" stroke-width="{thickness}"'
        parts.append(f'<polyline {look} points="{path}">{hover}</polyline>')
    parts.append("</svg>")
    return Markup("".join(parts))
