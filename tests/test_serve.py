"""`agevlm serve` as a process of its own, asked over HTTP in OpenAI's format with a picture."""

import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_serve_available

from agevlm.serve import build_app
from builders import picture, tiny_model, tiny_processor


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not is_serve_available(), reason="the packages of `pip install 'agevlm[serve]'` are missing"),
]


def request(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers), timeout=120) as response:
        return response.read().decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address and checkpoint of a running server."""
    folder = tmp_path_factory.mktemp("checkpoint@1")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "agevlm", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    log = folder / "log.txt"
    with log.open("w") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        address = f"http://localhost:{port}"
        try:
            for _ in range(240):
                if process.poll() is not None:
                    pytest.fail(log.read_text())
                try:
                    request(f"{address}/health")
                    break
                except OSError:
                    time.sleep(1)
            yield address, str(folder)
        finally:
            process.terminate()


def body(checkpoint: str, seed: int, **changes) -> dict:
    buffer = io.BytesIO()
    picture(seed=seed).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "Is there a red apple?"}]
    settings = {"max_tokens": 8, "temperature": 0.0}
    return {"model": checkpoint, "messages": [{"role": "user", "content": content}], **settings, **changes}


def expected(seed: int) -> str:
    model, processor = tiny_model(), tiny_processor()
    content = [{"type": "image", "image": picture(seed=seed)}, {"type": "text", "text": "Is there a red apple?"}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    answer = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    return processor.tokenizer.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_answer_over_http_is_the_models(server, seed):
    address, checkpoint = server
    reply = json.loads(request(f"{address}/v1/chat/completions", body(checkpoint, seed)))
    assert reply["choices"][0]["message"]["content"] == expected(seed)
    assert expected(0) != expected(1)


def test_a_streamed_answer_is_the_models(server):
    address, checkpoint = server
    stream = request(f"{address}/v1/chat/completions", body(checkpoint, 0, stream=True))
    events = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")]
    pieces = [json.loads(event)["choices"] for event in events if event != "[DONE]"]
    text = "".join(choices[0]["delta"].get("content") or "" for choices in pieces if choices)
    assert text == expected(0)


def test_no_other_model_is_loaded(server):
    address, checkpoint = server
    other = Path(__file__).parent.parent / "checkpoints" / "agevlm-tiny"
    assert "loads nothing else" in request(f"{address}/load_model", {"model": str(other)})
    assert '"ready"' in request(f"{address}/load_model", {"model": checkpoint})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        request(f"{address}/v1/chat/completions", body(str(other), 0))


def test_checkpoints_of_other_models_are_refused():
    """transformers only warns, and would serve weights drawn at random."""
    llama = Path(__file__).parent.parent / "checkpoints" / "tiny-parts" / "language_model"
    with pytest.raises(ValueError, match="is no AGE-VLM checkpoint: its model type is 'llama'"):
        build_app(str(llama), "cpu")
