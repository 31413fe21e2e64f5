"""Joins masks of other tools to the rows that show their pictures, and says of each that joins none why."""

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from agevlm.data.masks import OCCURRENCE
from agevlm.data.queries import find_name, find_query
from agevlm.data.rows import find_query as place_of
from agevlm.images import SUFFIXES, open_header

from .annotations import Annotation
from .masks import to_png


@dataclass
class Guided:
    """What masks say of one row: the columns of `MASK_FEATURES` and of `PHRASE_FEATURES`, or the reason for none."""

    whole: dict[str, Any] | None = None
    phrases: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""


class Joiner:
    """Masks by row.

    Args:
        rows: id of each row and the path of its first picture, None where it has none.
    """

    def __init__(self, annotations: Sequence[Annotation], rows: Iterable[tuple[str, str | None]]):
        self.annotations, names = annotations, _Names(rows)
        self.reasons: dict[int, str] = {}  # by number of the annotation
        self.used: set[int] = set()
        self._of: dict[tuple[str, str], list[tuple[int, str | None]]] = defaultdict(list)
        for number, annotation in enumerate(annotations):
            try:
                found = names.find(annotation)
            except ValueError as error:
                self.reasons[number] = str(error)
                continue
            if found is not None:
                self._of[found[0]].append((number, found[1]))
            elif annotation.names:
                self.reasons[number] = f"no row shows {annotation.names[0][0]!r}"
            else:
                self.reasons[number] = _complaint(annotation, (1, 1))

    def guide(self, row: Mapping[str, Any], source: str) -> Guided:
        """The masks of a row (its first picture undecoded).

        Args:
            source: see `find_query`. A caption is guided to all masks of its picture. A question, the first that names
                something, is guided to what it or its answer names, and to all masks if none has a name. Each phrase
                is guided to what it names.
        """
        told = self._of.get(("id", row["id"]), []) + self._of.get(("picture", path_of(row)), [])
        if not told or not row["images"]:
            return Guided(reason="no mask is of its picture" if row["images"] else "it has no picture")
        messages = row["messages"] or []
        try:
            size = open_header(row["images"][0], f"row {row['id']!r}").size
        except ValueError as error:
            return Guided(reason=str(error))
        everything = np.zeros(size[::-1], dtype=bool)
        parts: dict[tuple[str, int, int], np.ndarray] = {}
        used: list[int] = []
        given: set[tuple[Any, Any]] = set()
        for number, label in told:
            annotation = self.annotations[number]
            try:
                if annotation.file and annotation.file.read_bytes() == row["images"][0]["bytes"]:
                    raise ValueError("it is the picture itself")
                words = _words(annotation, label, messages, source)
                mask = annotation.draw(size)
                if not mask.any():
                    raise ValueError("it covers nothing of the picture")
            except ValueError as error:
                self.reasons[number] = str(error)
                continue
            used.append(number)
            given.add((annotation.words.get("query"), annotation.words.get("message_index")))
            everything |= mask
            if words:
                place = (words["query"], words["message_index"], words[OCCURRENCE] or 0)
                parts[place] = parts[place] | mask if place in parts else mask
        if not used:
            return Guided(reason=f"its masks cannot be used: {self.reasons[told[0][0]]}")
        query, union = find_query(messages, source), everything
        if len(given) == 1 and None not in (only := next(iter(given))):
            query = ("", *only)
        elif source != "caption" and parts:
            turn = min(_turn(messages, index) for _, index, _ in parts)
            union = np.logical_or.reduce([m for (_, i, _), m in parts.items() if _turn(messages, i) == turn])
            asked = find_query(messages[turn : turn + 1], "question")
            query = asked and (*asked[:2], turn)
        if query is None:
            return Guided(reason="it has no text to guide")
        self.used.update(used)
        first = self.annotations[used[0]]
        common = {"id": row["id"], "source": first.source, "score": first.score}
        whole = {**common, "query": query[1], "message_index": query[2], "mask": to_png(union)}
        phrases = [
            {**common, "query": words, "message_index": index, OCCURRENCE: occurrence, "mask": to_png(mask)}
            for (words, index, occurrence), mask in parts.items()
        ]
        return Guided(whole, phrases)

    def unused(self) -> list[dict[str, str]]:
        """The masks that guide no row, each with the reason."""
        return [
            {"mask": annotation.where, "reason": self.reasons.get(number, "no row shows its picture")}
            for number, annotation in enumerate(self.annotations)
            if number not in self.used
        ]


