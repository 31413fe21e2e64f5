"""Which files a client can have opened: uploads, and nothing else, whatever it sends."""

import os
import shutil
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bad_rows import bomb_png
from demo_client import META, call, upload

from agevlm.serving.demo import app
from agevlm.serving.demo.answering import MAX_QUESTION


QUESTION = "Is there a red apple in the image?"
SECONDS = 30  # a queue that is blocked answers never


@pytest.fixture
def uploaded(server, example):
    return upload(server.address, "example.png", example.read_bytes())


@pytest.fixture
def private(example, tmp_path) -> Path:
    """A picture of this machine that nobody has uploaded."""
    return Path(shutil.copy(example, tmp_path / "private.png"))


def regular_file(private, folder, uploaded):
    return private


def file_that_is_no_picture(private, folder, uploaded):
    private.write_text("secret")
    return private


def pipe(private, folder, uploaded):
    os.mkfifo(private.with_name("pipe.png"))
    return private.with_name("pipe.png")


def pipe_among_the_uploads(private, folder, uploaded):
    os.mkfifo(folder / "pipe.png")
    return folder / "pipe.png"


def link_to_an_upload_that_leads_outside(private, folder, uploaded):
    (folder / "link.png").symlink_to(private)
    return folder / "link.png"


def folder_that_leads_outside(private, folder, uploaded):
    (folder / "link").symlink_to(private.parent)
    return folder / "link" / private.name


def loop_of_links(private, folder, uploaded):
    (folder / "loop.png").symlink_to("loop.png")
    return folder / "loop.png"


def way_up(private, folder, uploaded):
    return f"{Path(uploaded['path']).parent}/{os.path.relpath(private, Path(uploaded['path']).parent)}"


def relative_way_up(private, folder, uploaded):
    return os.path.relpath(private, folder)


def file_larger_than_an_upload(private, folder, uploaded):
    with (folder / "large.png").open("wb") as file:
        file.write(private.read_bytes())
        file.truncate(app.MAX_UPLOAD * 2**20 + 1)
    return folder / "large.png"


PLACES = [
    regular_file, file_that_is_no_picture, pipe, pipe_among_the_uploads, link_to_an_upload_that_leads_outside,
    folder_that_leads_outside, loop_of_links, way_up, relative_way_up, file_larger_than_an_upload,
]  # fmt: skip
NAMES = {
    "environment": "/proc/self/environ",
    "descriptor": "/proc/self/fd/0",
    "device": "/dev/zero",
    "directory": "/",
    "nothing there": "/no/such/file.png",
    "empty": "",
    "NUL": "/tmp/a\0b.png",
    "half a character": "/tmp/\ud800.png",
    "long name": "/" + "x" * 5000,
    "long path": "/x" * 50_000,
    "address": "https://example.com/picture.png",
    "file address": "file:///proc/self/environ",
    "base64": "data:image/png;base64,iVBORw0KGgo=",
    "number": 7,
    "list": ["/proc/self/environ"],
    "object": {"path": "/proc/self/environ"},
    "null": None,
}


def refused(server, sent: object) -> None:
    with pytest.raises(RuntimeError, match='"there is no picture; upload one"'):
        call(server.address, sent, QUESTION, SECONDS)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_a_file_that_is_no_upload_is_refused_and_the_next_user_answered(
    server, uploaded, private, tmp_path_factory, place
):
    folder = server.uploads / tmp_path_factory.mktemp("made").name
    folder.mkdir()
    path = str(place(private, folder, uploaded))
    for sent in ({"path": path}, {"path": path, "meta": META}, {"path": path, "url": path, "meta": "none"}):
        refused(server, sent)
    assert len(call(server.address, uploaded, QUESTION, SECONDS)) == 2


@pytest.mark.parametrize("name", NAMES)
def test_what_names_no_upload_is_refused(server, name):
    for sent in ({"path": NAMES[name]}, {"path": NAMES[name], "meta": META}, {"url": NAMES[name], "meta": META}):
        refused(server, sent)


def test_what_describes_no_file_is_refused(server, uploaded):
    for sent in (None, 7, "", uploaded["path"], [uploaded], {}, {"meta": META}, {"url": uploaded["path"]}):
        refused(server, sent)
    for folder in (server.uploads, Path(uploaded["path"]).parent):
        refused(server, {"path": str(folder), "meta": META})
    assert len(call(server.address, uploaded, QUESTION, SECONDS)) == 2


def test_an_upload_is_opened_however_it_is_described(server, uploaded, example):
    answers = call(server.address, uploaded, QUESTION, SECONDS)
    for sent in ({"path": uploaded["path"]}, {**uploaded, "orig_name": 7}, {**uploaded, "url": "https://example.com"}):
        assert call(server.address, sent, QUESTION, SECONDS) == answers
    nameless = upload(server.address, "", example.read_bytes())  # as a browser may name what is pasted
    assert call(server.address, nameless, QUESTION, SECONDS) == answers


@pytest.mark.timeout(900)
@pytest.mark.slow
@pytest.mark.parametrize("requests", [20, 100])
def test_hostile_requests_spoil_no_other_answer(server, uploaded, requests):
    """Every fifth request is hostile; all are sent at once, and again where the queue is full."""
    bomb = upload(server.address, "bomb.png", bomb_png(65_000, 65_000))
    nonsense = upload(server.address, "nonsense.png", b"no picture")
    known = {question: call(server.address, uploaded, question) for question in (QUESTION, "What is in the image?")}
    hostile = [
        (nonsense, QUESTION, "nonsense.png is no picture that can be opened"),
        (bomb, QUESTION, "bomb.png has too many pixels"),
        (uploaded, "x" * (MAX_QUESTION + 1), "ask in 2000 or fewer"),
        *(({"path": name}, QUESTION, "there is no picture; upload one") for name in NAMES.values()),
    ]

    def send(number: int) -> object:
        sent, question = (uploaded, list(known)[number % 2]) if number % 5 else hostile[number // 5 % len(hostile)][:2]
        while True:
            try:
                return call(server.address, sent, question, 250)
            except urllib.error.HTTPError as error:
                assert error.code == 503, error
                time.sleep(0.2)
            except RuntimeError as error:
                return str(error)

    with ThreadPoolExecutor(requests) as pool:
        replies = list(pool.map(send, range(requests)))
    for number, reply in enumerate(replies):
        if number % 5:
            assert reply == known[list(known)[number % 2]], number
        else:
            assert hostile[number // 5 % len(hostile)][2] in reply, number


@pytest.mark.parametrize(
    ("service", "body"),
    [
        ("file=https://example.com/", None),
        ("file=http%3A%2F%2Fexample.com/", None),
        ("process_recording", b"--part--"),
    ],
)
def test_services_of_gradio_that_the_page_does_not_need(server, service, body):
    send = urllib.request.Request(
        f"{server.address}gradio_api/{service}", body, {"Content-Type": "multipart/form-data; boundary=part"}
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(send, timeout=SECONDS)
    assert error.value.code == 403
    assert "does nothing else" in error.value.read().decode()


def test_a_link_that_takes_the_place_of_an_upload_after_the_check(private, tmp_path, monkeypatch):
    (tmp_path / "link.png").symlink_to(private)
    monkeypatch.setattr(app, "resolve_inside", lambda folder, path: Path(path))
    assert app._read_upload(str(private), str(tmp_path)) == private.read_bytes()
    assert app._read_upload(str(tmp_path / "link.png"), str(tmp_path)) is None
