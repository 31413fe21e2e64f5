"""What a reproduction found: tables, claims, figures and three files, `report.html`, `report.json` and `report.md`.

Two kinds of uncertainty stand beside each number and are never mixed: in brackets the bootstrap 95 % interval over the
questions (of the mean over seeds, each question in all seeds at once), in parentheses the lowest and highest seed.

A claim of the paper holds where the paired interval of the difference over questions excludes 0 in its favour *and*
every seed agrees in sign; it does not hold where the interval excludes 0 against it, or spans it; with fewer than two
seeds it is undecided. A claim whose rows are missing is listed as not run.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from agevlm.analysis.attention import write_examples
from agevlm.analysis.figures import save_rows
from agevlm.analysis.report import write_report
from agevlm.analysis.results import Claim, Example, Section, Variant
from agevlm.data.scenes import load_benchmark
from agevlm.evaluation import pope
from agevlm.evaluation.benchmark import Benchmark, units_of
from agevlm.evaluation.generate import without_pictures as plain
from agevlm.evaluation.measures import Measure, interval, mean, paired_difference, share
from agevlm.evaluation.models import load_checkpoint
from agevlm.evaluation.run import BENCHMARKS, load_scenes
from agevlm.evaluation.tables import markdown_table
from agevlm.matrix import MAIN, Row, matrix
from agevlm.quickstart import SPLIT
from agevlm.training.lineage import git_commit, library_versions, read_lineage


Found = Mapping[str, Mapping[int, Mapping[str, Any]]]  # row -> seed -> see `reproduce.collect`
TABLE_2 = (
    ("pope", ("f1",), "POPE F1"),
    ("pope", ("accuracy",), "POPE accuracy"),
    ("cvbench", ("2D",), "CV-Bench 2D"),
    ("cvbench", ("3D",), "CV-Bench 3D"),
    ("realworldqa", ("accuracy",), "RealWorldQA"),
    ("hallusionbench", ("aAcc",), "Hallusion aAcc"),
    ("hallusionbench", ("fAcc",), "Hallusion fAcc"),
    ("hallusionbench", ("qAcc",), "Hallusion qAcc"),
    ("ocrbench", ("accuracy",), "OCRBench"),
)
MASS = "attention inside the mask"
BASELINE, GUIDED, TWIN = "ca-baseline", "agevlm", "twin"


@dataclass(frozen=True)
class Number:
    """One number of a row: of each seed, their mean's interval over questions, and the measures it comes from."""

    seeds: dict[int, Measure]
    units: np.ndarray

    @property
    def over_seeds(self) -> Measure:
        return mean(list(self.seeds.values()))

    def text(self) -> str:
        values = [measure.value() for measure in self.seeds.values()]
        low, high = interval(self.over_seeds, self.units)
        seeds = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        return f"{self.over_seeds.value():.1f} [{low:.1f}, {high:.1f}]{seeds}"

    def as_json(self) -> dict[str, Any]:
        return {
            "mean": self.over_seeds.value(),
            "interval": interval(self.over_seeds, self.units),
            "seeds": {str(seed): measure.value() for seed, measure in self.seeds.items()},
        }


