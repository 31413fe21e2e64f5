"""What a reproduction found: tables, claims, figures and three files, `report.html`, `report.json` and `report.md`.

`report.md` and the pictures that it shows, `similarity.png`, `attention.png` and `looking.png`, are made to be copied.
"""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from agevlm.analysis.figures import save_rows
from agevlm.drawing import panels
from agevlm.evaluation.tables import markdown_table
from agevlm.images import open_image, save_image
from agevlm.reproduction.claims import GUIDED, PAPER, TWIN, claims
from agevlm.reproduction.matrix import MAIN, Row, matrix
from agevlm.reproduction.quickstart import SPLIT, draw_examples, trained_stage
from agevlm.reproduction.report import write_report
from agevlm.reproduction.results import Claim, Example, Section, Variant
from agevlm.reproduction.scores import MASS, TABLE_2, Found, Scores, read_json
from agevlm.store import write_text
from agevlm.training.lineage import git_commit, library_versions, read_lineage


# -- tables -----------------------------------------------------------------------------------------------------------


def sections(
    scores: Scores, found: Found, similarity: Mapping[str, list[Any]], padding: Mapping[str, list[Any]]
) -> list[Section]:
    """The report's tables, in the order of the paper."""
    rows = {row.name: row for row in matrix()}
    main = [name for name in scores.found if rows[name].group == MAIN]
    titles = [title for _, _, title in TABLE_2]
    table_2 = [["", *(rows[name].title for name in main), "blind", "paper"]]
    for title in [*titles, MASS]:
        if title in scores.constants:
            cells = [_text(scores, name, title) for name in main]
            paper = " / ".join(f"{PAPER[title][name]:.1f}" for name in main if name in PAPER.get(title, ()))
            table_2.append([title, *cells, f"{scores.constants[title]:.1f}", paper])
    table_2.append(["seeds", *(_seeds(found[name]) for name in main), "", ""])
    shown = ("POPE accuracy", "CV-Bench 2D", MASS)
    ablation = [["what", "row", "seeds", "steps", *shown, f"{MASS}, over AGE-VLM", "so it looks"]]
    for row in matrix():
        runs = found.get(row.name, {})
        if not runs:
            ablation.append([row.group, row.title, "not run", *[""] * (len(shown) + 3)])
            continue
        against = scores.difference(GUIDED, row.name, MASS) if row.name != GUIDED else None
        steps = str(next(iter(runs.values()))["steps"])
        numbers = [_text(scores, row.name, title) for title in shown]
        ablation.append([row.group, row.title, _seeds(runs), steps, *numbers, _difference(against), _reading(against)])
    made = (
        ("Table 2's analogue", _TABLE_2, table_2),
        ("Figure 2's analogue: similarity", _SIMILARITY, _similarity(similarity, rows)),
        ("Appendix C's analogue: padding", _PADDING, _padding_lines(padding, rows)),
        ("Matrix and ablation", _ABLATION, ablation),
    )
    return [{"title": title, "note": note, "lines": lines, "images": []} for title, note, lines in made]


_TABLE_2 = (
    "Percent. Mean over seeds, [bootstrap 95 % interval over questions], (lowest to highest seed). “Blind”: the best "
    "constant answer or chance; for looking, spread evenly. †: not above blind, the interval holds it or lies below. "
    "“Paper”: its Table 2 for the same columns, where the twin stands for ConvLLaVA."
)
_SIMILARITY = (
    "Mean over seeds (lowest to highest). Cosines of the headline layer: the last one of a concatenating model, the "
    "last cross block of ours. AUROC 0.5: matched and mismatched pairs cannot be told apart. Paper: ConvLLaVA 0.96 to "
    "0.98 for both. Histograms: the first seed."
)
_PADDING = (
    "Attention on padded cells over their share of the area (enrichment), mean over seeds (lowest to highest): `own` "
    "is the processor as it is, which masks empty cells; under `pad` nobody tells the model; under `stretch` and "
    "`crop` the same cells show picture."
)
_ABLATION = (
    "Every row differs from AGE-VLM in what its name says. The difference is paired over the questions and the seeds "
    "that both rows have (each seed's in parentheses). Rows of one seed show what to look at next, not what is so."
)


