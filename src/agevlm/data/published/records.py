"""One published row (LLaVA, Cambrian, or `messages`) to the text of one of ours; a name for all that can be wrong.

LLaVA and Cambrian: {id, image, conversations: [{from: human | gpt | system, value}]}, `image` a path, a list of paths
or nothing. Data sets of the Hub: {images, messages: [{role, content}]}, content a string or a list of text and image
parts. A field may have the other format's form, and the names of `_PICTURES`, `_TURNS`, `_PAIRS` and `_CAPTIONS` are
known too. Pictures are not looked at here (`data/published/pictures.py`).

As in LLaVA's and Cambrian's own loaders, the placeholder of a single picture moves to the front of its turn: with
cross-attention a token sees the pictures before it, so a question in front of its picture would not see it. Unlike
theirs, nothing is passed over in silence: a row is kept as it is, repaired (and listed), or dropped (and listed).
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from agevlm.data.rows import IMAGE_PLACEHOLDER


MAX_RECORD_BYTES = 16 * 2**20  # of one row's JSON
_LONGEST_PATH = 1000  # a longer text in the place of a picture is its bytes in base64
PUBLISHED_PLACEHOLDER = "<image>"
NO_PICTURE = ("", "none", "nan")  # what Cambrian's loader takes for a row of text alone
ROLE_OF = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PICTURES = ("image", "images", "image_path", "image_paths", "image_file", "img", "img_path", "picture", "pictures",
             "image_url", "file_name")  # fmt: skip
_TURNS = ("conversations", "messages", "conversation")
# A question and its answer, texts or lists of turns
_PAIRS = (("prompt", "completion"), ("query", "response"), ("question", "answer"))
_MEDIUM = r"videos?|audios?|point_?clouds?"
_CAPTIONS = ("caption", "text")
CAPTION_PROMPT = "Describe the image."  # what a caption alone answers
CONVERSATIONS = {*_TURNS, "caption", "texts", *(name for pair in _PAIRS for name in pair)}
_OTHER_MEDIUM = re.compile(
    rf"(?:{_MEDIUM}|sound|speech)(?:_(?:paths?|files?|urls?))?|input_audio"
)  # a field, or a part
_MEDIUM_PLACEHOLDER = re.compile(rf"\A<(?:{_MEDIUM})>|\n\s*<(?:{_MEDIUM})>\Z")
# How base64 of a JPEG, PNG, GIF, WebP or TIFF begins
_BASE64 = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK)[A-Za-z0-9+/\s]{60,}={0,2}\s*")
# Tokens with which a text could end its turn or start another one, in the templates of processing/build.py
SPECIAL_TOKEN = re.compile(
    r"<\|(?:begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id|python_tag|pad|finetune_right_pad_id"
    r"|reserved_special_token_\d+|im_start|im_end|endoftext|system|user|assistant)\|>"
)

# Kinds of findings. The row is not used:
DROPPED = {
    "invalid_json": "no valid JSON",
    "invalid_encoding": "no valid UTF-8, or half a surrogate pair",
    "not_an_object": "JSON, but not an object",
    "record_too_long": f"a row of more than {MAX_RECORD_BYTES // 2**20} MiB",
    "bad_id": "id is neither a text nor a whole number",
    "duplicate_row": "the same id and the same row again",
    "no_conversations": "no conversation in a known form, or an empty one",
    "other_medium": "a video, a sound or another medium that is no picture",
    "bad_turn": "a turn that is no object, or lacks its fields",
    "bad_role": "a speaker other than human, gpt and system (user, assistant)",
    "bad_text": "a text that is no string, nor a list of text and image parts",
    "system_not_first": "a system turn behind the first place",
    "turns_not_alternating": "two turns of one speaker in a row, or an answer before any question",
    "no_answer": "the last turn is not an answer",
    "empty_question": "a question without text and picture",
    "empty_answer": "an answer without text",
    "nul_character": "a NUL character in a text",
    "special_token": "a token of the chat template in a text",
    "bad_image_field": "image is neither a path nor a list of paths",
    "null_image": "nothing, or an empty name, in a list of pictures",
    "image_url": "a URL instead of a file",
    "placeholder_mismatch": "another number of <image> than of pictures",
    "placeholder_in_answer": "<image> outside of a question",
    "image_path_outside": "a path, or a link, that leaves the folder of pictures",
    "image_path_bad": "a path that no file can have",
    "image_missing": "no such file",
    "image_ambiguous": "no such file, but several that differ from it in case alone",
    "image_unreadable": "a file that cannot be read",
    "image_empty": "a file of zero bytes",
    "image_not_a_picture": "a file that is no picture of a known format",
    "image_corrupt": "a truncated or damaged picture",
    "image_too_large": "more pixels or bytes than a picture may have",
}
# The row is used, but something of it was changed:
REPAIRED = {
    "id_missing": "no id: named after its place",
    "id_not_text": "a number as id: written as text",
    "duplicate_id": "the id of an earlier, other row: a hash was added",
    "image_miscased": "the file was found under a path in other case (or another Unicode form)",
    "image_relocated": "the file was found below the folders that the published archives unpack to",
    "field_ignored": "tools, or the weight of a turn, that training does not use",
    "placeholder_added": "pictures, but no <image>: put in front of the first question",
}
# The row is used as it is:
REMARKED = {
    "text_only": "no picture",
    "multi_image": "several pictures",
    "image_animated": "several frames, of which the first is used",
    "image_unusual_mode": "neither 8-bit RGB nor gray: converted",
    "image_tiny": "a side of less than 8 pixels",
    "image_elongated": "one side more than 20 times the other",
    "image_wrong_suffix": "the file's name promises another format",
}


class BadRow(Exception):
    """A row that cannot be used: `kind` (a key of `DROPPED`), `detail`, and the row's id where it is known."""

    def __init__(self, kind: str, detail: str):
        detail = detail.encode("utf-8", "backslashreplace").decode()  # reports are UTF-8
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail
        self.row_id: str | None = None
        self.source: str | None = None


