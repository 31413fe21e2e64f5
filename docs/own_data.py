"""Renders docs/own_data.md as examples/own_data.ipynb: prose, a cell for each block of code, and the pictures made.

python docs/own_data.py
"""

import json
import re
from pathlib import Path
from typing import Any

from agevlm.store import write_text


PAGE = Path(__file__).with_suffix(".md")
NOTEBOOK = PAGE.parent.parent / "examples" / "own_data.ipynb"
PIECES = re.compile(r"^```bash\n(?P<bash>.*?)^```$|^!\[(?P<picture>[\w./-]+): [^\n]*\)$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!http)([^)]+)\)")
# The page says "in a clone". A notebook may be opened alone.
INSTALL = """\
# In Colab: fetches the code, of which the commands below use two folders.
if ! python -c "import agevlm" 2> /dev/null; then
    git clone --quiet https://github.com/ORG/agevlm
    pip install --quiet -e "agevlm[demo,serve]"
fi
test -d examples || ln -s agevlm/checkpoints agevlm/examples .
"""
SHOW = """\
from PIL import Image


Image.open("{}")"""


def render(page: str) -> dict[str, Any]:
    """The notebook of a page. An image whose caption begins with the name of a file becomes a cell that shows it."""
    cells: list[tuple[str, str]] = []
    place = 0
    for found in PIECES.finditer(page):
        cells.append(("markdown", page[place : found.start()]))
        code = SHOW.format(found["picture"]) if found["picture"] else f"%%bash\n{found['bash']}"
        cells.append(("code", code))
        place = found.end()
    cells.append(("markdown", page[place:]))
    cells.insert(1, ("code", f"%%bash\n{INSTALL}"))
    kept = [(kind, LINK.sub(r"](../docs/\1)", text.strip())) for kind, text in cells if text.strip()]
    return {
        "cells": [_cell(f"cell-{number:02d}", kind, text) for number, (kind, text) in enumerate(kept)],
        "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def _cell(name: str, kind: str, text: str) -> dict[str, Any]:
    cell = {"cell_type": kind, "id": name, "metadata": {}, "source": text.splitlines(keepends=True)}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


if __name__ == "__main__":
    notebook = render(PAGE.read_text(encoding="utf-8"))
    write_text(NOTEBOOK, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
