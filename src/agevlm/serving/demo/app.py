"""The page that answers questions about a picture and shows where each token looked.

A client can have no file of this machine opened but those of Gradio's upload folder (`GRADIO_TEMP_DIR`, or `gradio` in
the folder for temporary files), which all Gradio programs of this user share. Among the uploads, only their names
protect one user's from another: a digest that needs the file's content and a secret of this machine. Who learns the
name of an upload can see it until it is deleted.
"""

import argparse
import os
import stat
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from agevlm.analysis.attention import Attended
from agevlm.analysis.subjects import Subject
from agevlm.data.rows import resolve_inside
from agevlm.images import MAX_PIXELS, open_image
from agevlm.models import load, unique_names

from .answering import MAX_QUESTION, Answerer, ask
from .figure import MEAN, SCRIPT, STYLE, finished, growing


MAX_UPLOAD = 20  # MB
MAX_WAITING = 32  # users in the queue
KEPT = 3600  # seconds that an upload stays on the disk, and at most a quarter more
EXAMPLE = "Is there a red apple in the image?"  # about example.png


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

    def answer(picture: Any, question: Any) -> Iterator[list[str]]:
        try:
            image = _open_upload(picture, page.GRADIO_CACHE)
            question = question if isinstance(question, str) else ""
            for state in ask(answerers, image, question, max_new_tokens):
                yield [_draw(answerers[name], name, image, value) for name, value in state.items()]
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    with Page(title="AGE-VLM", analytics_enabled=False, delete_cache=(KEPT // 4, KEPT)) as page:
        gr.Markdown(
            "# Where does it look?\nAsk about a picture; then point at the question, at one of its words or at a "
            "word of the answer to see where the model looked."
        )
        with gr.Row():
            with gr.Column(scale=2):
                # No preprocessing: Gradio would open files in every format that Pillow knows, whatever their size.
                picture = gr.Image(
                    type="filepath",
                    label=f"Picture (at most {MAX_UPLOAD} MB)",
                    sources=["upload", "clipboard"],
                    format="png",
                    elem_id="picture",
                )
                question = gr.Textbox(
                    label="Question", max_length=MAX_QUESTION, max_lines=5, elem_id="question", submit_btn="Ask"
                )
                example = gr.Button("Show me an example", size="sm", variant="secondary", elem_id="example")
            places = []
            with gr.Column(scale=2 * len(answerers)), gr.Row():
                for _ in answerers:
                    with gr.Column(min_width=300):  # beside each other where there is room
                        places.append(
                            gr.HTML(css_template=STYLE, js_on_load=SCRIPT, min_height=80, elem_classes="place")
                        )
        asking: dict[str, Any] = {"inputs": [picture, question], "outputs": places, "preprocess": False,
                                  "concurrency_limit": 1, "concurrency_id": "ask"}  # fmt: skip
        question.submit(answer, **asking, api_name="ask")
        shown = example.click(_example, None, [picture, question], api_visibility="private", show_progress="hidden")
        shown.then(answer, **asking, api_visibility="private")
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


def _example() -> tuple[Image.Image, str]:
    with files(__package__).joinpath("example.png").open("rb") as file:
        return open_image(file.read(), "example.png"), EXAMPLE


def _open_upload(upload: Any, folder: str) -> Image.Image:
    """The picture of a client's description of its upload, of which Gradio has checked nothing.

    Raises:
        ValueError: there is no upload of that description in `folder`, or it is no picture.
    """
    described = upload if isinstance(upload, Mapping) else {}
    content = _read_upload(described.get("path"), folder)
    if content is None:
        raise ValueError("there is no picture; upload one")
    name = described.get("orig_name")
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
    try:
        with open(resolve_inside(folder, path), "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            return file.read(most) if stat.S_ISREG(status.st_mode) and status.st_size <= most else None
    except (OSError, RuntimeError, ValueError):  # RuntimeError: a loop of links, before Python 3.13
        return None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def _draw(answerer: Answerer, name: str, image: Image.Image, value: str | Attended) -> str:
    if isinstance(value, str):
        return growing(name, value)
    first = str(value.layers[0]) if answerer.subject.concatenates or len(value.layers) == 1 else MEAN
    return finished(name, image, value, first)


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