class Scores:
    """All numbers of all measured rows, read from the files of `found`.

    Rows of a benchmark that any model skipped are left out for all, so that numbers compare and pair.
    """

    def __init__(self, found: Found, scenes: Path):
        self.found = {name: runs for name, runs in found.items() if runs}
        self.benchmarks = [known["paper"] for known in BENCHMARKS.values()]
        data = load_scenes(scenes, SPLIT, self.benchmarks)
        self.rows: dict[str, list[Any]] = {}
        self.numbers: dict[str, dict[str, Number]] = {name: {} for name in self.found}
        self.constants: dict[str, float] = {}
        for benchmark in self.benchmarks:
            self._read_answers(benchmark, list(plain(data[benchmark.name])))
        self._read_looking()

    def _files(self, name: str) -> dict[tuple[str, int], list[dict[str, Any]]]:
        return {
            (row, seed): read_lines(run["measured"] / "evaluation" / name)
            for row, runs in self.found.items()
            for seed, run in runs.items()
        }

    def _read_answers(self, benchmark: Benchmark, rows: list[Any]) -> None:
        predictions = self._files(f"{benchmark.name}/predictions.jsonl")
        kept = [
            index
            for index in range(len(rows))
            if all(lines[index]["verdict"] != "skipped" for lines in predictions.values())
        ]
        usable = self.rows[benchmark.name] = [rows[index] for index in kept]
        units = units_of([benchmark.unit(row) for row in usable])
        wanted = [(path, title) for name, path, title in TABLE_2 if name == benchmark.name]
        for path, title in wanted:
            scores = [value for made in benchmark.constants(usable).values() if (value := _at(made, path)) is not None]
            self.constants[title] = max(scores)
        for row, runs in self.found.items():
            measures = {}
            for seed in runs:
                lines = predictions[row, seed]
                parsed = [benchmark.parse(rows[index], lines[index]["output"]) for index in kept]
                measures[seed] = benchmark.all_measures(usable, parsed)
            for path, title in wanted:
                self.numbers[row][title] = Number({seed: made[path] for seed, made in measures.items()}, units)

    def _read_looking(self) -> None:
        """Attention inside the mask, mean over cross layers, on all questions that have one."""
        records: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for benchmark in self.benchmarks:
            for key, lines in self._files(f"{benchmark.name}/grounding.jsonl").items():
                records.setdefault(key, []).extend(lines)
        records = {key: lines for key, lines in records.items() if lines}
        if not records:
            return
        common = set.intersection(*({line["id"] for line in lines} for lines in records.values()))
        unit = {row["id"]: (b.name, b.unit(row)) for b in self.benchmarks for row in self.rows[b.name]}
        for row, runs in self.found.items():
            measures, units = {}, np.zeros(0, dtype=np.int64)
            for seed in runs:
                lines = [line for line in records.get((row, seed), []) if line["id"] in common]
                if lines:
                    measures[seed] = share([np.mean(line["in_mask_mass"]) for line in lines])
                    units = units_of([unit.get(line["id"], line["id"]) for line in lines])
                    self.constants[MASS] = 100 * float(np.mean([line["uniform"]["in_mask_mass"] for line in lines]))
            if measures:
                self.numbers[row][MASS] = Number(measures, units)

    def difference(self, first: str, second: str, title: str) -> dict[str, Any] | None:
        """`second` - `first` over the seeds that both have: paired over questions, and for each seed."""
        one, other = (self.numbers.get(name, {}).get(title) for name in (first, second))
        if one is None or other is None:
            return None
        seeds = sorted(set(one.seeds) & set(other.seeds))
        if not seeds:
            return None
        pair = [mean([number.seeds[seed] for seed in seeds]) for number in (one, other)]
        by_seed = {str(seed): other.seeds[seed].value() - one.seeds[seed].value() for seed in seeds}
        return {**paired_difference(pair[0], pair[1], one.units), "seeds": by_seed}


def _at(values: Any, path: Sequence[str]) -> Any:
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return None
        values = values[key]
    return values


def read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


# -- claims -----------------------------------------------------------------------------------------------------------


def decide(difference: Mapping[str, Any]) -> bool | None:
    """Whether `second` is above `first`: see the top of this file."""
    if len(difference["seeds"]) < 2:
        return None
    return difference["interval"][0] > 0 and all(value > 0 for value in difference["seeds"].values())


def compared(title: str, difference: Mapping[str, Any] | None, what: str) -> Claim:
    """A claim that one row is above another in one number."""
    if difference is None:
        return Claim(title, None, f"Not run: {what} needs rows that are not there.")
    low, high = difference["interval"]
    seeds = ", ".join(f"{value:+.1f}" for value in difference["seeds"].values())
    sentence = (
        f"{what}: {difference['difference']:+.1f} points [{low:+.1f}, {high:+.1f}] over questions; seeds {seeds}."
    )
    return Claim(title, decide(difference), sentence)