def finding(position: int, row_id: str | None, kind: str, detail: str) -> dict[str, Any]:
    """An entry of a report."""
    return {"row": position, "id": row_id, "kind": kind, "detail": detail[:500]}


@dataclass
class Draft:
    """A row's text, with references to its pictures.

    Attributes:
        id: as our rows have it.
        images: a path each, or the {"bytes", "path"} of an undecoded `datasets.Image`.
        messages: [{role, content}], one `<|image|>` for each picture.
        source: which data set of a mixture it comes from: the row's `source`, else its picture's first folder.
        notes: (kind, detail) of what was repaired or is remarkable.
    """

    id: str
    images: list[Any]
    messages: list[dict[str, str]]
    source: str
    notes: list[tuple[str, str]] = field(default_factory=list)


def parse_record(data: bytes | None) -> dict[str, Any]:
    """The object that a line, or an element of an array, holds. `None` stands for a record that is too long.

    Raises:
        BadRow: see `DROPPED`.
    """
    if data is None:
        raise BadRow("record_too_long", f"more than {MAX_RECORD_BYTES} bytes")
    try:
        record = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRow("invalid_encoding", str(error)) from None
    except (ValueError, RecursionError) as error:
        raise BadRow("invalid_json", str(error)) from None
    if not isinstance(record, dict):
        raise BadRow("not_an_object", f"a {type(record).__name__}, expected an object")
    return record


def read_record(record: bytes | Mapping[str, Any] | None, position: int) -> Draft:
    """The draft of a row.

    Args:
        record: in one of the formats above, or what `parse_record` takes.
        position: its place in its file, from 1; names a row without id.

    Raises:
        BadRow: see `DROPPED`.
    """
    record = record if isinstance(record, Mapping) else parse_record(record)
    notes: list[tuple[str, str]] = []
    row_id, source = None, None
    try:
        row_id = _id(record.get("id"), position, notes)
        if None in record:  # as `tables.read_csv` has it
            raise BadRow("bad_text", f"a line with more fields than the header, {_shown(record[None])}; quote texts")  # type: ignore[index]
        images = _images(record)
        source = _source(record, images)
        _check_media(record)
        messages, shown = _messages(record, notes)
        if shown and not images:
            images, source = shown, _source(record, shown)
        _check_turns(messages)
        messages = _place_pictures(messages, len(images), notes)
    except BadRow as error:
        error.row_id, error.source = row_id, source
        raise
    if len(images) != 1:
        notes.append(("multi_image", f"{len(images)} pictures") if images else ("text_only", ""))
    return Draft(row_id, images, messages, source, notes)


def _id(value: Any, position: int, notes: list[tuple[str, str]]) -> str:
    if value is None or value == "":
        notes.append(("id_missing", f"row-{position}"))
        return f"row-{position}"
    if isinstance(value, int) and not isinstance(value, bool):
        notes.append(("id_not_text", str(value)))
        return str(value)
    if not isinstance(value, str):
        raise BadRow("bad_id", f"id is {_shown(value)}")
    return checked(value, "id")


