"""Clean singular names, categories and near-synonym groups for downloaded cut-outs.

A name must be the plain word for what the picture shows, must work in "Is there a ...?" and "How many ... are there?",
and must not be true of another picture: so no plurals, mass nouns, scenes, parts, symbols or words for whole families.
"""

import json
import re
from pathlib import Path


_TABLE = json.loads(Path(__file__).with_name("cutout_names.json").read_text(encoding="utf-8"))
_ADJECTIVES, _BAD_WORDS, _DROPPED = (frozenset(_TABLE[key]) for key in ("adjectives", "bad_words", "dropped"))
_ENDS_IN_S = ("ss", "us", "is", *_TABLE["singular_in_s"])  # singular nouns may end so: glass, bus, iris


def clean_name(words: str) -> str | None:
    """A singular noun of one or two words, or None where `words` do not make one."""
    name = _TABLE["renamed"].get(words, words)
    if name == words and (set(words.split()) & _BAD_WORDS or not re.fullmatch(r"[a-z]+( [a-z]+)?", words)):
        return None
    head = name.split()[-1]
    if head.endswith("s") and not head.endswith(_ENDS_IN_S):
        return None
    dropped = name in _DROPPED or head in ("building", "office", "store")
    return None if dropped or len(name) < 3 else name


def tux_name(sentence: str) -> str | None:
    """The noun of "A crowned crane." or "A green bus." (here bus); None for anything but one short noun phrase."""
    found = re.fullmatch(r"(?:A|An) ([a-z][a-z ]*[a-z])\.", sentence.strip())
    if found is None:
        return None
    words = found[1].split()
    while len(words) > 1 and words[0] in _ADJECTIVES:
        del words[0]
    return clean_name(" ".join(words))


def tux_category(path: str) -> str | None:
    """Category of a stamp by its path below the stamps folder; None for those without a plain photographed object."""
    if any(part in _TABLE["stamps_without_photographs"] for part in path.split("/")) or "_mirror" in path:
        return None
    categories = _TABLE["stamp_categories"]
    return next((category for start, category in categories.items() if path.startswith(start + "/")), None)


def emoji_category(subgroup: str) -> str | None:
    """Category of an emoji by its subgroup; None for subgroups without plain objects."""
    return _TABLE["emoji_categories"].get(subgroup)


def synonym_group(name: str) -> str:
    """Names in one group are never together in a scene: listed near synonyms, and names with the same last word."""
    for group in _TABLE["near_synonyms"]:
        if name in group or name.split()[-1] in group:
            return group[0]
    return name.split()[-1]


def photograph_name(place: str) -> str | None:
    """What a photograph shows, by its archive and file ("erase/red_panda"); None where it is not one plain object."""
    name, _reason = _TABLE["photographs"].get(place, (place.rpartition("/")[2].replace("_", " "), ""))
    return name and clean_name(name)
