"""The page over HTTP: answers, users at once, and uploads that must not bring it down."""

import base64
import io
import itertools
import json
import re
import sys
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
from demo_client import call, converse, upload
from PIL import Image

from agevlm.analysis.attention import attend
from agevlm.analysis.subjects import Subject
from agevlm.models import load
from agevlm.serving.demo.answering import MAX_QUESTION, Answerer, ask
from agevlm.serving.demo.app import (
    EXAMPLES,
    MAX_PICTURES,
    MAX_SAID,
    MAX_TURNS,
    MAX_UPLOAD,
    _card,
    _example,
    build_page,
)
from agevlm.serving.demo.cli import main
from agevlm.serving.demo.figure import finished
from builders import picture, tiny_model, tiny_processor


QUESTION = "Is there a red apple in the image?"
OTHER = "How many cars are there in the image? Describe the picture."


def heats(html: str) -> list[str]:
    return re.findall(r'class="heat"[^>]* src="([^"]+)"', html)


@pytest.fixture
def uploaded(server, example):
    return upload(server.address, "example.png", example.read_bytes())


def alone(server, image: Image.Image, question: str) -> list[str]:
    """The overlays of every model's answer, without a server."""
    drawn = []
    for name, answerer in server.answerers.items():
        attended = attend(
            answerer.subject.model,
            answerer.subject.processor,
            image,
            question,
            layers=answerer.layers,
            max_new_tokens=server.max_new_tokens,
        )
        drawn.append(finished(name, [image], attended, "mean"))
    return drawn


def test_two_users_at_once_get_their_own_answers(server, example, tmp_path):
    """Each what a model by itself says, with its maps: nothing of a request is in the other's."""
    turned = tmp_path / "turned.png"
    with Image.open(example) as image:
        image.convert("RGB").transpose(Image.Transpose.ROTATE_180).save(turned)
    users = [(example, QUESTION), (turned, OTHER)]

    def use(path: Path, question: str) -> list[str]:
        return call(server.address, upload(server.address, path.name, path.read_bytes()), question)

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(use, *zip(*users, strict=True)))
    for index, (path, question) in enumerate(users):
        with Image.open(path) as image:
            expected = alone(server, image.convert("RGB"), question)
        assert len(answers[index]) == len(server.answerers) == 2
        for given, own in zip(answers[index], expected, strict=True):
            assert heats(given) == heats(own) and heats(own)
            assert re.findall(r"<span.*?</span>", given) == re.findall(r"<span.*?</span>", own)
    assert heats(answers[0][0]) != heats(answers[1][0])


def test_one_model_asked_from_several_threads(example):
    """Without the server's queue: a model's lock keeps its recordings apart."""
    answerers = {"model": Answerer(Subject(*load(example.parents[2] / "checkpoints" / "agevlm-tiny")))}
    images = [picture(seed=seed) for seed in range(3)]
    alone = [[*ask(answerers, [image], QUESTION, 3)][-1]["model"] for image in images]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda image: [*ask(answerers, [image], QUESTION, 3)][-1], images))
    for index, result in enumerate(alone):
        assert together[index]["model"].tokens == result.tokens
        assert (together[index]["model"].token_weights == result.token_weights).all()


def test_each_word_of_the_question_has_its_maps():
    attended = attend(tiny_model(), tiny_processor(), picture(), f" {QUESTION}\n<b>&", max_new_tokens=2)
    html = finished("a", [picture()], attended, "mean")
    words = re.findall(r'data-token="question (\d+)">([^<]+)</span>', html)
    assert [unescape(word) for _, word in words] == [*QUESTION.split(), "<b>&"]
    assert all(attended.question[int(start) :].startswith(unescape(word)) for start, word in words)
    said = attended.special.count(False)
    assert len(heats(html)) == 3 * (1 + len(words) + said)  # two layers and their mean


def test_answers_grow_word_by_word():
    answerers = {"a": Answerer(Subject(tiny_model(), tiny_processor()))}
    states = [state["a"] for state in ask(answerers, [picture()], QUESTION, 40)]
    *texts, last = states
    assert len({*texts}) > 1
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert texts[-1].strip() == last.answer


@pytest.mark.parametrize("question", ["", " \n ", None, 7])
def test_an_empty_question_is_refused(server, uploaded, question):
    with pytest.raises(RuntimeError, match="question is empty"):
        call(server.address, uploaded, question)
    assert len(call(server.address, uploaded, QUESTION)) == 2  # the server lives


@pytest.mark.parametrize(
    ("question", "message"),
    [("x" * (MAX_QUESTION + 1), f"{MAX_QUESTION} or fewer"), ("What is <|image|>?", "image placeholder")],
)
def test_questions_that_are_none(server, uploaded, question, message):
    with pytest.raises(RuntimeError, match=message):
        call(server.address, uploaded, question)


def test_a_text_file_named_png_is_refused(server, uploaded):
    text = upload(server.address, "notes.png", b"no picture at all")
    with pytest.raises(RuntimeError, match=r"notes\.png is no picture") as refused:
        call(server.address, text, QUESTION)
    assert text["path"] not in str(refused.value)
    assert len(call(server.address, uploaded, QUESTION)) == 2