def _is_nothing(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in NO_PICTURE
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def _images(record: Mapping[str, Any]) -> list[Any]:
    """References of the row's pictures; an empty list for a row of text alone."""
    name = next((name for name in _PICTURES if not _is_nothing(record.get(name))), None)
    if name is None:
        return []
    value = record[name]
    if isinstance(value, (str, bytes, Mapping)):
        value = [value]
    if not isinstance(value, list):
        raise BadRow("bad_image_field", f"{name} is {_shown(value)}")
    return [read_image(item, f"{name}[{index}]") for index, item in enumerate(value)]


def read_image(value: Any, where: str) -> Any:
    """A path, or {"bytes", "path"}. Raises BadRow for a URL, nothing, or anything else that is no picture."""
    if value is None or (isinstance(value, str) and value.strip().lower() in NO_PICTURE):
        raise BadRow("null_image", f"{where} is {value!r}")
    if isinstance(value, str):
        if value.startswith("data:") or len(value) > _LONGEST_PATH or _BASE64.fullmatch(value):
            return {"bytes": _from_base64(value, where), "path": None}
        if re.match(r"(?:https?|s3|gs):", value):
            raise BadRow("image_url", f"{where} is {value[:100]!r}; download it and give its path")
        return checked(value, where)
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    named = isinstance(value, Mapping) and value.get("path")
    if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes) and (value["bytes"] or not named):
        return {"bytes": value["bytes"], "path": value.get("path")}
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and value["path"]:
        return checked(value["path"], where)
    raise BadRow("bad_image_field", f"{where} is {_shown(value)}")


def _from_base64(value: str, where: str) -> bytes:
    """The bytes of a `data:` address, or of base64 alone."""
    head, comma, body = value.rpartition(",")
    try:
        if comma and not head.endswith(";base64"):
            raise ValueError("no base64")
        return base64.b64decode("".join(body.split()), validate=True)
    except (ValueError, binascii.Error) as error:
        reason = f"{where} is {value[:60]!r}: {error}; give the base64 of a whole file, or a path"
        raise BadRow("bad_image_field", reason) from None


def _check_media(record: Mapping[str, Any]) -> None:
    for name, value in record.items():
        if isinstance(name, str) and _OTHER_MEDIUM.fullmatch(name.lower()) and not _is_nothing(value):
            raise BadRow("other_medium", f"{name} is {_shown(value)}")


def _source(record: Mapping[str, Any], images: list[Any]) -> str:
    if isinstance(record.get("source"), str):
        return record["source"][:100]
    if images and isinstance(images[0], str):
        folder, slash, _ = images[0].removeprefix("./").partition("/")
        return folder[:100] if slash else "pictures"
    return "pictures" if images else "text"


def _turns(record: Mapping[str, Any]) -> list[Any]:
    """The turns of a row, from whichever of the known fields it has."""
    name = next((name for name in _TURNS if record.get(name) is not None), None)
    turns = record[name] if name else None
    if isinstance(turns, str) and turns.lstrip().startswith("["):  # a list that a table keeps as text
        turns = _parsed(turns)
    if name is None and isinstance(record.get("texts"), list):  # a question and its answer each
        turns = [
            {"role": role, "content": pair[role]}
            for pair in record["texts"]
            for role in ("user", "assistant")
            if isinstance(pair, Mapping) and role in pair
        ]
    pair = next((pair for pair in _PAIRS if all(record.get(part) for part in pair)), None)
    if name is None and turns is None and pair and not record.get("history"):
        asked, said = (record[part] for part in pair)
        turns = [
            *(asked if isinstance(asked, list) else [{"role": "user", "content": asked}]),
            *(said if isinstance(said, list) else [{"role": "assistant", "content": said}]),
        ]
    caption = next((name for name in _CAPTIONS if record.get(name)), None)
    if name is None and turns is None and caption and not record.get("question"):
        asked = f"{PUBLISHED_PLACEHOLDER}{CAPTION_PROMPT}"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": record[caption]}]
    if isinstance(turns, list) and turns:
        system = record.get("system")
        first = turns[0] if isinstance(turns[0], Mapping) else {}
        repeats = system in (first.get("value"), first.get("content"))
        return [{"role": "system", "content": system}, *turns] if system and not repeats else turns
    seen = f"{name} is {_shown(turns)}" if name else f"the row has the fields {', '.join(map(str, record))}"
    raise BadRow("no_conversations", f"{seen[:300]}; give messages: [{{role, content}}]")


