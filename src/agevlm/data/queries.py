"""Which words of a row a mask belongs to: its text as a whole, or the place that names a thing."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .rows import IMAGE_PLACEHOLDER, occurrence_at
from .scenes.words import plural


def find_query(messages: Sequence[Mapping[str, str]], source: str) -> tuple[str, str, int] | None:
    """`text`, `query` and `message_index` of a row (see `grounding/rows.Item`); None where it has no such text.

    Args:
        source: `caption` (stages 1 to 3): the first answer. `question` (stage 4, appendix A): the first question.
            `question+answer` (section 3.2.3): both are sent to the grounding model, and the question is the query,
            because guidance is on tokens of one message.
    """
    role = "assistant" if source == "caption" else "user"
    for index, message in enumerate(messages):
        if message["role"] != role:
            continue
        # The longest part between placeholders: it is in the message as it stands, which rows are checked for.
        query = max((part.strip() for part in message["content"].split(IMAGE_PLACEHOLDER)), key=len)
        if query and source == "question+answer":
            following = messages[index + 1]["content"] if index + 1 < len(messages) else ""
            return f"{query} {following.strip()}".strip(), query, index
        if query:
            return query, query, index
    return None


def find_phrase(messages: Sequence[Mapping[str, str]], found: Any, words: str) -> dict[str, Any] | None:
    """`query`, `message_index` and `occurrence` of words in a text that `find_query` has `found` in these messages:
    the first place that has them, whatever their case and what stands between them. None where there is none."""
    text, query, index = found
    pattern = re.compile(r"\b" + r"\W+".join(re.findall(r"\w+", words)) + r"\b", re.IGNORECASE)
    for message, part in zip(messages[index:], (query, text[len(query) + 1 :]), strict=False):
        content = message["content"]
        start = content.index(part)
        match = pattern.search(content, start, start + len(part))
        if match and match.group():
            occurrence = occurrence_at(content, match.group(), match.start())
            return {"query": match.group(), "message_index": index, "occurrence": occurrence}
        index += 1
    return None


def find_name(messages: Sequence[Mapping[str, str]], source: str, name: str) -> dict[str, Any] | None:
    """As `find_phrase`, where any text of `source` (see `find_query`) names a thing, in singular or plural: questions
    before answers. None where none does."""
    roles = {"caption": ("assistant",), "question": ("user",), "question+answer": ("user", "assistant")}[source]
    for role in roles:
        for index, message in enumerate(messages):
            for part in message["content"].split(IMAGE_PLACEHOLDER) if message["role"] == role else ():
                for words in (name, plural(name)):
                    if phrase := find_phrase(messages, (part, part, index), words):
                        return phrase
    return None
