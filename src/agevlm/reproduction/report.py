"""The report of a reproduction: `report.html` (one file that needs nothing else), `report.json` and `report.md`.

`LEAD` and `SECTIONS` say what the page shows above and below the claims, and `CURVES` in `charts.py` which curves of
training. `report.md` and the pictures that it shows are made to be copied.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from agevlm.analysis.attention import Example, Panel, write_examples
from agevlm.analysis.figures import save_rows
from agevlm.data.scenes.build import load_benchmark
from agevlm.drawing import panels
from agevlm.evaluation import pope
from agevlm.evaluation.tables import markdown_table, page_environment
from agevlm.images import data_address, open_image, save_image
from agevlm.models import load
from agevlm.store import read_json, write_json, write_text
from agevlm.training.lineage import git_commit, library_versions, read_lineage

from .charts import Curves, curve_lines, curves_json, draw_charts, draw_curves, read_curves
from .claims import FAILS, HOLDS, NOT_RUN, Claim, claims, difference_text, reading, summary
from .matrix import BASELINE, GUIDED, GUIDED_TWICE, MAIN, PHRASES, PHRASES_TWICE, ROWS, TWIN
from .prepare import SPLIT
from .scores import (
    ACCURACY,
    ANSWERS,
    EVENLY,
    FALSE_YES,
    LOOKS,
    MASS,
    OTHERS,
    PADDING,
    SIMILARITY,
    TABLE_2,
    TASKS,
    UNREAD,
    Found,
    Scores,
    layer_title,
    read_scores,
    right_answers,
    spread,
)
from .setting import deviation_lines, settings


EXAMPLES = 3  # of each sort
PICTURE_SIDE = 1600
TEMPLATE = "report.html.jinja"
Lines = list[list[str]]  # the first is the head


@dataclass(frozen=True)
class Material:
    """Everything that the page is made of.

    Args:
        files: name of a file of measurements -> row -> what it says for each seed.
        main: the rows that tables and curves compare.
    """

    size: str
    found: Found
    scores: Scores
    curves: Curves
    files: Mapping[str, Mapping[str, list[Any]]]
    examples: Sequence[Example]
    main: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A table of the page with a picture above it.

    Args:
        lines: makes the table; where it has a head alone, the section is left out.
        picture: name of a file beside the report, and what draws it (returns whether there was anything to draw).
    """

    title: str
    note: str
    lines: Callable[[Material], Lines]
    picture: tuple[str, Callable[[Material, Path], bool]] | None = None


# -- tables -----------------------------------------------------------------------------------------------------------


def number_lines(titles: Sequence[str], material: Material) -> Lines:
    """One line per number, one column per main row, what blind answers or looks reach, and the paper's numbers."""
    scores, main = material.scores, material.main
    papers = {answer.title: answer.paper for answer in ANSWERS}
    lines = [["", *(ROWS[name].title for name in main), "blind", "paper"]]
    for title in titles:
        if any(title in scores.numbers[name] for name in main):
            ways, best = scores.blind.get(title, {}), scores.best_blind(title)
            shown = ways.items() if EVENLY in ways else [best] if best is not None else []
            blind = ", ".join(f"{value:.1f} ({name})" for name, value in shown)
            paper = papers.get(title, {})
            theirs = " / ".join(f"{paper[name]:.1f}" for name in main if name in paper)
            lines.append([title, *(_text(scores, name, title) for name in main), blind, theirs])
    if len(lines) > 1:
        lines.append(["seeds", *(_seeds(material.found[name]) for name in main), "", ""])
    return _filled(lines)


def _filled(lines: Lines) -> Lines:
    """Without empty columns."""
    columns = [column for column in zip(*lines, strict=True) if any(column[1:])]
    return [list(line) for line in zip(*columns, strict=True)]


def _text(scores: Scores, name: str, title: str) -> str:
    number = scores.numbers[name].get(title)
    if number is None:
        return "–"
    return number.text() if scores.is_above_blind(name, title) else f"{number.text()} †"


def _seeds(runs: Mapping[int, Any]) -> str:
    return ", ".join(map(str, runs))