def claims(scores: Scores, similarity: Mapping[str, list[Any]], padding: Mapping[str, list[Any]]) -> list[Claim]:
    """The paper's claims, each from numbers."""
    made = [
        compared(
            "Section 3.2.2: guidance moves the cross-attention onto the object",
            scores.difference(BASELINE, GUIDED, MASS),
            "AGE-VLM over CA-baseline, attention inside the mask",
        ),
        compared(
            "Section 3.2.3: guiding stage 4 too moves it further",
            scores.difference(GUIDED, "agevlm-lm", MASS),
            "AGE-VLM-LM over AGE-VLM, attention inside the mask",
        ),
    ]
    made += [
        compared(
            f"Table 2, {title}: AGE-VLM above the CA-baseline",
            scores.difference(BASELINE, GUIDED, title),
            f"AGE-VLM over CA-baseline, {title}",
        )
        for _, _, title in TABLE_2
    ]
    made.append(
        compared(
            "Table 2: cross-attention above concatenation",
            scores.difference(TWIN, BASELINE, "POPE accuracy"),
            "CA-baseline over the concatenating twin, POPE accuracy",
        )
    )
    return [*made, _apart(similarity), _looks_at_padding(padding), _padding(padding)]


def _apart(similarity: Mapping[str, list[Any]]) -> Claim:
    title = "Figure 2: final hidden states of a concatenating model do not tell matched pairs from mismatched ones"
    if not similarity.get(TWIN):
        return Claim(title, None, "Not run: it needs the concatenating twin.")
    spans = [entry["headline"]["auroc_interval"] for entry in similarity[TWIN]]
    words = ", ".join(f"{e['headline']['auroc']:.3f} [{low:.3f}, {high:.3f}]"
                      for e, (low, high) in zip(similarity[TWIN], spans, strict=True))  # fmt: skip
    holds = None if len(spans) < 2 else all(low <= 0.5 <= high for low, high in spans)
    return Claim(title, holds, f"AUROC of the twin's final layer, one per seed: {words}; 0.5 tells nothing apart.")


def _enrichment(padding: Mapping[str, list[Any]], name: str) -> list[float]:
    """Of unmarked padding, per seed."""
    return [entry["variants"]["pad"]["enrichment"] for entry in padding.get(name, [])]


def _looks_at_padding(padding: Mapping[str, list[Any]]) -> Claim:
    title = "Appendix C: without guidance, attention goes to padding"
    found = _enrichment(padding, BASELINE)
    if not found:
        return Claim(title, None, "Not run: it needs the CA-baseline.")
    sentence = (
        f"The CA-baseline's attention on unmarked padding is {min(found):.2f} to {max(found):.2f} times that of an "
        "even spread, lowest to highest seed."
    )
    return Claim(title, None if len(found) < 2 else min(found) > 1, sentence)


def _padding(padding: Mapping[str, list[Any]]) -> Claim:
    """`pad`: what the models do where nobody tells them what is padding."""
    title = "Appendix C: guidance takes attention off padding"
    low, high = (_enrichment(padding, name) for name in (GUIDED, BASELINE))
    if not low or not high:
        return Claim(title, None, "Not run: it needs AGE-VLM and CA-baseline.")
    sentence = (
        f"Attention on unmarked padding over its share of the area, lowest to highest seed: AGE-VLM {min(low):.2f} to "
        f"{max(low):.2f}, CA-baseline {min(high):.2f} to {max(high):.2f}; 1 is indifference."
    )
    return Claim(title, None if min(len(low), len(high)) < 2 else max(low) < min(high), sentence)


# -- tables -----------------------------------------------------------------------------------------------------------


def sections(
    scores: Scores, found: Found, similarity: Mapping[str, list[Any]], padding: Mapping[str, list[Any]]
) -> list[Section]:
    """The report's tables, in the order of the paper."""
    rows = {row.name: row for row in matrix()}
    main = [name for name in scores.found if rows[name].group == MAIN]
    note = (
        "Mean over seeds, [bootstrap 95 % interval over questions], (lowest to highest seed). Percent. “Blind”: the "
        "best constant answer or chance; for looking, spread evenly."
    )
    titles = [title for _, _, title in TABLE_2]
    table_2 = [["", *(rows[name].title for name in main), "blind"]]
    for title in [*titles, MASS]:
        if title in scores.constants:
            cells = [_text(scores, name, title) for name in main]
            table_2.append([title, *cells, f"{scores.constants[title]:.1f}"])
    table_2.append(["seeds", *(_seeds(found[name]) for name in main), ""])
    shown = ("POPE accuracy", "CV-Bench 2D", MASS)
    ablation = [["what", "row", "seeds", "steps", *shown, f"{MASS}, over AGE-VLM"]]
    for row in matrix():
        runs = found.get(row.name, {})
        if not runs:
            ablation.append([row.group, row.title, "not run", *[""] * (len(shown) + 2)])
            continue
        against = scores.difference(GUIDED, row.name, MASS) if row.name != GUIDED else None
        steps = str(next(iter(runs.values()))["steps"])
        numbers = [_text(scores, row.name, title) for title in shown]
        ablation.append([row.group, row.title, _seeds(runs), steps, *numbers, _difference(against)])
    made = (
        ("Table 2's analogue", note, table_2),
        ("Figure 2's analogue: similarity", _SIMILARITY, _similarity(similarity, rows)),
        ("Appendix C's analogue: padding", _PADDING, _padding_lines(padding, rows)),
        ("Matrix and ablation", _ABLATION, ablation),
    )
    return [{"title": title, "note": note, "lines": lines, "images": []} for title, note, lines in made]


