"""One server for all tests of the page: the tiny checkpoint, and a concatenating model beside it."""

from pathlib import Path
from typing import NamedTuple

import pytest
from servers import free_port

from agevlm.analysis.subjects import Subject
from agevlm.models import load
from agevlm.serving.demo.answering import Answerer
from agevlm.serving.demo.app import build_page, launch
from vlms import llava


ROOT = Path(__file__).resolve().parents[3]
MAX_NEW_TOKENS = 4


class Server(NamedTuple):
    address: str
    uploads: Path
    answerers: dict[str, Answerer]
    max_new_tokens: int


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    pytest.importorskip("gradio", reason="the packages of `pip install 'agevlm[demo]'` are missing")
    answerers = {
        "agevlm-tiny": Answerer(Subject(*load(ROOT / "checkpoints" / "agevlm-tiny"))),
        "llava": Answerer(llava()),
    }
    uploads = tmp_path_factory.mktemp("uploads")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        page = build_page(answerers, MAX_NEW_TOKENS)
        _, address, public = launch(
            page, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", server_port=free_port()
        )
        assert public is None
        yield Server(address, uploads, answerers, MAX_NEW_TOKENS)
        page.close()


@pytest.fixture(scope="session")
def example() -> Path:
    return ROOT / "docs" / "images" / "example.png"