def _parsed(text: str) -> Any:
    """The list that a text holds; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _messages(record: Mapping[str, Any], notes: list[tuple[str, str]]) -> tuple[list[dict[str, str]], list[Any]]:
    """The messages, and the pictures that stand in their parts."""
    messages: list[dict[str, str]] = []
    shown: list[Any] = []
    ignored = [name for name in ("tools", "functions") if record.get(name)]
    turns = _turns(record)
    for index, turn in enumerate(turns):
        where = f"turn {index + 1}"
        speaker, content = (_name_in(turn, names) for names in (("from", "role"), ("value", "content")))
        if speaker is None or content is None:
            raise BadRow("bad_turn", f"{where} is {_shown(turn)}, expected from and value, or role and content")
        role = ROLE_OF.get(turn[speaker]) if isinstance(turn[speaker], str) else None
        if role is None:
            raise BadRow("bad_role", f"{where} is from {_shown(turn[speaker])}")
        text = _text(turn[content], where, shown)
        if speaker == "from" and IMAGE_PLACEHOLDER in text:
            raise BadRow("special_token", f"{where} holds {IMAGE_PLACEHOLDER}")
        found = SPECIAL_TOKEN.search(text)
        if found:
            raise BadRow("special_token", f"{where} holds {found.group()}")
        if role == "user" and (medium := _MEDIUM_PLACEHOLDER.search(text)):
            raise BadRow("other_medium", f"{where} holds {medium.group().strip()}")
        ignored += [
            f"{name} of {where}" for name in ("weight", "loss", "train") if turn.get(name) not in (None, 1, True)
        ]
        messages.append({"role": role, "content": text.replace(PUBLISHED_PLACEHOLDER, IMAGE_PLACEHOLDER)})
    if ignored:
        notes.append(("field_ignored", ", ".join(ignored)))
    return messages, shown


def _name_in(turn: Any, names: tuple[str, str]) -> str | None:
    """The one of two names that a turn has; tables fill the fields of other turns with null."""
    found = [name for name in names if name in turn] if isinstance(turn, Mapping) else []
    return next((name for name in found if turn[name] is not None), found[0] if found else None)


def _text(content: Any, where: str, shown: list[Any]) -> str:
    if isinstance(content, list):
        content = "".join(_part(part, where, shown) for part in content)
    if not isinstance(content, str):
        raise BadRow("bad_text", f"{where} is {_shown(content)}")
    return checked(content, where).strip()


def _part(part: Any, where: str, shown: list[Any]) -> str:
    """A part of a message; its picture goes to `shown`. `datasets` fills the fields that a part lacks with null."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind in ("image", "image_url"):
        pictures = [part[name] for name in ("image", "image_url", "url", "path", "base64") if part.get(name)]
        for picture in pictures[:1]:
            shown.append(
                read_image(picture["url"] if isinstance(picture, Mapping) and "url" in picture else picture, where)
            )
        return PUBLISHED_PLACEHOLDER
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if isinstance(kind, str) and _OTHER_MEDIUM.fullmatch(kind):
        raise BadRow("other_medium", f"{where} holds the part {_shown(part)}")
    raise BadRow("bad_text", f"{where} holds the part {_shown(part)}")


def checked(text: str, where: str) -> str:
    """The text. Raises BadRow where it holds a NUL character or half a surrogate pair."""
    if "\0" in text:
        raise BadRow("nul_character", f"{where} holds a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("invalid_encoding", f"{where}: {error.reason}") from None
    return text


def _check_turns(messages: list[dict[str, str]]) -> None:
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    for index, message in enumerate(turns):
        role, text = message["role"], message["content"]
        if role == "system":
            raise BadRow("system_not_first", f"turn {messages.index(message) + 1} of {len(messages)} is a system turn")
        if role != ("user", "assistant")[index % 2]:
            raise BadRow("turns_not_alternating", f"the roles are {', '.join(m['role'] for m in messages)[:100]}")
        if not text:
            raise BadRow("empty_question" if role == "user" else "empty_answer", f"turn {index + 1} has no text")
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("no_answer", f"the last turn is from {messages[-1]['role']}")


def _place_pictures(messages: list[dict[str, str]], count: int, notes: list[tuple[str, str]]) -> list[dict[str, str]]:
    for index, message in enumerate(messages):
        if message["role"] != "user" and IMAGE_PLACEHOLDER in message["content"]:
            raise BadRow(
                "placeholder_in_answer", f"turn {index + 1} ({message['role']}) holds {PUBLISHED_PLACEHOLDER}"
            )
    places = [message["content"].count(IMAGE_PLACEHOLDER) for message in messages]
    if not any(places) and count:
        first = next(index for index, message in enumerate(messages) if message["role"] == "user")
        notes.append(("placeholder_added", f"{count} in front of turn {first + 1}"))
        messages[first]["content"] = IMAGE_PLACEHOLDER * count + messages[first]["content"]
    elif sum(places) != count:
        raise BadRow("placeholder_mismatch", f"{sum(places)} {PUBLISHED_PLACEHOLDER}, {count} pictures")
    elif count == 1:
        message = messages[places.index(1)]
        before, after = message["content"].split(IMAGE_PLACEHOLDER)
        parts = (before.strip(), after.strip())
        message["content"] = IMAGE_PLACEHOLDER + "\n".join(part for part in parts if part)
    return messages


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