def _text(scores: Scores, name: str, title: str) -> str:
    number = scores.numbers[name].get(title)
    if number is None:
        return "–"
    return number.text() if scores.is_above_blind(name, title) else f"{number.text()} †"


def _seeds(runs: Mapping[int, Any]) -> str:
    return ", ".join(map(str, runs))


def _difference(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["interval"]
    seeds = ", ".join(f"{value:+.1f}" for value in found["seeds"].values())
    return f"{found['difference']:+.1f} [{low:+.1f}, {high:+.1f}] ({seeds})"


def _reading(found: Mapping[str, Any] | None) -> str:
    """What a difference says: something only if the interval excludes 0 and two seeds or more agree in sign."""
    if found is None:
        return ""
    if len(found["seeds"]) < 2:
        return "one seed"
    signs = {value > 0 for value in found["seeds"].values()}
    low, high = found["interval"]
    if len(signs) > 1 or low <= 0 <= high:
        return "no difference told"
    return "better" if low > 0 else "worse"


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
    firsts = [next(iter(found[name].values())) for name in (TWIN, GUIDED) if name in found]
    drawn = [run["measured"] / "similarity" / "histogram.png" for run in firsts]
    histograms = [("", open_image(path, str(path))) for path in drawn if path.is_file()]  # each has its title
    if histograms:
        save_image(panels([histograms], side=560), output / "similarity.png")
        made[1]["images"].append(str(output / "similarity.png"))
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
        "report written at commit": str(git_commit())[:12],
        "stages trained at commit": ", ".join(sorted({_commit(folder) for folder in folders})),
    }
    main = [row.name for row in matrix() if row.group == MAIN and row.name in found]
    checkpoints = {titles[name]: next(iter(found[name].values()))["stages"][-1][1] for name in main}
    examples = draw_examples(checkpoints, scenes, output / "examples", count=4) if checkpoints else []
    if examples:
        made.insert(3, attention_section(examples, output / "attention.png"))
    settings |= {f"failed: {name}": reason for name, reason in failed.items()}
    # One table of answers and looks holds rows that have both; a concatenating one has answers alone.
    looked = {name: runs for name, runs in found.items() if MASS in scores.numbers[name]}
    variants = [_variant(name, titles[name], runs) for name, runs in (looked or found).items()]
    write_report(
        output / "report.html",
        output / "report.json",
        {
            "title": f"AGE-VLM reproduction, size {size}",
            "variants": [variant for variant in variants if variant["name"] in main] or variants,
            "examples": examples,
            "settings": settings,
            "versions": library_versions(),
            "commit": git_commit(),
            "seconds": {"this call": seconds},
            "findings": decided,
            "sections": made,
            "numbers": numbers,
        },
    )
    write_text(output / "report.md", markdown(size, settings, decided, made))
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
        stages = [trained_stage(recipe, folder) for recipe, folder in run["stages"]]
        evaluation = read_json(run["measured"] / "evaluation" / "metrics.json")
        made.append({"seed": seed, "evaluations": {SPLIT: evaluation}, "stages": stages})
    return {"name": name, "title": title, "runs": made}


def attention_section(examples: Sequence[Example], path: Path) -> Section:
    """Tables 3 and 5 (answers) as a table, 4 and 6 (where the models look) as one picture at `path`."""
    names = [panel["title"] for panel in examples[0]["panels"]]
    lines = [["question", "truth", *names]]
    rows = []
    for example in examples:
        lines.append([example["question"], example["answer"], *(panel["answer"] for panel in example["panels"])])
        row = [(f"{example['question']} ({example['answer']})", open_image(example["image"], str(example["image"])))]
        for panel in example["panels"]:
            mass = panel["in_mask_mass"]
            inside = "" if mass is None else f": {100 * mass:.0f} %"
            row.append((f"{panel['title']}{inside}", open_image(panel["overlay"], str(panel["overlay"]))))
        rows.append(row)
    save_image(panels(rows, side=300), path)
    note = (
        "The first presence questions with a mask, first seed, not selected. Maps are means over the question's "
        "tokens, heads and cross layers; of the concatenating twin, the first self-attention layer, as in the paper. "
        "Percent: attention inside the outline."
    )
    return {"title": "Tables 3 to 6's analogue: answers and attention", "note": note, "lines": lines,
            "images": [str(path)]}  # fmt: skip


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