def presence_lines(material: Material) -> Lines:
    """One line per row: right answers beside the best constant one, and false yes."""
    scores = material.scores
    lines = [["", "presence", "best constant answer", "above it", "over CA-baseline", "false yes", "seeds"]]
    for name, runs in material.found.items():
        number, best = scores.numbers[name].get(ACCURACY), scores.best_blind(ACCURACY)
        if number is not None and best is not None:
            against = scores.difference(BASELINE, name, ACCURACY) if name != BASELINE else None
            compared = "" if against is None else f"{difference_text(against)}: {reading(against)}"
            above = "yes" if scores.is_above_blind(name, ACCURACY) else "no"
            false_yes, blind = scores.numbers[name][FALSE_YES].text(), f"{best[1]:.1f} ({best[0]})"
            lines.append([ROWS[name].title, number.text(), blind, above, compared, false_yes, _seeds(runs)])
    return _filled(lines)


def looks_lines(material: Material) -> Lines:
    layers = [title for title in material.scores.blind if title.startswith(layer_title(""))]
    return number_lines([*(look.title for look in LOOKS), *layers], material)


def ablation_lines(material: Material) -> Lines:
    """Every row of the matrix, run or not."""
    scores, shown = material.scores, (ACCURACY, "CV-Bench 2D", MASS)
    lines = [["what", "row", "seeds", "steps", *shown, f"{MASS}, over AGE-VLM", "so it looks"]]
    for name, row in ROWS.items():
        runs = material.found.get(name)
        if not runs:
            lines.append([row.group, row.title, NOT_RUN, *[""] * (len(shown) + 3)])
            continue
        against = scores.difference(GUIDED, name, MASS) if name != GUIDED else None
        steps = str(next(iter(runs.values())).steps)
        numbers = [_text(scores, name, title) for title in shown]
        compared = ["", ""] if against is None else [difference_text(against), reading(against)]
        lines.append([row.group, row.title, _seeds(runs), steps, *numbers, *compared])
    return lines


def file_lines(file: str, columns: Mapping[str, Callable[[Any], float | None]], digits: int, m: Material) -> Lines:
    """One line per row: a file of each seed, read by every column, as mean over seeds (lowest to highest)."""
    lines = [["", *columns, "seeds"]]
    for name, entries in m.files[file].items():
        cells = [_spread([read(entry) for entry in entries], digits) for read in columns.values()]
        lines.append([ROWS[name].title, *cells, str(len(entries))])
    return lines