_SIMILARITY = (
    "Mean over seeds (lowest to highest). Cosines of the headline layer: the last one of a concatenating model, the "
    "last cross block of ours. AUROC 0.5: matched and mismatched pairs cannot be told apart. Paper: ConvLLaVA 0.96 to "
    "0.98 for both."
)
_PADDING = (
    "Attention on padded cells over their share of the area (enrichment), mean over seeds (lowest to highest): `own` "
    "is the processor as it is, which masks empty cells; under `pad` nobody tells the model; under `stretch` and "
    "`crop` the same cells show picture."
)
_ABLATION = (
    "Every row differs from AGE-VLM in what its name says. The last column is paired over the questions and the seeds "
    "that both rows have. Rows of one seed show what to look at next, not what is so."
)


def _text(scores: Scores, name: str, title: str) -> str:
    number = scores.numbers[name].get(title)
    return "–" if number is None else number.text()


def _seeds(runs: Mapping[int, Any]) -> str:
    return ", ".join(map(str, runs))


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["interval"]
    return f"{found['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _spread(values: Sequence[float | None], digits: int = 3) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{sum(known) / len(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def _similarity(similarity: Mapping[str, list[Any]], rows: Mapping[str, Row]) -> list[list[str]]:
    lines = [["", "matched", "mismatched", "overlap", "AUROC", "AUROC, centred", "AUROC, query and key", "seeds"]]
    for name, entries in similarity.items():
        heads = [entry["headline"] for entry in entries]
        centred = [
            next(e["auroc"] for e in entry["measures"]["centred"] if e["layer"] == entry["headline"]["layer"])
            for entry in entries
        ]
        keys = [entry["measures"]["qk_cosine"][-1]["auroc"] for entry in entries]
        means = [_spread([head[side]["mean"] for head in heads]) for side in ("matched", "mismatched")]
        apart = [_spread([head[name] for head in heads]) for name in ("overlap", "auroc")]
        lines.append([rows[name].title, *means, *apart, _spread(centred), _spread(keys), str(len(entries))])
    return lines


def _padding_lines(padding: Mapping[str, list[Any]], rows: Mapping[str, Row]) -> list[list[str]]:
    variants = ("own", "pad", "stretch", "crop")
    lines = [["", *variants, "seeds"]]
    for name, entries in padding.items():
        cells = [_spread([entry["variants"][variant]["enrichment"] for entry in entries], 2) for variant in variants]
        lines.append([rows[name].title, *cells, str(len(entries))])
    return lines


# -- files ------------------------------------------------------------------------------------------------------------


