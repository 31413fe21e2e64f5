"""`agevlm serve`: a checkpoint behind transformers' OpenAI-compatible server, pictures included.

`transformers serve` (5.23) finds models by class name inside transformers, so it refuses code that travels with a
checkpoint, with or without `--trust-remote-code`. Server, request handlers and generation are transformers' own; only
how the model is loaded is ours. `transformers chat CHECKPOINT http://localhost:8000` talks to it.

For clients that you trust: there is no password, and a request may name a file or an address as its picture, which the
server then reads.
"""

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Load the checkpoint, then serve until interrupted.

    Raises:
        ValueError: the server's packages are not installed, or there is no AGE-VLM checkpoint of that name.
    """
    parser = argparse.ArgumentParser(
        prog="agevlm serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or Hub repository of an AGE-VLM; also the model's name in requests")
    parser.add_argument("--host", default="localhost", help="any other opens it to the network (default: localhost)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda:0, ...")
    parser.add_argument("--dtype", default="auto", help="auto (default: as saved), bfloat16, ...")
    options = parser.parse_args(argv)

    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise ValueError("`agevlm serve` needs transformers' server: pip install 'agevlm[serve]'.")
    import uvicorn

    app = build_app(options.checkpoint, options.device, options.dtype)
    uvicorn.run(app, host=options.host, port=options.port, log_level="info")


def build_app(checkpoint: str, device: str = "auto", dtype: str = "auto"):
    """The FastAPI application of transformers' server, with `checkpoint` loaded (`NAME@REVISION` for one of the Hub).

    Raises:
        ValueError: there is no AGE-VLM checkpoint of that name.
    """
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState, Modality

    from agevlm.models import load_model, load_processor, model_type

    class AgeVlmModelManager(ModelManager):
        """The questions that transformers answers by class name, for one checkpoint and no other."""

        @staticmethod
        def process_model_name(model_id):
            # a folder's name may have an @ of its own
            return f"{model_id}@main" if Path(model_id).is_dir() else ModelManager.process_model_name(model_id)

        def _load_processor(self, model_id_and_revision, gguf_file=None):
            # The first step of loading. transformers pins requests for answers, but not those to `/load_model`.
            if model_id_and_revision != self.process_model_name(checkpoint):
                raise ValueError(f"This server has {checkpoint} and loads nothing else.")
            model_id, revision = model_id_and_revision.rsplit("@", 1)
            model_type(model_id, revision, ours=True)
            return load_processor(model_id, ours=True, revision=revision)

        def _load_model(self, model_id_and_revision, tqdm_class=None, progress_callback=None, gguf_file=None):
            model_id, revision = model_id_and_revision.rsplit("@", 1)
            return load_model(model_id, ours=True, revision=revision, dtype=self.dtype, device_map=self.device)

        @staticmethod
        def get_model_modality(model, processor=None):
            return Modality.VLM

    manager = AgeVlmModelManager(device=device, dtype=dtype, force_model=checkpoint)
    state = GenerationState()
    return build_server(
        manager,
        ChatCompletionHandler(model_manager=manager, generation_state=state),
        completion_handler=CompletionHandler(model_manager=manager, generation_state=state),
        response_handler=ResponseHandler(model_manager=manager, generation_state=state),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(model_manager=manager, generation_state=state),
        generation_state=state,
    )
