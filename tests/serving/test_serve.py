"""`agevlm serve` as a process of its own, asked over HTTP in OpenAI's format with a picture."""

import base64
import io
import json
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from PIL import Image
from servers import free_port, running
from transformers.utils.import_utils import is_serve_available

from agevlm.serving.serve import build_app, open_data_urls
from builders import picture, save_tiny, tiny_model, tiny_processor


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
    save_tiny(folder)
    address = f"http://localhost:{(port := free_port())}"
    command = [sys.executable, "-m", "agevlm", "serve", str(folder), "--port", str(port), "--device", "cpu"]
    with running(command, f"{address}/health", folder / "log.txt"):
        yield address, str(folder)


def data_url(seed: int) -> str:
    buffer = io.BytesIO()
    picture(seed=seed).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def body(checkpoint: str, seed: int, url: str | None = None, **changes) -> dict:
    url = url or data_url(seed)
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
    other = Path(__file__).parents[2] / "checkpoints" / "agevlm-tiny"
    assert "loads nothing else" in request(f"{address}/load_model", {"model": str(other)})
    assert '"ready"' in request(f"{address}/load_model", {"model": checkpoint})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        request(f"{address}/v1/chat/completions", body(str(other), 0))


def test_checkpoints_of_other_models_are_refused():
    """transformers only warns, and would serve weights drawn at random."""
    llama = Path(__file__).parents[2] / "checkpoints" / "tiny-parts" / "language_model"
    with pytest.raises(ValueError, match="is no AGE-VLM checkpoint: its model type is 'llama'"):
        build_app(str(llama), "cpu")


@pytest.fixture
def private(tmp_path) -> Path:
    """A picture of the server's machine, which a client wants to have read."""
    path = tmp_path / "private.png"
    picture(seed=0).save(path)
    return path


def refusal(address: str, body: dict) -> str:
    with pytest.raises(urllib.error.HTTPError) as error:
        request(address, body)
    assert error.value.code == 400
    return json.loads(error.value.read())["detail"]


def test_a_request_may_name_no_file_and_no_address(server, private):
    address, checkpoint = server
    hidden = [{"images": [[str(private)]]}, {"processor_kwargs": {"images": [str(private)]}}]
    with socket.create_server(("localhost", 0)) as listener:
        url = f"http://localhost:{listener.getsockname()[1]}/picture.png"
        bodies = [
            body(checkpoint, 0, url=name) for name in (str(private), f"file://{private}", url, "/proc/self/environ")
        ]
        bodies += [body(checkpoint, 0, chat_template_kwargs=given) for given in hidden]
        for sent in bodies:
            assert "send a data URL" in refusal(f"{address}/v1/chat/completions", sent)
        for name in (str(private), url):
            parts = [{"type": "input_image", "image_url": name}, {"type": "input_text", "text": "Is there an apple?"}]
            asked = {"model": checkpoint, "input": [{"role": "user", "content": parts}]}
            assert "send a data URL" in refusal(f"{address}/v1/responses", asked)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has called
            listener.accept()


def test_a_damaged_picture_is_the_clients_error(server):
    address, checkpoint = server
    damaged = "data:image/png;base64," + base64.b64encode(b"no picture").decode()
    assert "cannot be decoded" in refusal(f"{address}/v1/chat/completions", body(checkpoint, 0, url=damaged))
    reply = json.loads(request(f"{address}/v1/chat/completions", body(checkpoint, 0)))
    assert reply["choices"][0]["message"]["content"] == expected(0)


@pytest.mark.parametrize("service", ["systemone", "audio/transcriptions"])
def test_services_for_other_models_are_not_there(server, service):
    address, _ = server
    with pytest.raises(urllib.error.HTTPError, match="404"):
        request(f"{address}/v1/{service}", {})


def test_the_switch_opens_what_a_request_names(server, private):
    from fastapi.testclient import TestClient

    _, checkpoint = server
    with TestClient(build_app(checkpoint, "cpu", open_addresses=True)) as client:
        reply = client.post("/v1/chat/completions", json=body(checkpoint, 0, url=str(private))).json()
    assert reply["choices"][0]["message"]["content"] == expected(0)


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ("picture.png", "'picture.png'; send a data URL"),
        ("", "send a data URL"),
        (7, "is 7; send a data URL"),
        ({"path": "picture.png"}, "send a data URL"),
        ("data:image/png,iVBORw0KGgo=", "send a data URL"),
        ("x" * 1000, r"is 'x{79}\.\.\.; send"),
        ("data:image/png;base64,iVBOR", "is no base64"),
        ("data:image/png;base64,\N{SNOWMAN}", "is no base64"),
        ("data:image/png;base64,../../etc/passwd", "cannot be decoded"),
        ("data:image/eps;base64," + base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0").decode(), "cannot be decoded"),
    ],
)
def test_what_is_no_data_url_of_a_picture(sent, message):
    for images in (sent, [[sent]]):
        with pytest.raises(ValueError, match=message):
            open_data_urls(images)


def test_data_urls_are_opened_and_pictures_pass():
    image = picture(seed=1)
    (opened, passed), nothing = open_data_urls([[data_url(1), image], None])
    assert isinstance(opened, Image.Image) and opened.tobytes() == image.tobytes()
    assert passed is image and nothing is None
