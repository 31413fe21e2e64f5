"""The results of a run as data: their schema, and what may be said about them (claims and tables, with their rules).

Rules, because numbers from few seeds invite wishful reading:
- The spread of a number is its range over seeds (highest - lowest); two variants differ if their means are further
  apart than the larger of their two spreads. With one seed the spread is unknown and nothing is decided.
- The best of a column is marked only if it differs in this sense from every other variant.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from agevlm.analysis.attention import Example
from agevlm.evaluation.tables import lookup


BASELINE, GUIDED = "ca-baseline", "agevlm"
MASS_RATIO = 3.0  # what the method claims: in-mask attention mass over the unguided baseline's


class Stage(TypedDict):
    """One training stage of a run. `log`: the trainer's `log_history` (entries with step, loss, and where measured
    guidance_loss and in_mask_mass). `guidance_weight`: the factor of the guidance loss inside `loss`, 0 for none."""

    name: str
    log: list[dict[str, Any]]
    guidance_weight: float


class Run(TypedDict):
    """One seed of one variant. `evaluations`: split -> what `agevlm.evaluation.run.evaluate_scenes` returns."""

    seed: int
    evaluations: dict[str, dict[str, Any]]
    stages: list[Stage]


class Variant(TypedDict):
    """`name` is the recipe's ("ca-baseline", "agevlm", "agevlm-lm"), `title` what people read."""

    name: str
    title: str
    runs: list[Run]


class Section(TypedDict):
    """A table of texts (the first line is the head) and files of pictures below it."""

    title: str
    note: str
    lines: list[list[str]]
    images: list[str]


class Results(TypedDict):
    """Everything the report shows. The first split of the evaluations is the one that the claims are about.
    `seconds`: wall-clock time per part of the run, in order. `settings`: anything worth telling, flat. `findings`:
    claims that replace those made here; `sections`: more tables; `numbers`: whatever the JSON should hold besides."""

    title: str
    variants: list[Variant]
    examples: list[Example]
    settings: dict[str, Any]
    versions: dict[str, str]
    commit: NotRequired[str | None]
    seconds: dict[str, float]
    findings: NotRequired[Sequence["Claim"]]
    sections: NotRequired[list[Section]]
    numbers: NotRequired[dict[str, Any]]


@dataclass(frozen=True)
class Claim:
    """A statement with its verdict: True, False, or None where the data cannot decide."""

    title: str
    holds: bool | None
    sentence: str