def write_findings(
    output: Path, size: str, scenes: Path, found: Found, failed: Mapping[str, str], seconds: float
) -> dict[str, Any]:
    """Writes the three files and the figures, and returns the content of the JSON's `numbers`.

    Raises:
        ValueError: nothing has been measured.
    """
    found = {name: runs for name, runs in found.items() if runs}
    if not found:
        raise ValueError(f"{output}: no row has been trained and measured, so there is nothing to report")
    scores = Scores(found, scenes)
    similarity = _read_all(found, "similarity/similarity.json")
    padding = _read_all(found, "padding.json")
    made = sections(scores, found, similarity, padding)
    titles = {row.name: row.title for row in matrix()}
    looking = {titles[name]: made[MASS].as_json() for name, made in scores.numbers.items() if MASS in made}
    if looking:
        save_rows(looking, f"{MASS}, %", scores.constants[MASS], output / "looking.png")
        made[-1]["images"].append(str(output / "looking.png"))
    decided = claims(scores, similarity, padding)
    numbers = {
        name: {title: number.as_json() for title, number in by_title.items()}
        for name, by_title in scores.numbers.items()
    }
    folders = {folder for runs in found.values() for run in runs.values() for _, folder in run["stages"]}
    settings = {
        "size": size,
        "date": date.today().isoformat(),
        "split": SPLIT,
        "measured at commit": str(git_commit())[:12],
        "stages trained at commit": ", ".join(sorted({_commit(folder) for folder in folders})),
    }
    settings |= {f"failed: {name}": reason for name, reason in failed.items()}
    variants = [_variant(name, titles[name], runs) for name, runs in found.items() if MASS in scores.numbers[name]]
    main = {row.name for row in matrix() if row.group == MAIN}
    write_report(
        output / "report.html",
        output / "report.json",
        {
            "title": f"AGE-VLM reproduction, size {size}",
            "variants": [variant for variant in variants if variant["name"] in main] or variants,
            "examples": _examples(found, scenes, output / "examples", titles),
            "settings": settings,
            "versions": library_versions(),
            "commit": git_commit(),
            "seconds": {"this call": seconds},
            "findings": decided,
            "sections": made,
            "numbers": numbers,
        },
    )
    page = markdown(size, settings, decided, made)
    (output / ".report.md").write_text(page, encoding="utf-8")
    (output / ".report.md").replace(output / "report.md")
    return numbers


def _read_all(found: Found, name: str) -> dict[str, list[dict[str, Any]]]:
    """Row -> a file of each seed that has it; rows without it are left out."""
    files = {row: [run["measured"] / name for run in runs.values()] for row, runs in found.items()}
    read = {row: [read_json(path) for path in paths if path.is_file()] for row, paths in files.items()}
    return {row: entries for row, entries in read.items() if entries}


def _commit(folder: Path) -> str:
    lineage = read_lineage(folder)
    return str(lineage["git_commit"])[:12] if lineage is not None else "unknown"


def _variant(name: str, title: str, runs: Mapping[int, Any]) -> Variant:
    made: list[Any] = []
    for seed, run in runs.items():
        stages = [
            {
                "name": recipe.name,
                "log": TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).log_history,
                "guidance_weight": recipe.training["guidance_weight"],
            }
            for recipe, folder in run["stages"]
        ]
        evaluation = read_json(run["measured"] / "evaluation" / "metrics.json")
        made.append({"seed": seed, "evaluations": {SPLIT: evaluation}, "stages": stages})
    return {"name": name, "title": title, "runs": made}


def _examples(found: Found, scenes: Path, output: Path, titles: Mapping[str, str], count: int = 4) -> list[Example]:
    """The first presence questions with something to look at, for every cross-attention row of the main group."""
    rows = load_benchmark(scenes, SPLIT, pope.PAPER.name)
    marked = [index for index, mask in enumerate(rows["mask"]) if mask is not None][:count]
    models = {}
    for row in matrix():
        if row.group == MAIN and not row.start.concatenates and row.name in found:
            run = next(iter(found[row.name].values()))
            models[titles[row.name]] = load_checkpoint(str(run["stages"][-1][1]))
    if not models:
        return []
    return write_examples(
        models,
        [rows[index] for index in marked],
        output,
        prompt=pope.PAPER.prompt,
        correct=lambda row, answer: pope.PAPER.is_correct(row, pope.PAPER.parse(row, answer)),
    )


_VERDICTS = {True: "**holds**", False: "**does not hold**", None: "undecided"}


def markdown(size: str, settings: Mapping[str, Any], found: Sequence[Claim], made: Sequence[Section]) -> str:
    """The report as one page of Markdown."""
    parts = [f"# Reproduction, size {size}\n", "Generated by `agevlm reproduce`.\n"]
    parts.append("".join(f"- {name}: {value}\n" for name, value in settings.items()))
    parts.append("## The paper's claims at this scale\n")
    lines = [["claim", "verdict", "numbers"], *([c.title, _VERDICTS[c.holds], c.sentence] for c in found)]
    parts.append(markdown_table(lines))
    for section in made:
        parts += [f"## {section['title']}\n", f"{section['note']}\n", markdown_table(section["lines"])]
        parts += [f"![{section['title']}]({Path(image).name})\n" for image in section["images"]]
    return "\n".join(parts)
