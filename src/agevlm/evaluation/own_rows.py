"""Reads own questions with pictures: rows of `image`, `question`, `answer` as JSON, CSV or Parquet, and the
conversations that training takes (LLaVA's, or `messages` and `images`), of which every question is a row of its own.

Besides: `id`, `kind`, `options` (a list, or texts between "|"; or the columns A, B, ...), `category`, and what to look
at: `mask`, or `guidance` by phrase ({query, mask}). Pictures are paths below a folder, or in the file. The reader of
published sets (`data/published/records.py`) reads each row, and their `PictureStore` finds the pictures, so that
checks and names for what is wrong are the same.
A row that cannot be asked stays, with the reason.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature

from agevlm.data.published.pictures import PictureStore
from agevlm.data.published.records import CONVERSATIONS, BadRow, checked, parse_record, read_image, read_record
from agevlm.data.published.sources import Source, open_source
from agevlm.data.rows import IMAGE_PLACEHOLDER, find_query
from agevlm.store import digest

from .benchmark import table_options
from .inputs import UNUSABLE
from .own import guess_kind, lettered, right_answers, words
from .sources import listed


TEXT, PICTURE, TEXTS = Value("string"), ImageFeature(decode=False), List(Value("string"))
FEATURES = Features(
    {"id": TEXT, "image": PICTURE, "question": TEXT, "answers": TEXTS, "kind": TEXT, "guessed": Value("bool"),
     "options": TEXTS, "category": TEXT, "picture": TEXT, UNUSABLE: TEXT,
     "guidance": List({"query": TEXT, "occurrence": Value("int32"), "mask": PICTURE})}
)  # fmt: skip
EMPTY = {"question": "", "answers": [], "kind": "", "guessed": False, "options": [], "category": "", "picture": "",
         "guidance": []}  # fmt: skip


def load_own(place: str | Path, images: str | Path | None = None, strict: bool = False) -> Dataset:
    """Rows of `FEATURES`; the column `unusable` says why a row cannot be asked.

    Args:
        place: a file, or what else training takes (`data.published.sources.open_source`).
        images: folder or archive of the pictures that rows name; default: the file's folder.

    Raises:
        ValueError: a file that cannot be read, no row that can be asked, or if strict a row that cannot.
    """
    place = Path(place)
    root = Path(images) if images is not None else place.parent if place.is_file() else place
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:  # where the store keeps its index, if it needs one
        source = open_source(place, None if images is None and not place.exists() else [root], work)
        for number, record in _records(source):
            try:
                rows += _questions(record, number, source.store)
            except BadRow as error:
                row_id = error.row_id or f"row-{number}"
                rows.append({**EMPTY, "id": row_id, UNUSABLE: f"row {number} (id {row_id!r}): {error}"})
                if strict:
                    raise ValueError(f"{place}, {rows[-1][UNUSABLE]}") from None
    if all(UNUSABLE in row for row in rows):
        reason = f"none of {len(rows)} rows can be asked; {rows[0][UNUSABLE]}" if rows else "it holds no rows"
        raise ValueError(f"{place}: {reason}")
    alone = len({row["picture"] for row in rows if UNUSABLE not in row}) == 1  # intervals then are over questions
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        row["picture"] = str(number) if alone else row["picture"]
        while row["id"] in seen:
            row["id"] += f"-{number}"
        seen.add(row["id"])
    return Dataset.from_list([{name: row.get(name) for name in FEATURES} for row in rows], features=FEATURES)


def _records(source: Source) -> Iterator[tuple[int, Any]]:
    """(place from 1, record) of every row."""
    for chunk in source.chunks(1024, None):
        yield from source.records(chunk)


def _questions(record: Any, number: int, store: PictureStore) -> list[dict[str, Any]]:
    """The questions of one record. Raises `BadRow`."""
    record = record if isinstance(record, Mapping) else parse_record(record)
    if not record.keys() & (CONVERSATIONS - {"caption"}):
        raise BadRow("no_conversations", f"the row has the fields {', '.join(map(str, record))}, of which none asks")
    answers = None
    if "question" in record:
        answers = _texts(record.get("answer"), "answer")
        turns = [{"role": "user", "content": record["question"]}, {"role": "assistant", "content": "\n".join(answers)}]
        record = {**record, "conversations": turns}
    draft = read_record(record, number)
    try:
        if len(draft.images) != 1:
            raise BadRow("no_picture", f"{len(draft.images)} pictures; give one, or ask texts by --data told=FILE")
        shared = {
            "image": _stored(draft.images[0], store),
            "picture": draft.images[0] if isinstance(draft.images[0], str) else digest(draft.images[0]["bytes"]),
            "category": " ".join(_texts(record.get("category"), "category")),
        }
        places = [place for place, message in enumerate(draft.messages) if message["role"] == "user"]
        rows = []
        for turn, place in enumerate(places, start=1):
            text, answer = (message["content"] for message in draft.messages[place : place + 2])
            text = text.replace(IMAGE_PLACEHOLDER, "").strip()
            row_id = draft.id if len(places) == 1 else f"{draft.id}-{turn}"
            rows.append({**shared, "id": row_id, **_question(record, text, answers or [answer]),
                         "guidance": _guidance(record, text, place, store)})  # fmt: skip
    except BadRow as error:
        error.row_id = draft.id
        raise
    return rows


def _question(record: Mapping[str, Any], question: str, answers: list[str]) -> dict[str, Any]:
    """The fields of one question. Raises `BadRow`."""
    if not question:
        raise BadRow("empty_question", "the question has no text")
    kind = " ".join(_texts(record.get("kind"), "kind")).lower()
    options = _texts(record.get("options"), "options", "|") or _texts(table_options(record), "options")
    options = options or lettered(question)
    options = options if kind in ("", "choice") else []
    guessed = kind or guess_kind(answers, options)
    try:
        right = right_answers(guessed, answers, options)
    except ValueError as error:
        raise BadRow("bad_answer", f"{error}; correct the row") from None
    return {"question": question, "answers": right, "kind": guessed, "guessed": not kind, "options": options}


def _guidance(record: Mapping[str, Any], question: str, place: int, store: PictureStore) -> list[dict[str, Any]]:
    """What to look at: the phrases of `guidance` in message `place`, and `mask` for the question. Raises `BadRow`."""
    given = record.get("guidance") or []
    phrases = [*given] if isinstance(given, list) else [given]
    phrases += [{"mask": record["mask"]}] if record.get("mask") else []
    found = []
    for phrase in phrases:
        said = {"query": words(question), "occurrence": 0}
        if isinstance(phrase, Mapping):
            said |= {name: phrase[name] for name in said if phrase.get(name)}
        if (
            not isinstance(phrase, Mapping)
            or not isinstance(said["query"], str)
            or type(said["occurrence"]) is not int
        ):
            raise BadRow("bad_guidance", f"guidance is {phrase!r:.80}; use {{query, mask}}, or a list of them")
        if phrase.get("message_index") in (None, place):
            if find_query(question, said) < 0:
                raise BadRow("bad_guidance", f"the question {question!r} does not hold {said['query']!r}; copy it")
            found.append({**said, "mask": _stored(read_image(phrase.get("mask"), "mask"), store)})
    return found


def _texts(value: Any, name: str, separator: str | None = None) -> list[str]:
    """A value, or a list of them, as texts. Raises `BadRow`."""
    try:
        value = listed(value) if isinstance(value, str) and separator and value[:1] == "[" else value
    except ValueError as error:
        raise BadRow("bad_text", f"field {name}: {error}") from None
    if isinstance(value, str) and separator:
        value = value.split(separator)
    found = [value] if not isinstance(value, (list, tuple)) else value
    if not all(part is None or isinstance(part, (str, int, float)) for part in found):
        raise BadRow("bad_text", f"field {name} is {value!r:.80}; use a text, or a list of texts")
    return [
        checked(_text(part), f"field {name}") for part in found if part is not None and part == part and _text(part)
    ]  # NaN is not itself


def _text(value: str | float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _stored(image: Any, store: PictureStore) -> dict[str, Any]:
    """A picture as an undecoded column has it. Raises `BadRow` where there is none."""
    return store.stored(image) if isinstance(image, str) else {"bytes": image["bytes"], "path": None}