@dataclass(frozen=True)
class Measured:
    """One number of one variant over its seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def spread(self) -> float | None:
        """Range over seeds; None with one seed."""
        return max(self.values) - min(self.values) if len(self.values) > 1 else None


def exceeds(first: Measured, second: Measured) -> bool | None:
    """Whether `first` is above `second` by more than the larger of their spreads; None if a spread is unknown."""
    if first.spread is None or second.spread is None:
        return None
    return first.mean - second.mean > max(first.spread, second.spread)


def splits(results: Results) -> list[str]:
    """The splits that every run of every variant has been evaluated on, in the order of the first run.

    Raises:
        ValueError: there is no variant, no run, or no common split.
    """
    runs = [run for variant in results["variants"] for run in variant["runs"]]
    if not runs or not all(variant["runs"] for variant in results["variants"]):
        raise ValueError("results: every variant needs at least one run, and there must be a variant")
    common = [name for name in runs[0]["evaluations"] if all(name in run["evaluations"] for run in runs)]
    if not common:
        raise ValueError("results: no split was evaluated in every run; evaluate all variants on the same splits")
    return common


Reader = Callable[[dict[str, Any]], float]


def measure(variant: Variant, split: str, read: Reader) -> Measured:
    return Measured(tuple(read(run["evaluations"][split]) for run in variant["runs"]))


# -- claims -----------------------------------------------------------------------------------------------------------


def _presence_accuracy(metrics: dict[str, Any]) -> float:
    return metrics["benchmarks"]["pope"]["accuracy"]


def _mass(metrics: dict[str, Any]) -> float:
    return metrics["grounding"]["in_mask_mass"]["mean"]


def claims(results: Results) -> list[Claim]:
    """What the run shows about the method, from its first split. Claims that lack their variants or benchmark are
    left out."""
    split = splits(results)[0]
    by_name = {variant["name"]: variant for variant in results["variants"]}
    if BASELINE not in by_name or GUIDED not in by_name:
        return []
    baseline, guided = by_name[BASELINE], by_name[GUIDED]
    every = [run["evaluations"][split] for variant in (baseline, guided) for run in variant["runs"]]
    found = []
    if all(metrics["grounding"]["n"] for metrics in every):
        found.append(_looks(baseline, guided, split))
    if all("pope" in metrics["benchmarks"] for metrics in every):
        found += [_answers(baseline, guided, split), _beats_constants(guided, split)]
    return found


def summary(found: Sequence[Claim]) -> str:
    """One sentence on which claims hold."""
    parts = []
    for verdict, words in ((True, "holds"), (False, "does not hold"), (None, "is undecided")):
        titles = [f"“{claim.title.split(':')[0].lower()}”" for claim in found if claim.holds is verdict]
        if titles:
            listed = " and ".join([", ".join(titles[:-1]), titles[-1]] if len(titles) > 1 else titles)
            parts.append(f"{listed} {words if len(titles) == 1 else _PLURAL[words]}")
    return f"Of {len(found)} claims, {'; '.join(parts)}."


_PLURAL = {"holds": "hold", "does not hold": "do not hold", "is undecided": "are undecided"}


def _looks(baseline: Variant, guided: Variant, split: str) -> Claim:
    """The ratio of the means over seeds decides."""
    low, high = measure(baseline, split, _mass), measure(guided, split, _mass)
    uniform = guided["runs"][0]["evaluations"][split]["grounding"]["uniform"]["in_mask_mass"]
    ratio = high.mean / low.mean
    return Claim(
        f"Looks where it should: at least {MASS_RATIO:g} times the baseline's attention inside the mask",
        ratio >= MASS_RATIO,
        f"{guided['title']} puts {100 * high.mean:.1f} % of its attention inside the mask, {baseline['title']} "
        f"{100 * low.mean:.1f} %: {ratio:.1f} times as much. Spread evenly it would be {100 * uniform:.1f} %.",
    )


def _answers(baseline: Variant, guided: Variant, split: str) -> Claim:
    low, high = measure(baseline, split, _presence_accuracy), measure(guided, split, _presence_accuracy)
    holds, difference = exceeds(high, low), high.mean - low.mean
    text = f"Presence accuracy is {high.mean:.1f} % against {low.mean:.1f} % ({difference:+.1f} points)"
    if holds is None:
        text += "; one seed cannot tell whether that is more than chance."
    else:
        spread = max(high.spread or 0.0, low.spread or 0.0)
        text += f", with a spread over seeds of {spread:.1f} points."
    return Claim(
        "Answers better: presence accuracy above the baseline's by more than the spread over seeds", holds, text
    )


def _beats_constants(guided: Variant, split: str) -> Claim:
    """Every seed must be above the best constant by two standard errors of an accuracy over its questions."""
    runs = [run["evaluations"][split]["benchmarks"]["pope"] for run in guided["runs"]]
    name, best = best_constant(runs[0]["constants"], ("accuracy",))
    lowest = min(run["accuracy"] for run in runs)
    margin = 100 * 2 * (0.25 / runs[0]["n"]) ** 0.5
    return Claim(
        "Uses the picture: presence accuracy above any constant answer",
        lowest > best + margin,
        f"The weakest seed of {guided['title']} reaches {lowest:.1f} %; the best constant answer ({name}) "
        f"{best:.1f} % on {runs[0]['n']} questions, where two standard errors are {margin:.1f} points.",
    )


# -- tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table. `read` gives a run's number from its metrics, `reference` that of answering or looking
    blindly under a name, None where that has none. `ranked`: higher is better, the best is marked."""

    title: str
    group: str
    read: Reader
    reference: Callable[[dict[str, Any], str], float | None]
    ranked: bool = True
    digits: int = 1


@dataclass(frozen=True)
class Cell:
    """`text` of the mean, `spread` of the seeds as a half range or empty, `best` if it is marked."""

    text: str
    spread: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    title: str
    cells: list[Cell]
    is_reference: bool = False


@dataclass(frozen=True)
class Table:
    title: str
    groups: list[tuple[str, int]]
    columns: list[str]
    rows: list[Row]


ALWAYS_YES, ALWAYS_NO = "Always “yes”", "Always “no”"
BEST_CONSTANT, CHANCE = "Best constant answer", "Chance"
UNIFORM, CENTRE = "Spread evenly", "On the centre"


def best_constant(constants: Mapping[str, Any], path: Sequence[str]) -> tuple[str, float]:
    """The constant answer that scores highest in the metric at `path`, and its score; chance is no constant."""
    scores = {name: lookup(made, path) for name, made in constants.items() if name != "chance"}
    name = max(scores, key=lambda name: scores[name])
    return name, scores[name]


def _score(group: str, title: str, name: str, *path: str, ranked: bool = True) -> Column:
    """A column of a benchmark's metric. Where "yes" and "no" are the constants, each has a row of its own."""

    def reference(metrics: dict[str, Any], which: str) -> float | None:
        constants = metrics["benchmarks"][name]["constants"]
        if which == BEST_CONSTANT:
            return None if "always yes" in constants else best_constant(constants, path)[1]
        guess = {ALWAYS_YES: "always yes", ALWAYS_NO: "always no", CHANCE: "chance"}.get(which, which)
        return lookup(constants, (guess, *path))

    return Column(title, group, lambda metrics: lookup(metrics["benchmarks"][name], path), reference, ranked)


def _worst_unparsed(metrics: dict[str, Any]) -> float:
    return max(result["unparsed"] for result in metrics["benchmarks"].values())