def test_a_picture_of_too_many_pixels_is_refused(server, tmp_path):
    path = tmp_path / "huge.png"
    Image.new("1", (10_000, 8_000)).save(path)
    with pytest.raises(RuntimeError, match=r"10000 x 8000 pixels exceed the limit of 64000000"):
        call(server.address, upload(server.address, path.name, path.read_bytes()), QUESTION)


def _bytes(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_decompression_bomb_is_refused_by_its_header(server, uploaded):
    """A few bytes that claim 3.6 gigapixels."""
    small = _bytes(Image.new("1", (8, 8)), "PNG")
    header = b"IHDR" + (60_000).to_bytes(4) * 2 + small[24:29]
    bomb = small[:12] + header + zlib.crc32(header).to_bytes(4) + small[33:]
    with pytest.raises(RuntimeError, match=r"bomb\.png has too many pixels; shrink it below 64 million"):
        call(server.address, upload(server.address, "bomb.png", bomb), QUESTION)
    assert len(call(server.address, uploaded, QUESTION)) == 2


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise by 90 degrees
    return exif


HALVES = Image.new("RGB", (60, 40), "blue")
HALVES.paste("red", (0, 0, 30, 40))
FADING = HALVES.convert("RGBA")
FADING.paste((0, 255, 0, 0), (30, 0, 60, 40))
DEEP = np.full((40, 60), 50_000, dtype=np.uint16)
DEEP[:, :30] = 10_000
KINDS = {
    # name: (file, size as shown, colors on the left and the right, or above and below)
    "alpha.png": (_bytes(FADING, "PNG"), (60, 40), ((255, 0, 0), (255, 255, 255))),
    "deep.png": (_bytes(Image.fromarray(DEEP), "PNG"), (60, 40), ((39,) * 3, (195,) * 3)),
    "turned.jpg": (_bytes(HALVES, "JPEG", exif=_turned(), quality=95), (40, 60), ((255, 0, 0), (0, 0, 255))),
    "moving.gif": (_bytes(HALVES, "GIF", save_all=True, append_images=[Image.new("RGB", (60, 40), "green")]),
                   (60, 40), ((255, 0, 0), (0, 0, 255))),
    "palette.webp": (_bytes(HALVES, "WEBP", lossless=True), (60, 40), ((255, 0, 0), (0, 0, 255))),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_is_shown_as_a_viewer_shows_it(server, name):
    """Transparency on white, 16 bits scaled, cameras' rotation applied, the first frame; the overlay has its shape."""
    content, size, colors = KINDS[name]
    ours, other = call(server.address, upload(server.address, name, content), QUESTION)
    (shown,) = re.findall(r'class="picture"[^>]* src="data:image/jpeg;base64,([^"]+)"', ours)
    assert [*re.findall(r'class="picture"[^>]* src="data:image/jpeg;base64,([^"]+)"', other)] == [shown]
    picture = Image.open(io.BytesIO(base64.b64decode(shown)))
    assert picture.size == size
    places = ((10, 20), (50, 20)) if size[0] > size[1] else ((20, 10), (20, 50))
    for place, color in zip(places, colors, strict=True):
        np.testing.assert_allclose(picture.getpixel(place), color, atol=8)
    heat = Image.open(io.BytesIO(base64.b64decode(heats(ours)[0].partition(",")[2])))
    assert heat.size == size and heat.mode == "RGBA"


def test_a_picture_of_one_line_is_answered(server):
    line = upload(server.address, "line.png", _bytes(Image.new("RGB", (3000, 1), "red"), "PNG"))
    for answer in call(server.address, line, QUESTION):
        heat = Image.open(io.BytesIO(base64.b64decode(heats(answer)[0].partition(",")[2])))
        assert heat.size == (160, 1)


@pytest.mark.slow
def test_the_longest_question_is_answered(server, uploaded):
    question = ("Is there a red apple? " * 100)[:MAX_QUESTION].strip()
    ours, _ = call(server.address, uploaded, question)
    assert question in re.sub(r"<[^>]*>", "", ours)


def test_the_end_of_an_answer_is_no_word(server, uploaded):
    ours, _ = call(server.address, uploaded, QUESTION)
    answer = ours.partition('<p class="text tokens">')[2]
    assert re.findall(r'<span class="token"[^>]*>(.*?)</span>', answer) in (["Yes"], ["No"])


def test_a_port_that_is_taken_is_said_in_one_line(server, example):
    port = server.address.rstrip("/").rpartition(":")[2]
    with pytest.raises(ValueError, match=f"cannot serve on 127.0.0.1, port {port}"):
        main([str(example.parents[2] / "checkpoints" / "agevlm-tiny"), "--port", port])


def test_an_upload_of_50_mb_is_refused(server, uploaded):
    with pytest.raises(urllib.error.HTTPError) as refused:
        upload(server.address, "large.png", bytes(MAX_UPLOAD * 2**20 + 1))
    assert refused.value.code == 413
    assert "maximum allowed size" in refused.value.read().decode()
    with pytest.raises(OSError):  # the server hangs up long before the end
        upload(server.address, "large.png", bytes(50_000_000))
    assert len(call(server.address, uploaded, QUESTION)) == 2


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install 'agevlm\[demo\]'"):
        build_page({})


def test_nothing_is_reported_to_anyone(server):
    with urllib.request.urlopen(f"{server.address}config", timeout=60) as response:
        config = json.load(response)
    assert config["analytics_enabled"] is False


def test_special_tokens_are_no_words_of_the_answer():
    """Not by what they spell: an answer may hold the end token's letters, or nothing but special tokens."""
    attended = attend(tiny_model(), tiny_processor(), picture(), QUESTION, max_new_tokens=3)
    for special in ([False, True, False], [True] * 3):
        tokens = ["<|eot_id|>" if hidden else f" word{index}" for index, hidden in enumerate(special)]
        html = finished("a", [picture()], replace(attended, tokens=tokens, special=special), "mean")
        assert "eot_id" not in html
        shown = [str(index) for index, hidden in enumerate(special) if not hidden]
        assert re.findall(r'<span class="token"[^>]*data-token="(\d+)"', html) == shown
        assert {*re.findall(r'class="heat" data-token="(\d+)"', html)} == {*shown}
        assert ("it says nothing" in html) == (not shown)


def test_a_conversation_goes_on_until_its_pictures_change(server, uploaded, example):
    gallery = [{"image": uploaded}]
    *_, question, said = converse(server.address, gallery, QUESTION)
    assert (
        question == "" and said["pictures"] == [uploaded["path"]] and said["turns"].keys() == server.answerers.keys()
    )
    *second, _, longer = converse(server.address, gallery, OTHER, said)
    alone = call(server.address, uploaded, OTHER)
    with Image.open(example) as image:
        image = image.convert("RGB")
    for name, html, lone in zip(server.answerers, second, alone, strict=True):
        ((asked, answer),) = said["turns"][name]
        assert asked == QUESTION and longer["turns"][name][:1] == [[asked, answer]]
        assert unescape(html).count(QUESTION) == 1 and QUESTION not in unescape(lone)
        # What the model has been told: the same as without a server, and not what it says to the question alone.
        answerer = server.answerers[name]
        attended = attend(
            answerer.subject.model, answerer.subject.processor, image, OTHER, before=[(asked, answer)],
            layers=answerer.layers, max_new_tokens=server.max_new_tokens,
        )  # fmt: skip
        assert longer["turns"][name][1] == [OTHER, attended.answer]
        assert heats(html) == heats(finished(name, [image], attended, "mean")) != heats(lone)
    other = upload(server.address, "other.png", _bytes(HALVES, "PNG"))
    *_, fresh = converse(server.address, [{"image": other}], OTHER, said)
    assert [len(turns) for turns in fresh["turns"].values()] == [1, 1]


def test_several_pictures_have_a_map_each(server, uploaded):
    other = upload(server.address, "halves.png", _bytes(HALVES, "PNG"))
    gallery = [{"image": uploaded}, {"image": other, "caption": None}]
    *both, _, said = converse(server.address, gallery, QUESTION)
    assert said["pictures"] == [uploaded["path"], other["path"]]
    alone = call(server.address, uploaded, QUESTION)
    for html, lone in zip(both, alone, strict=True):
        assert html.count('class="picture"') == 2 and len(heats(html)) > len(heats(lone))
        sizes = {Image.open(io.BytesIO(base64.b64decode(heat.partition(",")[2]))).size for heat in heats(html)}
        assert sizes == {(160, 160), (60, 40)}
    with pytest.raises(RuntimeError, match="there are 5 pictures; ask about 4 or fewer"):
        converse(server.address, [{"image": uploaded}] * (MAX_PICTURES + 1), QUESTION)


LONG = "x" * (MAX_SAID + 1)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([["a", "b"]] * (MAX_TURNS + 1), "more than 16 questions"),
        ([["a", LONG]], "more than 8000 characters"),
        ([["a"]], "not made of questions and answers"),
        ([7], "not made of questions and answers"),
        (7, "not made of questions and answers"),
        ([["a", "<|image|>"]], "control token of the model"),
    ],
)
def test_a_conversation_that_is_none_is_refused(server, uploaded, turns, message):
    said = {"pictures": [uploaded["path"]], "turns": {"agevlm-tiny": turns}}
    with pytest.raises(RuntimeError, match=message):
        converse(server.address, [{"image": uploaded}], QUESTION, said)
    for said in (7, [], {"turns": 7}, {"pictures": [uploaded["path"]], "turns": 7}):  # no conversation at all
        assert len(converse(server.address, [{"image": uploaded}], QUESTION, said)) == 4


def test_every_example_is_there():
    for name in EXAMPLES:
        assert _example(name).mode == "RGB" and f"{escape(EXAMPLES[name])}</button>" in _card(name, EXAMPLES[name])
