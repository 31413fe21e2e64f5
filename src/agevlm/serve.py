"""`agevlm serve`: a checkpoint behind transformers' OpenAI-compatible server, pictures included.

`transformers serve` (5.23) finds models by class name inside transformers, so it refuses code that travels with a
checkpoint, with or without `--trust-remote-code`. Server, request handlers and generation are transformers' own; only
how the model is loaded is ours. `transformers chat CHECKPOINT http://localhost:8000` talks to it.
"""

import argparse


def main(argv: list[str] | None = None) -> None:
    """Load the checkpoint, then serve until interrupted.

    Raises:
        ValueError: the server's packages are not installed.
    """
    parser = argparse.ArgumentParser(
        prog="agevlm serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder or Hub repository of an AGE-VLM; also the model's name in requests")
    parser.add_argument("--host", default="localhost")
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
    """The FastAPI application of transformers' server, with `checkpoint` loaded."""
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.systemone import SystemOneHandler
    from transformers.cli.serving.transcription import TranscriptionHandler
    from transformers.cli.serving.utils import GenerationState, Modality

    from agevlm.modeling_agevlm import AgeVlmForConditionalGeneration
    from agevlm.processing import AgeVlmProcessor

    class AgeVlmModelManager(ModelManager):
        """The two questions that transformers answers by class name."""

        def _load_processor(self, model_id_and_revision, gguf_file=None):
            model_id, revision = model_id_and_revision.split("@", 1)
            return AgeVlmProcessor.from_pretrained(model_id, revision=revision)

        def _load_model(self, model_id_and_revision, tqdm_class=None, progress_callback=None, gguf_file=None):
            model_id, revision = model_id_and_revision.split("@", 1)
            return AgeVlmForConditionalGeneration.from_pretrained(
                model_id, revision=revision, dtype=self.dtype, device_map=self.device
            )

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