def answer_columns(metrics: dict[str, Any]) -> list[Column]:
    """Columns of the answers' table, for the benchmarks that `metrics` has."""
    columns: list[Column] = []
    present = metrics["benchmarks"]
    if "pope" in present:
        columns += [
            _score("Presence", "accuracy", "pope", "accuracy"),
            _score("Presence", "F1", "pope", "f1"),
            _score("Presence", "says yes", "pope", "yes_ratio", ranked=False),
        ]
    if "cvbench" in present:
        names = {"Count": "counting", "Relation": "position", "Depth": "in front"}
        columns += [
            _score("Multiple choice", names.get(task, task.lower()), "cvbench", "tasks", task)
            for task in present["cvbench"]["tasks"]
        ]
    others = (("ocrbench", "reading", "accuracy"), ("hallusionbench", "edited pairs", "aAcc"),
              ("realworldqa", "free", "accuracy"))  # fmt: skip
    columns += [_score("Other", title, name, metric) for name, title, metric in others if name in present]
    return [*columns, Column("unread", "Format", _worst_unparsed, lambda *_: None, ranked=False)]


def _grounding(group: str, title: str, pick: Callable[[dict[str, Any]], dict[str, Any]], metric: str) -> Column:
    def reference(metrics: dict[str, Any], which: str) -> float | None:
        baseline = {UNIFORM: "uniform", CENTRE: "centre"}.get(which)
        return None if baseline is None else 100 * pick(metrics)[baseline][metric]

    return Column(title, group, lambda metrics: 100 * pick(metrics)[metric]["mean"], reference)


def _pooled(metrics: dict[str, Any]) -> dict[str, Any]:
    return metrics["grounding"]


def _presence(metrics: dict[str, Any]) -> dict[str, Any]:
    return metrics["benchmarks"]["pope"]["grounding"]


def _over_uniform(metrics: dict[str, Any], which: str) -> float | None:
    baseline = {UNIFORM: "uniform", CENTRE: "centre"}.get(which)
    if baseline is None:
        return None
    pooled = _pooled(metrics)
    return pooled[baseline]["in_mask_mass"] / pooled["uniform"]["in_mask_mass"]


def _layer(index: int, layer: int) -> Column:
    whole = _grounding("", "", _pooled, "in_mask_mass")
    return Column(
        f"layer {layer}",
        "In the mask, by cross layer",
        lambda metrics: 100 * _pooled(metrics)["in_mask_mass"]["per_layer"][index],
        whole.reference,
    )


def looking_columns(metrics: dict[str, Any]) -> list[Column]:
    """Columns of the table of attention; empty if nothing was measured."""
    if not _pooled(metrics)["n"]:
        return []
    everything = "All questions"
    columns = [
        _grounding(everything, "in the mask", _pooled, "in_mask_mass"),
        Column("× even", everything, lambda m: _pooled(m)["mass_over_uniform"], _over_uniform, digits=2),
        _grounding(everything, "points at it", _pooled, "pointing_accuracy"),
    ]
    if "pope" in metrics["benchmarks"] and _presence(metrics)["n"]:
        columns += [
            _grounding("Presence", "in the mask", _presence, "in_mask_mass"),
            _grounding("Presence", "points at it", _presence, "pointing_accuracy"),
        ]
    return columns + [_layer(index, layer) for index, layer in enumerate(_pooled(metrics)["layers"])]


def tables(results: Results, split: str) -> list[Table]:
    """The tables of one split: answers, and where the models looked."""
    metrics = results["variants"][0]["runs"][0]["evaluations"][split]
    made = [
        _table("Answers", answer_columns(metrics), results, split, (ALWAYS_YES, ALWAYS_NO, BEST_CONSTANT, CHANCE)),
        _table("Where they look", looking_columns(metrics), results, split, (UNIFORM, CENTRE)),
    ]
    return [table for table in made if table.columns]


def _table(title: str, columns: Sequence[Column], results: Results, split: str, references: Iterable[str]) -> Table:
    variants = results["variants"]
    measured = [[measure(variant, split, column.read) for column in columns] for variant in variants]
    rows = []
    for variant, numbers in zip(variants, measured, strict=True):
        cells = []
        for index, (column, number) in enumerate(zip(columns, numbers, strict=True)):
            rivals = [other[index] for other in measured if other is not numbers]
            best = column.ranked and bool(rivals) and all(exceeds(number, rival) for rival in rivals)
            spread = "" if number.spread is None else f"{number.spread / 2:.{column.digits}f}"
            cells.append(Cell(f"{number.mean:.{column.digits}f}", spread, best))
        rows.append(Row(variant["title"], cells))
    metrics = variants[0]["runs"][0]["evaluations"][split]
    for name in references:
        values = [column.reference(metrics, name) for column in columns]
        if any(value is not None for value in values):
            cells = [
                Cell("" if value is None else f"{value:.{column.digits}f}")
                for column, value in zip(columns, values, strict=True)
            ]
            rows.append(Row(name, cells, is_reference=True))
    groups: list[tuple[str, int]] = []
    for column in columns:
        if groups and groups[-1][0] == column.group:
            groups[-1] = (column.group, groups[-1][1] + 1)
        else:
            groups.append((column.group, 1))
    return Table(title, groups, [column.title for column in columns], rows)
