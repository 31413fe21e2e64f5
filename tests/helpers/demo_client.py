"""What a client of the demo page sends over HTTP, as Gradio's API documents it, or not."""

import json
import urllib.request


META = {"_type": "gradio.FileData"}


def call(address: str, image: object, question: object, seconds: float = 120) -> list[str]:
    """The page's answers to a question about a picture, as `converse`."""
    return converse(address, [{"image": image}], question, None, seconds)[:-2]


def converse(address: str, gallery: object, question: object, said: object = None, seconds: float = 120) -> list:
    """All that the page returns: the answers, the next question, which is empty, and what has been said.

    Raises RuntimeError with the server's words, and TimeoutError."""
    body = json.dumps({"data": [gallery, question, said]}).encode()
    send = urllib.request.Request(f"{address}gradio_api/call/ask", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(send, timeout=seconds) as response:
        event = json.load(response)["event_id"]
    with urllib.request.urlopen(f"{address}gradio_api/call/ask/{event}", timeout=seconds) as response:
        *_, kind, data = (line for line in response.read().decode().splitlines() if line)
    if kind == "event: error":
        raise RuntimeError(data.removeprefix("data: "))
    return json.loads(data.removeprefix("data: "))


def upload(address: str, name: str, content: bytes) -> dict:
    """Gradio's description of a file that the page has taken."""
    form = b'--part\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n%s\r\n--part--\r\n'
    send = urllib.request.Request(
        f"{address}gradio_api/upload",
        form % (name.encode(), content),
        {"Content-Type": "multipart/form-data; boundary=part"},
    )
    with urllib.request.urlopen(send, timeout=60) as response:
        (path,) = json.load(response)
    return {"path": path, "orig_name": name, "meta": META}
