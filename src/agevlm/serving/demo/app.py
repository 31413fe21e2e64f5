"""The page that answers questions about pictures and shows where each token looked.

A conversation lives in the page: with each question the client sends its pictures and what has been said about them.
Other pictures begin another conversation.

A client can have no file of this machine opened but those of Gradio's upload folder (`GRADIO_TEMP_DIR`, or `gradio` in
the folder for temporary files), which all Gradio programs of this user share. Among the uploads, only their names
protect one user's from another: a digest that needs the file's content and a secret of this machine. Who learns the
name of an upload can see it until it is deleted.
"""

import argparse
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from agevlm.analysis.attention import Attended
from agevlm.analysis.subjects import Subject
from agevlm.data.rows import resolve_inside
from agevlm.images import MAX_PIXELS, data_address, open_image
from agevlm.models import load, unique_names

from .answering import MAX_QUESTION, Answerer, ask
from .figure import MEAN, SCRIPT, STYLE, finished, growing


MAX_UPLOAD = 20  # MB
MAX_WAITING = 32  # users in the queue
KEPT = 3600  # seconds that an upload stays on the disk, and at most a quarter more
MAX_PICTURES = 4  # of a question
MAX_TURNS = 16  # before it
MAX_SAID = 8_000  # characters of a question or an answer before it
# Test scenes of the tiny checkpoint
EXAMPLES = {
    "example.png": "Is there a red apple in the image?",
    "example-bird.webp": "Is there a green bird in the image?",
    "example-star.webp": "How many stars are in the image?",
}
CLICK = "element.addEventListener('click', (event) => { if (event.target.closest('button')) trigger('click'); });"