def path_of(row: Mapping[str, Any]) -> str:
    return (row["images"][0].get("path") if row["images"] else None) or ""


def _complaint(annotation: Annotation, size: tuple[int, int]) -> str:
    try:
        annotation.draw(size)
    except ValueError as error:
        return str(error)
    return "it has no name"


def _words(
    annotation: Annotation, label: str | None, messages: Sequence[Mapping[str, str]], source: str
) -> Mapping[str, Any] | None:
    """The words of a row that a mask belongs to, None for a caption as a whole.

    Raises:
        ValueError: the row does not have the words of the annotation; no question or answer names the label.
    """
    words = annotation.words
    if words:
        index, query = words["message_index"], words["query"]
        if not query or not 0 <= index < len(messages) or place_of(messages[index]["content"], words) < 0:
            raise ValueError(f"its query {query!r} is not in message {index} of its row")
        return words
    found = find_name(messages, source, label) if label else None
    if label and found is None and source != "caption":
        raise ValueError(f"no text of its rows names {label!r}")
    return found


def _turn(messages: Sequence[Mapping[str, str]], index: int) -> int:
    """The question that a message belongs to."""
    return max((place for place in range(index + 1) if messages[place]["role"] == "user"), default=index)


class _Names:
    """Finds rows by their id, and pictures by their path, a part of it at its end, or without its suffix."""

    def __init__(self, rows: Iterable[tuple[str, str | None]]):
        self.ids: set[str] = set()
        self.whole: dict[str, set[str]] = defaultdict(set)
        self.ends: dict[str, set[str]] = defaultdict(set)
        for row_id, path in rows:
            self.ids.add(row_id)
            for form in _forms(path) if path else ():
                self.whole[form].add(path or "")
                for end in _ends(form):
                    self.ends[end].add(path or "")

    def find(self, annotation: Annotation) -> tuple[tuple[str, str], str | None] | None:
        """("id", row) or ("picture", path), and the label; None for neither. A mask with words of a row is the row's.

        Raises:
            ValueError: several pictures have the name.
        """
        for name, label in annotation.names:
            row = next((("id", form) for form in (name, *_forms(name)) if form in self.ids), None)
            picture = self._picture(name)
            found = (row or picture) if annotation.words else (picture or row)
            if found:
                return found, label
        return None

    def _picture(self, name: str) -> tuple[str, str] | None:
        for form in _forms(name):
            longer = next((self.whole[end] for end in _ends(form) if end in self.whole), set())
            found = self.whole.get(form) or self.ends.get(form) or longer
            if len(found) > 1:
                raise ValueError(f"{name!r} may be {' or '.join(map(repr, sorted(found)[:3]))}; give it their folder")
            if found:
                return "picture", next(iter(found))
        return None


def _forms(path: str) -> Iterator[str]:
    """A path in one form whatever the system that wrote it, and the same without the suffix of a picture."""
    place = PurePosixPath(unicodedata.normalize("NFC", path.replace("\\", "/")))
    yield str(place)
    if place.suffix.lower() in SUFFIXES:
        yield str(place.with_suffix(""))


def _ends(path: str) -> Iterator[str]:
    """The path from each of its folders on."""
    parts = PurePosixPath(path).parts
    return ("/".join(parts[start:]) for start in range(len(parts)))
