"""Which words of a text are guided (t_q of Eq. 3), for the ablation of the query tokens."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from agevlm.data.scenes.words import plural


def vocabulary(scenes: Path) -> list[str]:
    """The things, in both numbers, and colours that a folder of scenes shows."""
    shown = json.loads((scenes / "scenes.json").read_text(encoding="utf-8"))
    return [*shown["names"], *map(plural, shown["names"]), *shown["colours"]]


def things_named(text: str, words: Sequence[str]) -> str:
    """The part of `text` from the first to the last of `words` in it; all of it where there is none."""
    listed = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
    found = list(re.finditer(rf"\b(?:{listed})\b", text, flags=re.IGNORECASE))
    return text[found[0].start() : found[-1].end()] if found else text