def build_page(answerers: Mapping[str, Answerer], max_new_tokens: int = 64) -> Any:
    """The `gradio.Blocks`; [`launch`] serves it.

    Raises:
        ValueError: Gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ValueError("`agevlm demo` needs Gradio: pip install 'agevlm[demo]'.") from error

    class Page(gr.Blocks):
        async def preprocess_data(self, block_fn: Any, inputs: list[Any], *_: Any) -> list[Any]:
            """What the client has sent, as it is. Gradio would fetch every address in it, whatever its size, and would
            refuse other things that it does not expect without a word."""
            self.validate_inputs(block_fn, inputs)
            return inputs[: len(block_fn.inputs)]

    def answer(gallery: Any, question: Any, said: Any) -> Iterator[list[Any]]:
        try:
            uploads = _pictures(gallery)
            paths = [upload.get("path") for upload in uploads]
            images = [_open_upload(upload, page.GRADIO_CACHE) for upload in uploads]
            question = question if isinstance(question, str) else ""
            before = _before(said, paths, answerers)
            for state in ask(answerers, images, question, max_new_tokens, before):
                drawn = [
                    _draw(answerers[name], name, images, question, value, before[name])
                    for name, value in state.items()
                ]
                yield [*drawn, gr.skip(), gr.skip()]
            said_now = {name: value.answer for name, value in state.items() if isinstance(value, Attended)}
            turns = {name: [*before[name], (question, answer)] for name, answer in said_now.items()}
            yield [*drawn, "", {"pictures": paths, "turns": turns}]
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    with Page(title="AGE-VLM", analytics_enabled=False, delete_cache=(KEPT // 4, KEPT)) as page:
        gr.HTML(
            f"<style>{STYLE}</style><h1>Where does it look?</h1><p>Ask about a picture or up to "
            f"{MAX_PICTURES} (of at most {MAX_UPLOAD} MB); then point at the question, at one of its words or at a "
            "word of the answer to see where the model looked.</p>"
        )
        said = gr.JSON(visible="hidden")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                # No preprocessing: Gradio would open files in every format that Pillow knows, whatever their size.
                pictures = gr.Gallery(
                    type="filepath",
                    label="Pictures",
                    show_label=False,
                    sources=["upload", "clipboard"],
                    file_types=["image"],
                    format="png",
                    columns=4,
                    fit_columns=False,
                    height=200,
                    allow_preview=False,
                    buttons=[],
                    interactive=True,
                    elem_id="pictures",
                )
                question = gr.Textbox(
                    label="Question", max_length=MAX_QUESTION, max_lines=5, elem_id="question", submit_btn="Ask"
                )
                fresh = gr.Button("New conversation", size="sm", variant="secondary", elem_id="fresh")
            with gr.Column(scale=1 + 2 * len(answerers), min_width=300):
                gr.HTML("<h3>Or begin with one of these</h3>", elem_classes="start")
                with gr.Row(elem_id="examples", elem_classes="start"):
                    cards = [
                        gr.HTML(_card(name, asked), min_width=150, js_on_load=CLICK)
                        for name, asked in EXAMPLES.items()
                    ]
                with gr.Row():
                    places = []
                    for _ in answerers:
                        with gr.Column(min_width=300):  # beside each other where there is room
                            places.append(gr.HTML(js_on_load=SCRIPT, min_height=80, elem_classes="place"))
        asking: dict[str, Any] = {"inputs": [pictures, question, said], "outputs": [*places, question, said],
                                  "preprocess": False, "concurrency_limit": 1, "concurrency_id": "ask"}  # fmt: skip
        question.submit(answer, **asking, api_name="ask")
        for card, (name, asked) in zip(cards, EXAMPLES.items(), strict=True):
            shown = card.click(
                lambda name=name, asked=asked: ([_example(name)], asked, None),
                None,
                [pictures, question, said],
                api_visibility="private",
                show_progress="hidden",
            )
            shown.then(answer, **asking, api_visibility="private")
        nothing = [None, "", None, *[""] * len(places)]
        fresh.click(
            lambda: nothing,
            None,
            [pictures, question, said, *places],
            api_visibility="private",
            show_progress="hidden",
        )
    return page.queue(max_size=MAX_WAITING)


def launch(page: Any, **options: Any) -> tuple[Any, str, str]:
    """Serves the page; `options` are those of `gradio.Blocks.launch`. Returns what that returns: app, its address
    here, its public address."""
    from fastapi import Depends, HTTPException, Request

    def refuse(request: Request) -> None:
        """What every Gradio page does and this one does not need: fetch any public address (`/gradio_api/file=https://...`)
        and give an upload to ffmpeg."""
        path = request.scope["path"]
        if "://" in path or "/process_recording" in path:
            raise HTTPException(403, "this page answers questions about uploads, and does nothing else")

    return page.launch(
        **{"share": False, **options},
        app_kwargs={"dependencies": [Depends(refuse)]},
        max_file_size=f"{MAX_UPLOAD}mb",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
    )


def _example(name: str) -> Image.Image:
    return open_image(files(__package__).joinpath(name).read_bytes(), name)


def _card(name: str, question: str) -> str:
    """What is clicked to see the answer to an example."""
    picture = data_address(_example(name), "webp", 85)
    return f'<button class="card" type="button"><img alt="" src="{picture}">{escape(question)}</button>'


def _pictures(gallery: Any) -> list[Mapping[str, Any]]:
    """A client's descriptions of its uploads, of which Gradio has checked nothing. Raises ValueError if there are more
    than `MAX_PICTURES`."""
    gallery = gallery if isinstance(gallery, list) else []
    if len(gallery) > MAX_PICTURES:
        raise ValueError(f"there are {len(gallery)} pictures; ask about {MAX_PICTURES} or fewer")
    found = [picture.get("image") if isinstance(picture, Mapping) else None for picture in gallery]
    return [picture if isinstance(picture, Mapping) else {} for picture in found or [None]]


def _before(said: Any, paths: Sequence[Any], names: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """The conversation that a client has had with each model: nothing where it was about other pictures. Raises
    ValueError if it is longer than `MAX_TURNS`, a text in it longer than `MAX_SAID`, or it is none."""
    said = said if isinstance(said, Mapping) and said.get("pictures") == paths else {}
    turns = said.get("turns") if isinstance(said.get("turns"), Mapping) else {}
    before = {name: turns.get(name) or [] for name in names}
    for pairs in before.values():
        if not isinstance(pairs, list) or not all(map(_is_turn, pairs)):
            raise ValueError("the conversation is not made of questions and answers; begin a new one")
        if len(pairs) > MAX_TURNS:
            raise ValueError(f"the conversation has more than {MAX_TURNS} questions; begin a new one")
        if max((len(text) for pair in pairs for text in pair), default=0) > MAX_SAID:
            raise ValueError(f"the conversation holds a text of more than {MAX_SAID} characters; begin a new one")
    return {name: [(question, answer) for question, answer in pairs] for name, pairs in before.items()}


def _is_turn(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _open_upload(upload: Mapping[str, Any], folder: str) -> Image.Image:
    """The picture of a client's description of its upload. Raises ValueError if there is none in `folder`, or it is no
    picture."""
    content = _read_upload(upload.get("path"), folder)
    if content is None:
        raise ValueError("there is no picture; upload one")
    name = upload.get("orig_name")
    name = (Path(name).name if isinstance(name, str) else "") or "the upload"
    try:
        return open_image(content, name)
    except ValueError as error:
        if error.__cause__ is None:
            raise
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise ValueError(f"{name} has too many pixels; shrink it below {MAX_PIXELS // 10**6} million") from error
        raise ValueError(f"{name} is no picture that can be opened; upload a PNG, JPEG or WebP file") from error


def _read_upload(path: Any, folder: str) -> bytes | None:
    """The content of a regular file below `folder`, of at most `MAX_UPLOAD`; None for any other `path` whatsoever.

    The kind of file is asked of the open descriptor, and opening waits for nobody: a pipe would block the queue.
    A link that takes the file's place after the check is not followed. Programs of this machine that can rename the
    folders below `folder` are not guarded against.
    """
    if not isinstance(path, str):
        return None
    most = MAX_UPLOAD * 2**20

    def at_once(path: str, flags: int) -> int:
        return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)

    try:
        with open(resolve_inside(folder, path), "rb", opener=at_once) as file:
            status = os.fstat(file.fileno())
            return file.read(most) if stat.S_ISREG(status.st_mode) and status.st_size <= most else None
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a loop of links, before Python 3.13
        return None


def _draw(
    answerer: Answerer,
    name: str,
    images: Sequence[Image.Image],
    question: str,
    value: str | Attended,
    before: Sequence[tuple[str, str]],
) -> str:
    if isinstance(value, str):
        return growing(name, before, question, value)
    first = str(value.layers[0]) if answerer.subject.concatenates or len(value.layers) == 1 else MEAN
    return finished(name, images, value, first, before)


def run_verb(options: argparse.Namespace) -> None:
    """`agevlm demo`, with the arguments of `cli.py`: load the models, then serve until interrupted."""
    paths = [path for path in (options.model, options.second) if path]
    answerers = {
        name: Answerer(Subject(*load(path, trust_remote_code=options.trust_remote_code)))
        for name, path in zip(unique_names(paths), paths, strict=True)
    }
    page = build_page(answerers, options.max_new_tokens)
    try:
        launch(page, server_name=options.host, server_port=options.port, share=options.share)
    except OSError as error:
        raise ValueError(f"cannot serve on {options.host}, port {options.port}: {error}") from error
