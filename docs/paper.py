"""Renders `paper.md` from `paper.yaml`: every item of the paper, where it is here, what was run, and the verdict.

python docs/paper.py        # or `make paper`
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from agevlm.store import write_text


DOCS = Path(__file__).resolve().parent
HEAD = """# The paper, item by item

Made by `make paper` from `paper.yaml`; do not edit. Claims that the paper only cites are left out.

- **as in the paper**: the code does what the paper says; where it is silent, the reading follows.
- **deviates**: the code does something else, for the reason given.
- **open**: not shown. Most need the paper's models or data, none of which have been trained, run or read here.
  "Tiny" is the tiny size on drawn scenes with exact masks and the parts of before 2026-11-30
  ([reproduction](reproduction.md)), mean over seeds; it decides nothing about the paper's size.

Files `test_...` belong to the default suite; those on public files are skipped without them
([evaluation](evaluation.md#the-public-question-files)). Mass is attention inside the mask.
"""
VERDICTS = ("as in the paper", "deviates", "open")
FIELDS = {"claim", "here", "run", "verdict", "why"}
# A file of the repository, with a symbol (`:name`) or a heading (`#anchor`)
REFERENCE = re.compile(
    r"\b((?:docs|src|modeling_agevlm|processing|training|hub_cards|tests|examples|bench)/[\w./-]+\.\w+)"
    r"(?::([A-Za-z_][\w.]*\w)|#([\w-]+))?"
)


def read_sections(path: Path = DOCS / "paper.yaml") -> dict[str, list[dict[str, str]]]:
    """Heading -> items, with the fields `claim`, `run`, `verdict`, and `here` or `why` or both.

    Raises:
        ValueError: an item with another verdict, with missing or unknown fields, or with neither place nor reason.
    """
    sections = yaml.safe_load(path.read_text(encoding="utf-8"))
    for title, items in sections.items():
        for item in items:
            where = f"{path.name}, {title}: {item.get('claim')!r}"
            if missing := {"claim", "run", "verdict"} - item.keys():
                raise ValueError(f"{where} lacks {', '.join(sorted(missing))}")
            if unknown := item.keys() - FIELDS:
                raise ValueError(
                    f"{where} has unknown fields {', '.join(sorted(unknown))}; there are {sorted(FIELDS)}"
                )
            if item["verdict"] not in VERDICTS:
                raise ValueError(f"{where} has the verdict {item['verdict']!r}; use one of {', '.join(VERDICTS)}")
            if not item.get("here") and not item.get("why"):
                raise ValueError(f"{where} has neither a place (`here`) nor a reason (`why`)")
            if item["verdict"] != VERDICTS[0] and not item.get("why"):
                raise ValueError(f"{where} is {item['verdict']} without a reason (`why`)")
            if item["verdict"] == "deviates" and "docs/design.md#" not in item["why"]:
                raise ValueError(f"{where} deviates; `why` must name the section of docs/design.md that decides it")
    return sections


def _link(found: re.Match) -> str:
    file, symbol, anchor = found.groups()
    stem = Path(file).stem
    label = f"`{stem}.{symbol}`" if symbol else stem
    return f"[{label}]({'../' + file if not file.startswith('docs/') else file[5:]}{'#' + anchor if anchor else ''})"


def render(sections: dict[str, list[dict[str, Any]]]) -> str:
    """The page: how many items have which verdict, and a table for each section."""
    counts = Counter(item["verdict"] for items in sections.values() for item in items)
    total = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)
    lines = [HEAD, f"{sum(counts.values())} items: {total}."]
    for title, items in sections.items():
        lines += ["", f"## {title}", "", "|item|here|run|verdict|", "|-|-|-|-|"]
        for item in items:
            verdict = ": ".join(filter(None, (f"**{item['verdict']}**", item.get("why"))))
            cells = (item["claim"], item.get("here", "–"), item["run"], verdict)
            lines.append("|" + "|".join(REFERENCE.sub(_link, cell.replace("|", r"\|")) for cell in cells) + "|")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    write_text(DOCS / "paper.md", render(read_sections()))
