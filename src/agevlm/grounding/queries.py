"""Which text of a row is grounded, and which of its tokens are guided (section 3.2.2, appendix A).

`caption` (stages 1 to 3): the first answer. `question` (stage 4, appendix A): the first question.
`question+answer` (section 3.2.3): both go to the grounding model, the question's tokens are guided, because guidance
is on tokens of one message.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from agevlm.data.rows import IMAGE_PLACEHOLDER

from .choices import QUERY_SOURCES


class Query(NamedTuple):
    """`text` is sent to the grounding model; `query`, a part of message `message_index`, is what guidance reads."""

    text: str
    query: str
    message_index: int


def make_query(messages: Sequence[Mapping[str, str]], source: str) -> Query | None:
    """The query of a row; None where it has no such text.

    Raises:
        ValueError: an unknown source.
    """
    if source not in QUERY_SOURCES:
        raise ValueError(f"the query is {source!r}; use one of {', '.join(QUERY_SOURCES)}")
    role = "assistant" if source == "caption" else "user"
    for index, message in enumerate(messages):
        if message["role"] != role:
            continue
        # The longest part between placeholders: it is in the message as it stands, which rows are checked for.
        query = max((part.strip() for part in message["content"].split(IMAGE_PLACEHOLDER)), key=len)
        if not query:
            continue
        text = query
        if source == "question+answer":
            following = messages[index + 1]["content"].strip() if index + 1 < len(messages) else ""
            text = f"{query} {following}".strip()
        return Query(text, query, index)
    return None
