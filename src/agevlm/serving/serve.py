"""`agevlm serve`: a checkpoint behind transformers' OpenAI-compatible server, pictures included.

`transformers serve` (5.23) finds models by class name inside transformers, so it refuses code that travels with a
checkpoint, with or without `--trust-remote-code`. Server, request handlers and generation are transformers' own; only
how the model is loaded is ours. `transformers chat CHECKPOINT http://localhost:8000` talks to it.

There is no password. Pictures come inside the requests, as data URLs. With `--open-addresses`, for clients that you
trust, a request may also name a file of this machine or an address, which the server then reads.
"""

import base64
from pathlib import Path
from typing import Any

from agevlm.arguments import VerbParser


def main(argv: list[str] | None = None) -> None:
    """Serve a checkpoint over HTTP in OpenAI's format, through transformers' own server.

    Raises:
        ValueError: the server's packages are not installed, or there is no AGE-VLM checkpoint of that name.
    """
    parser = VerbParser("serve", __doc__)
    parser.add_argument("checkpoint", help="folder or Hub repository of an AGE-VLM; its last part is the model's name")
    parser.add_argument("--host", default="localhost", help="any other opens it to the network (default: localhost)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, ...")
    parser.add_argument("--dtype", default="auto", help="auto (default: as saved), bfloat16, ...")
    parser.add_argument(
        "--open-addresses", action="store_true", help="also open the files and http addresses that requests name"
    )
    options = parser.parse_args(argv)

    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError("`agevlm serve` needs transformers' server: pip install 'agevlm[serve]'.")
    import uvicorn

    app = build_app(options.checkpoint, options.device, options.dtype, options.open_addresses)
    uvicorn.run(app, host=options.host, port=options.port, log_level="info")


def build_app(checkpoint: str, device: str = "auto", dtype: str = "auto", open_addresses: bool = False):
    """The FastAPI application of transformers' server, with `checkpoint` loaded (`NAME@REVISION` for one of the Hub).

    Requests may name it as given, or by the last part of its name alone. It answers a ValueError, such as that of a
    picture that cannot be opened, with status 400 and its sentence, in OpenAI's form.

    Args:
        open_addresses: whether a request may name a file or an address as its picture, not only bring a data URL.

    Raises:
        ValueError: there is no AGE-VLM checkpoint of that name.
    """
    from fastapi.responses import JSONResponse
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState, Modality

    from agevlm.models import check_text, control_tokens, load_model, load_processor, model_type
    from agevlm.processing import AgeVlmProcessor

    place = Path(checkpoint)
    name = place.resolve().name if place.is_dir() else checkpoint.partition("@")[0].rpartition("/")[2]

    def as_given(asked):
        return checkpoint if asked == name else asked

    class CheckedProcessor(AgeVlmProcessor):
        def __call__(self, images=None, **kwargs):
            # The one place that all pictures of a request pass, those of its `chat_template_kwargs` too.
            return super().__call__(images=images if open_addresses else open_data_urls(images), **kwargs)

        def apply_chat_template(self, conversation, **kwargs):
            tokens = control_tokens(self)
            for message in conversation:
                for part in message["content"]:
                    check_text(tokens, part.get("text", ""), "a message of the request")
            return super().apply_chat_template(conversation, **kwargs)

    class AgeVlmModelManager(ModelManager):
        """The questions that transformers answers by class name, for one checkpoint and no other."""

        @staticmethod
        def process_model_name(model_id):
            model_id = as_given(model_id)
            # a folder's name may have an @ of its own
            return f"{model_id}@main" if Path(model_id).is_dir() else ModelManager.process_model_name(model_id)

        def list_models(self, cache_dir=None):
            (served,) = super().list_models(cache_dir)
            return [{**served, "id": called} for called in dict.fromkeys((name, checkpoint))]

        def _load_processor(self, model_id_and_revision, gguf_file=None):
            # The first step of loading. transformers pins requests for answers, but not those to `/load_model`.
            if model_id_and_revision != self.process_model_name(checkpoint):
                raise ValueError(f"This server has {checkpoint} and loads nothing else.")
            model_id, revision = model_id_and_revision.rsplit("@", 1)
            model_type(model_id, revision, ours=True)
            loaded = load_processor(model_id, ours=True, revision=revision)
            return CheckedProcessor(
                loaded.image_processor, loaded.tokenizer, loaded.chat_template, image_token=loaded.image_token
            )

        def _load_model(self, model_id_and_revision, tqdm_class=None, progress_callback=None, gguf_file=None):
            model_id, revision = model_id_and_revision.rsplit("@", 1)
            return load_model(model_id, ours=True, revision=revision, dtype=self.dtype, device_map=self.device)

        @staticmethod
        def get_model_modality(model, processor=None):
            return Modality.VLM

    def handling(kind):
        class Handler(kind):
            async def handle_request(self, body, request_id):
                try:
                    return await super().handle_request(body, request_id)
                except (AttributeError, IndexError, KeyError, TypeError) as error:  # transformers checks no types
                    raise ValueError(f"the request lacks a field or has one of another type ({error!r})") from error

            def _resolve_model(self, body):
                body["model"] = as_given(body.get("model"))
                return super()._resolve_model(body)

        return Handler(model_manager=manager, generation_state=state)

    manager = AgeVlmModelManager(device=device, dtype=dtype, force_model=checkpoint)
    state = GenerationState()
    app = build_server(
        manager,
        handling(ChatCompletionHandler),
        completion_handler=handling(CompletionHandler),
        response_handler=handling(ResponseHandler),
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    # What no AGE-VLM can answer. `systemone` would open the files and addresses of a request before it fails.
    others = ("/v1/audio/transcriptions", "/v1/systemone")
    app.router.routes[:] = [route for route in app.router.routes if route.path not in others]

    def refuse(_, error):
        return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)

    app.add_exception_handler(ValueError, refuse)
    return app


def open_data_urls(images: Any) -> Any:
    """`images`, a picture or nested lists of them, with every data URL decoded; pictures and None pass.

    Raises:
        ValueError: anything else, such as a path or an address, or a data URL that holds no picture.
    """
    from PIL import Image

    from agevlm.images import open_image

    if isinstance(images, (list, tuple)):
        return [open_data_urls(image) for image in images]
    if images is None or isinstance(images, Image.Image):
        return images
    header, _, content = images.partition(",") if isinstance(images, str) else ("", "", "")
    if not (header.startswith("data:") and header.endswith(";base64")):
        seen = repr(images)
        raise ValueError(
            f"a picture of the request is {seen if len(seen) < 100 else seen[:80] + '...'}; send a data URL "
            "(data:image/png;base64,...), or start the server with --open-addresses"
        )
    try:
        decoded = base64.b64decode(content)
    except ValueError as error:
        raise ValueError(f"a data URL of the request is no base64 ({error}); encode the file's bytes") from error
    return open_image(decoded, "a data URL of the request")