def _spread(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    return spread(sum(known) / len(known), known, f"{{:.{digits}f}}".format)


def _centred_auroc(entry: Any) -> float:
    return next(e["auroc"] for e in entry["measures"]["centred"] if e["layer"] == entry["headline"]["layer"])


SIMILARITIES: dict[str, Callable[[Any], float | None]] = {
    "matched": lambda entry: entry["headline"]["matched"]["mean"],
    "mismatched": lambda entry: entry["headline"]["mismatched"]["mean"],
    "overlap": lambda entry: entry["headline"]["overlap"],
    "AUROC": lambda entry: entry["headline"]["auroc"],
    "AUROC, centred": _centred_auroc,
    "AUROC, query and key": lambda entry: entry["measures"]["qk_cosine"][-1]["auroc"],
}
ENRICHMENTS: dict[str, Callable[[Any], float | None]] = {
    "own": lambda entry: entry["variants"]["own"]["enrichment"],
    "pad": lambda entry: entry["variants"]["pad"]["enrichment"],
    "stretch": lambda entry: entry["variants"]["stretch"]["enrichment"],
    "crop": lambda entry: entry["variants"]["crop"]["enrichment"],
}


def language_lines(material: Material) -> Lines:
    """The perplexity of answers in words at the start and after each stage, of rows that measured it."""
    stages = sorted(
        {recipe.stage for runs in material.found.values() for run in runs.values() for recipe, _ in run.stages}
    )
    lines = [["", "start", *(f"stage {stage}" for stage in stages), "seeds"]]
    for name, runs in material.found.items():
        values: dict[int, list[float | None]] = {}  # by stage; the start is 0
        for run in runs.values():
            for place, (recipe, folder) in enumerate(run.stages):
                measured = (read_lineage(folder) or {}).get("language") or {}
                if place == 0:
                    values.setdefault(0, []).append((measured.get("before") or {}).get("perplexity"))
                values.setdefault(recipe.stage, []).append((measured.get("after") or {}).get("perplexity"))
        if any(value is not None for found in values.values() for value in found):
            cells = [_spread(values.get(stage, []), 3) for stage in (0, *stages)]
            lines.append([ROWS[name].title, *cells, str(len(runs))])
    return lines


def example_lines(material: Material) -> Lines:
    lines = [["question", "truth", *(ROWS[name].title for name in material.main)]]
    for example in material.examples:
        lines.append([example["question"], example["answer"], *map(_answer, example["panels"])])
    return lines


def _answer(panel: Panel) -> str:
    return f"{'✓' if panel['correct'] else '✗'} {panel['answer'] or '(empty)'}"


# -- pictures ---------------------------------------------------------------------------------------------------------


def draw_histograms(material: Material, path: Path) -> bool:
    """Figure 2 of the twin and of ours, first seed each."""
    firsts = [next(iter(material.found[name].values())) for name in (TWIN, GUIDED) if name in material.found]
    files = [(run.measured / SIMILARITY).with_name("histogram.png") for run in firsts]
    drawn = [("", open_image(file, str(file))) for file in files if file.is_file()]  # each has its title
    if drawn:
        save_image(panels([drawn], side=560), path)
    return bool(drawn)


def draw_attention(material: Material, path: Path) -> bool:
    """One line per example: the picture, and where each model looks in its first cross layer and on average."""
    rows = []
    for example in material.examples:
        row = [(f"{example['question']} ({example['answer']})", open_image(example["image"], str(example["image"])))]
        for panel in example["panels"]:
            for look in panel["looks"]:
                which = f", {look['title']}" if len(panel["looks"]) > 1 else ""
                mass = look["in_mask_mass"]
                inside = "" if mass is None else f": {100 * mass:.0f} %"
                row.append((f"{panel['title']}{which}{inside}", open_image(look["overlay"], look["overlay"])))
        rows.append(row)
    if rows:
        save_image(panels(rows, side=300, peaks=[example["peak"] for example in material.examples]), path)
    return bool(rows)


def draw_looks(material: Material, path: Path) -> bool:
    scores = material.scores
    looks = {ROWS[name].title: made[MASS].as_json() for name, made in scores.numbers.items() if MASS in made}
    if looks:
        save_rows(looks, f"{MASS}, %", scores.blind[MASS][EVENLY], path)
    return bool(looks)


LEAD = (
    Section(
        "Presence on unseen compositions",
        "Percent of POPE's questions about unseen pictures, whose pairs of color and thing may be ones that no "
        "training row shows (column `held_out_pair` of the questions). Mean over seeds, "
        "[bootstrap 95 % interval over questions], (lowest to highest seed). “Above it”: the whole interval is above "
        "the best constant answer. Differences in points: [interval over questions and seeds], (each seed's). “False "
        "yes”: percent of the questions about absent things that are answered yes, which is hallucination proper.",
        presence_lines,
    ),
    Section(
        "Learning curves",
        "Presence against the questions trained on in stage 4, measured on other pictures than those above. Bold: the "
        "mean over seeds; thin: each seed. Table: the median over seeds (lowest to highest) of the first point that "
        "reaches a level.",
        lambda material: curve_lines(material.curves),
        ("curves.png", lambda m, path: draw_curves({n: m.curves[n] for n in m.main if n in m.curves}, m.found, path)),
    ),
    Section(
        "Where they look",
        "On all questions that have a mask; mean over cross layers unless a layer is named. “Points at it”: the most "
        "attended cell is inside the mask. “Blind”: attention spread evenly, and a Gaussian on the centre.",
        looks_lines,
    ),
    Section(
        "Tables 3 to 6's analogue: answers and attention",
        "Above the first three presence questions with a mask that the guided model (phrase by phrase, else "
        "AGE-VLM-LM, else AGE-VLM) answers right and CA-baseline wrong; below the first three of all, not selected. "
        "First seed. Maps are means "
        "over the question's tokens and heads: of the first cross layer, as in the paper, and over all cross layers; "
        "of the concatenating twin, of the first self-attention layer, as in the paper. Percent: attention inside the "
        "outline.",
        example_lines,
        ("attention.png", draw_attention),
    ),
)
SECTIONS = (
    Section(
        "Table 2's analogue",
        "Percent. Mean over seeds, [bootstrap 95 % interval over questions], (lowest to highest seed). “Blind”: the "
        "best constant answer or chance; for looking, spread evenly. †: not above blind, the interval holds it or "
        "lies below. “Paper”: its Table 2 for the same columns, where the twin stands for ConvLLaVA. OCRBench here is "
        "accuracy over all drawn questions (read a word, or answer about it); the paper's number is its scene-text "
        "count of 200 as a share, and its key information has no analogue in scenes.",
        partial(number_lines, [*(answer.title for answer in TABLE_2), MASS]),
    ),
    Section(
        "Single tasks",
        "As above. An answer that the strict parsers cannot read counts as wrong.",
        partial(number_lines, [*(answer.title for answer in TASKS), UNREAD]),
    ),
    Section(
        "Other pictures",
        "Presence again: about things whose names no training row has; about things in a style that no training row "
        "shows (of cut-outs: photographs of what was seen as a drawing); own questions (`--questions`).",
        partial(number_lines, [answer.title for answer in OTHERS]),
    ),
    Section(
        "Language ability",
        "Perplexity around each stage, mean over seeds (lowest to highest): of the text given as `--text`, else of "
        "the answers to 200 yes/no questions about scenes in words, of which a guess has 2. Stages 1 to 3 leave a "
        "cross-attention model's answers to text alone as they were.",
        language_lines,
    ),
    Section(
        "Figure 2's analogue: similarity",
        "Mean over seeds (lowest to highest). Cosines of the headline layer: the last one of a concatenating model, "
        "the last cross block of ours. AUROC 0.5: matched and mismatched pairs cannot be told apart. Paper: ConvLLaVA "
        "about 0.5 for matched and 0.2 to 0.3 for mismatched pairs, which separates them in part; MobileVLM V2 0.96 "
        "to 0.98 for both. The twin stands for ConvLLaVA. Histograms: the first seed.",
        partial(file_lines, SIMILARITY, SIMILARITIES, 3),
        ("similarity.png", draw_histograms),
    ),
    Section(
        "Appendix C's analogue: padding",
        "Attention on padded cells over their share of the area (enrichment), mean over seeds (lowest to highest): "
        "`own` is the processor as it is, which masks empty cells; `pad` does not; under "
        "`stretch` and `crop` the same cells show picture.",
        partial(file_lines, PADDING, ENRICHMENTS, 2),
    ),
    Section(
        "Matrix and ablation",
        "Every row differs from AGE-VLM, or the model that its name begins with, in what its name says. The "
        "difference is paired over the questions and the seeds that both rows have (each seed's in parentheses). Rows "
        "of one seed show what to look at next, not what is so. Attention is measured over all words of a question, "
        "which favors rows that guide all of them.",
        ablation_lines,
        ("looking.png", draw_looks),
    ),
    Section(
        "What deviates from the paper",
        "Settings of AGE-VLM-LM's stages that decide the result and are not those of the size `paper`. All rows share "
        "them but for what their names say.",
        lambda material: deviation_lines(material.size),
    ),
)


# -- files ------------------------------------------------------------------------------------------------------------


def draw_examples(found: Found, names: Sequence[str], scenes: Path, output: Path) -> list[Example]:
    """Presence questions with something to look at, drawn for the first seed of each row: the first ones that the last
    guided row answers right and the unguided one wrong, then the first ones of all.

    Of a concatenating model the map is that of its first self-attention layer, as in the paper.
    """
    rows = load_benchmark(scenes, SPLIT, pope.PAPER.name)
    first = {name: next(iter(found[name].values())) for name in names}
    every = [index for index, mask in enumerate(rows["mask"]) if mask is not None]
    guided = next((name for name in (PHRASES_TWICE, PHRASES, GUIDED_TWICE, GUIDED) if name in names), None)
    apart: list[int] = []
    if guided is not None and BASELINE in names:
        right, wrong = (right_answers(first[name], pope.PAPER) for name in (guided, BASELINE))
        apart = [index for index in every if rows[index]["id"] in right - wrong][:EXAMPLES]
    marked = [*apart, *[index for index in every if index not in apart][:EXAMPLES]]
    checkpoints = {ROWS[name].title: first[name].stages[-1][1] for name in names}
    return write_examples(
        {title: load(str(folder)) for title, folder in checkpoints.items()},
        [rows[index] for index in marked],
        output,
        prompt=pope.PAPER.prompt,
        correct=lambda row, answer: pope.PAPER.is_correct(row, pope.PAPER.parse(row, answer)),
    )


def write_report(
    output: Path,
    size: str,
    scenes: Path,
    found: Found,
    failed: Mapping[str, str],
    seconds: Mapping[str, float],
    questions: Path | None = None,
) -> None:
    """Writes the three files and the pictures.

    Args:
        found: all measured rows.
        failed: step -> why it is missing.
        seconds: of each part of the work.
        questions: own ones that rows were measured on.

    Raises:
        ValueError: nothing has been measured.
    """
    if not found:
        raise ValueError(f"{output}: no row has been trained and measured, so there is nothing to report")
    main = [name for name in found if ROWS[name].group == MAIN] or list(found)[:4]
    examples = draw_examples(found, main, scenes, output / "examples")
    files = {name: _read_all(found, name) for name in (SIMILARITY, PADDING)}
    material = Material(size, found, read_scores(found, scenes, questions), read_curves(found), files, examples, main)
    lead, made = (
        [made for made in (_made(section, material, output) for section in sections) if made is not None]
        for sections in (LEAD, SECTIONS)
    )
    decided = claims(material.scores, files[SIMILARITY], files[PADDING])
    page: dict[str, Any] = {
        "title": f"AGE-VLM reproduction, size {size}",
        "lead": lead,
        "summary": summary(decided),
        "claims": [dataclasses.asdict(claim) for claim in decided],
        "sections": made,
        "settings": settings(size, found, failed),
        "versions": library_versions(),
        "commit": git_commit(),
        "seconds": dict(seconds),
    }
    numbers = {name: {title: n.as_json() for title, n in by.items()} for name, by in material.scores.numbers.items()}
    write_text(output / "report.html", html({**page, "charts": draw_charts(found, main)}, output))
    write_json(output / "report.json", {**page, "numbers": numbers, "curves": curves_json(material.curves)}, indent=1)
    write_text(output / "report.md", markdown(page["title"], page["settings"], lead, decided, made))


def _read_all(found: Found, name: str) -> dict[str, list[dict[str, Any]]]:
    """Row -> a file of each seed that has it; rows without it are left out."""
    files = {row: [run.measured / name for run in runs.values()] for row, runs in found.items()}
    read = {row: [read_json(path) for path in paths if path.is_file()] for row, paths in files.items()}
    return {row: entries for row, entries in read.items() if entries}


def _made(section: Section, material: Material, output: Path) -> dict[str, Any] | None:
    """Title, note, lines and the picture's file name (None without one); None where there is nothing to say."""
    lines = section.lines(material)
    if not lines[1:]:
        return None
    name, draw = section.picture or ("", lambda *_: False)
    picture = name if draw(material, output / name) else None
    return {"title": section.title, "note": section.note, "lines": lines, "picture": picture}


def html(page: Mapping[str, Any], output: Path) -> str:
    """The page with its pictures, which lie in `output`, inside."""
    environment = page_environment(
        "reproduction",
        duration=duration,
        picture=lambda name: data_address(open_image(output / name, name), "webp", 82, PICTURE_SIDE),
        tone={HOLDS: "holds", FAILS: "fails"}.get,
    )
    return environment.get_template(TEMPLATE).render({**page, "not_run": NOT_RUN})


def duration(seconds: float) -> str:
    """ "42 s", "3 min 5 s", "2 h 10 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def markdown(
    title: str,
    told: Mapping[str, str],
    lead: Sequence[Mapping[str, Any]],
    made: Sequence[Claim],
    sections: Sequence[Mapping[str, Any]],
) -> str:
    """The report as one page of Markdown."""
    parts = [f"# {title}\n", "Generated by `agevlm reproduce`.\n", *map(_markdown_section, lead)]
    parts.append("## The paper's claims at this scale\n")
    bold = {HOLDS: f"**{HOLDS}**", FAILS: f"**{FAILS}**"}
    lines = [[claim.title, bold.get(claim.verdict, claim.verdict), claim.sentence] for claim in made]
    parts.append(markdown_table([["claim", "verdict", "numbers"], *lines]))
    parts += map(_markdown_section, sections)
    parts += ["## The run\n", "".join(f"- {name}: {value}\n" for name, value in told.items())]
    return "\n".join(parts)


def _markdown_section(section: Mapping[str, Any]) -> str:
    parts = [f"## {section['title']}\n", f"{section['note']}\n"]
    if section["picture"]:
        parts.append(f"![{section['title']}]({section['picture']})\n")
    if section["lines"]:
        parts.append(markdown_table(section["lines"]))
    return "\n".join(parts)
