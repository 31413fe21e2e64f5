"""A small Hub on this machine, for tests through the real `huggingface_hub` client, with faults on demand.

It speaks what huggingface_hub 2.4 asks for (read from its source): whoami, repositories, preupload, git-LFS batch,
upload and verify, commits (ndjson), refs, tags, branches, tree, info, and files with ETag and ranges. It does not
speak Xet: clients of these tests switch that off (`HF_HUB_DISABLE_XET`) and upload by LFS. Contents lie on disk, named
by their hash; what is visible is what a commit names, as on the real one.

    with HubServer(folder) as hub:
        hub.add_repo("org/name", {"config.json": b"{}"})
        hub.fail("POST .*/commit/", 500, times=2)

Differences from the real one: no pages of long listings, no multi-part uploads, no redirects to a CDN.
"""

import base64
import hashlib
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".jpg", ".parquet", ".arrow")
TOKEN, READ_TOKEN = "hf_write_token_of_the_tests", "hf_read_token_of_the_tests"


class Answer(Exception):
    """What a request is answered with."""

    def __init__(self, status: int, body: Any = None, **headers: str):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        self.body = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()


@dataclass
class Blob:
    """A file of a commit: its git hash, its size, and the sha256 if LFS holds it."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository: `branches` map to commits, newest first; `tags` to one commit each."""

    kind: str
    name: str
    private: bool = False
    gated: tuple[int, str] | None = None  # status and error code for everybody who asks for a file
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": []})
    tags: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        """The commit that a branch, tag or hash names."""
        if self.branches.get(revision):
            return self.branches[revision][0]
        if revision in self.tags:
            return self.tags[revision]
        for commits in [*self.branches.values(), list(self.tags.values())]:
            for commit in commits:
                if len(revision) >= 7 and commit.oid.startswith(revision):
                    return commit
        if revision == "main":  # nothing committed yet
            return Commit(40 * "0", "empty", {})
        raise Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")


class HubServer:
    """The server. `requests` lists what was asked ("METHOD /path"), `uploaded` the bytes received by LFS.

    Args:
        folder: where contents go.
        users: token -> whether it may write.
    """

    def __init__(self, folder: Path, users: Mapping[str, bool] | None = None):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.users = dict(users or {TOKEN: True, READ_TOKEN: False})
        self.repos: dict[tuple[str, str], Repo] = {}
        self.faults: list[tuple[str, int | str]] = []
        self.requests: list[str] = []
        self.uploaded = 0
        self.on_request: Callable[[str, str], None] = lambda when, what: None
        self.lock = threading.RLock()
        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()

    # ---- What tests do with it ----

    @property
    def environment(self) -> dict[str, str]:
        """That of a process that knows this Hub and no other."""
        return {"HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def fail(self, pattern: str, how: int | str, times: int = 1) -> None:
        """Let the next `times` requests that match go wrong: a status, or

        `cut` (closed without an answer), `cut in the middle` (of receiving the body), `lost` (done, but the answer is
        cut off) or `hang` (no answer until the server stops).
        """
        self.faults += [(pattern, how)] * times

    def add_repo(self, name: str, files: Mapping[str, bytes] | Path, kind: str = "model", **settings: Any) -> Repo:
        """A repository with one commit of `files` (or of the files in a folder)."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()}
        repo = self.repos[kind, name] = Repo(kind, name, **settings)
        self.commit(repo, "main", "first", {path: self.store(path, content) for path, content in files.items()})
        return repo

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The contents that a revision shows."""
        commit = self.repos[kind, name].find(revision)
        return {path: self.read(blob) for path, blob in commit.files.items()}

    def commits(self, name: str, branch: str = "main") -> list[Commit]:
        """The commits of a branch, newest first."""
        return self.repos["model", name].branches[branch]

    # ---- Contents ----

    def store(self, path: str, content: bytes) -> Blob:
        """Keep a file's contents, by LFS if the Hub would."""
        if path.endswith(LFS_SUFFIXES):
            sha256 = hashlib.sha256(content).hexdigest()
            self.write(sha256, content)
            return self.pointer(sha256)
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        self.write(oid, content)
        return Blob(oid, len(content))

    def write(self, name: str, content: bytes) -> None:
        temporary = self.folder / f"{name}.{threading.get_ident()}"
        temporary.write_bytes(content)
        os.replace(temporary, self.folder / name)

    def read(self, blob: Blob) -> bytes:
        return (self.folder / (blob.sha256 or blob.oid)).read_bytes()

    def pointer(self, sha256: str) -> Blob:
        size = (self.folder / sha256).stat().st_size
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return Blob(hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest(), size, sha256)

    def commit(self, repo: Repo, branch: str, title: str, changes: Mapping[str, Blob | None]) -> Commit:
        """A commit that changes files of a branch; None deletes one."""
        commits = repo.branches[branch]
        files = dict(commits[0].files) if commits else {".gitattributes": self.store(".gitattributes", b"")}
        for path, blob in changes.items():
            if blob is None:
                files.pop(path, None)
            else:
                files[path] = blob
        text = f"{repo.name} {title} {len(commits)} {sorted((path, blob.oid) for path, blob in files.items())}"
        commits.insert(0, Commit(hashlib.sha1(text.encode()).hexdigest(), title, dict(sorted(files.items()))))
        return commits[0]

    def next_fault(self, what: str) -> int | str | None:
        """What goes wrong with this request, which uses the fault up."""
        with self.lock:
            for index, (pattern, how) in enumerate(self.faults):
                if re.match(pattern, what):
                    del self.faults[index]
                    return how
        return None


def connect(hub: HubServer, monkeypatch, token: str | None = TOKEN) -> None:
    """Let this process know no other Hub, without Xet and without waiting between the tries of the client."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    else:
        monkeypatch.setenv("HF_TOKEN", token)


class HubHandler(BaseHTTPRequestHandler):
    """Answers one connection. `routes` at the end of the file maps requests to methods."""

    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        self.query, path = parse_qs(address.query), address.path
        what = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(what)
        self.hub.on_request("begins", what)
        fault = self.hub.next_fault(what)
        if fault == "hang":
            self.hub.released.wait()
        if fault in ("cut", "hang", "cut in the middle"):
            if fault == "cut in the middle":
                self.rfile.read(int(self.headers.get("Content-Length", 2)) // 2)
            return self.cut()
        body = self.read_body()
        self.hub.on_request("was received", what)
        try:
            if isinstance(fault, int):
                raise Answer(fault, {"error": "a fault of the tests"})
            self.user = self.who()
            for method, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method.split():
                    parts = {name: unquote(value) for name, value in match.groupdict().items() if value}
                    with self.hub.lock:
                        handle(self, body, **parts)
            raise Answer(404, {"error": f"the tests' Hub does not know {what}"}, X_Error_Code="EntryNotFound")
        except Answer as answer:
            if fault == "lost":
                return self.cut()
            with suppress(ConnectionError):
                self.send(answer)
        self.hub.on_request("is answered", what)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    # ---- Who may do what ----

    def who(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            message = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": message}, X_Error_Message=message)
        return token or None

    def may_write(self) -> None:
        if self.user is None:
            raise Answer(401, {"error": "Unauthorized"}, X_Error_Message="Invalid username or password.")
        if not self.hub.users[self.user]:
            raise Answer(403, {"error": "Forbidden"}, X_Error_Message="the token may not write")

    def repo(self, kind: str, name: str) -> Repo:
        found = self.hub.repos.get((kind, name))
        if found is None or (found.private and self.user is None):
            # What the real one says, so that strangers do not learn which private ones there are
            status = 401 if self.user is None else 404
            raise Answer(status, {}, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        return found

    # ---- Answers ----

    def whoami(self, body: bytes) -> None:
        if self.user is None:
            raise Answer(401, {"error": "Unauthorized"})
        role = "write" if self.hub.users[self.user] else "read"
        raise Answer(
            200, {"type": "user", "name": "tester", "orgs": [], "auth": {"accessToken": {"role": role}}, "id": "1"}
        )

    def create(self, body: bytes) -> None:
        self.may_write()
        asked = json.loads(body)
        kind, name = asked.get("type", "model"), f"{asked.get('organization') or 'tester'}/{asked['name']}"
        place = {"url": f"{self.hub.address}/{name if kind == 'model' else f'{kind}s/{name}'}"}
        if (kind, name) in self.hub.repos:
            raise Answer(409, {**place, "error": "You already created this model repo"})
        repo = self.hub.repos[kind, name] = Repo(kind, name, private=asked.get("visibility") == "private")
        self.hub.commit(repo, "main", "initial commit", {})
        raise Answer(200, place)

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        valid = False
        with suppress(yaml.YAMLError):
            valid = match is not None and isinstance(yaml.safe_load(match[1]), dict)
        errors = [] if valid else [{"message": "metadata is no YAML mapping"}]
        raise Answer(200 if valid else 400, {"errors": errors, "warnings": []})

    def preupload(self, body: bytes, kind: str, name: str, revision: str) -> None:
        self.may_write()
        files = self.repo(kind, name).find(revision).files
        answer = []
        for path in (file["path"] for file in json.loads(body)["files"]):
            known, mode = files.get(path), "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = None if known is None else known.sha256 or known.oid
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        raise Answer(200, {"files": answer})

    def lfs_batch(self, body: bytes, name: str) -> None:
        self.may_write()
        objects = []
        for item in json.loads(body)["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not (self.hub.folder / item["oid"]).exists():
                upload, verify = (f"{self.hub.address}/lfs/{verb}/{item['oid']}" for verb in ("upload", "verify"))
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(answer)
        raise Answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer(400, {"error": "the hash does not fit"})
        self.hub.uploaded += len(body)
        self.hub.write(oid, body)
        raise Answer(200)

    def lfs_verify(self, body: bytes, oid: str) -> None:
        raise Answer(200 if (self.hub.folder / oid).exists() else 404)

    def make_commit(self, body: bytes, kind: str, name: str, revision: str) -> None:
        self.may_write()
        repo = self.repo(kind, name)
        if revision not in repo.branches:
            raise Answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines()]
        changes: dict[str, Blob | None] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = self.hub.store(value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not (self.hub.folder / value["oid"]).exists():
                    raise Answer(400, {"error": f"LFS object of {value['path']} was not uploaded"})
                changes[value["path"]] = self.hub.pointer(value["oid"])
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
            else:
                raise Answer(400, {"error": f"the tests' Hub does not know {line['key']}"})
        commit = self.hub.commit(repo, revision, lines[0]["value"]["summary"], changes)
        raise Answer(200, {"commitOid": commit.oid, "commitUrl": f"{self.hub.address}/{name}/commit/{commit.oid}"})

    def refs(self, body: bytes, kind: str, name: str) -> None:
        repo = self.repo(kind, name)
        heads = {branch: commits[0] for branch, commits in repo.branches.items() if commits}
        listed = {
            part: [{"name": n, "ref": f"refs/{ref}/{n}", "targetCommit": c.oid} for n, c in found.items()]
            for part, ref, found in (("branches", "heads", heads), ("tags", "tags", repo.tags))
        }
        raise Answer(200, {**listed, "converts": []})

    def ref(self, body: bytes, kind: str, name: str, what: str, ref: str) -> None:
        """Makes or deletes a tag or a branch. A tag is posted to the revision that it names."""
        self.may_write()
        repo = self.repo(kind, name)
        known: dict[str, Any] = repo.tags if what == "tag" else repo.branches
        if self.command == "DELETE":
            raise Answer(200) if known.pop(ref, None) is not None else Answer(404, {}, X_Error_Code="RevisionNotFound")
        asked = json.loads(body)
        new, start = (asked["tag"], ref) if what == "tag" else (ref, asked.get("startingPoint", "main"))
        if new in known:
            raise Answer(409, {"error": "Reference already exists"})
        commit = repo.find(start)
        known[new] = commit if what == "tag" else [commit] if commit.files else []
        raise Answer(200)

    def info(self, body: bytes, kind: str, name: str, revision: str = "main") -> None:
        repo = self.repo(kind, name)
        commit = repo.find(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        raise Answer(200, {"id": name, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": []})

    def tree(self, body: bytes, kind: str, name: str, revision: str, folder: str | None = None) -> None:
        files = self.repo(kind, name).find(revision).files
        below = f"{folder.strip('/')}/" if folder else ""
        listing = []
        for path, blob in files.items():
            if path.startswith(below) and (self.query.get("recursive") or "/" not in path.removeprefix(below)):
                lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
                entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
                listing.append({**entry, "lfs": lfs} if blob.sha256 else entry)
        if below and not listing:
            raise Answer(404, {"error": f"{folder} does not exist"}, X_Error_Code="EntryNotFound")
        raise Answer(200, listing, Content_Type="application/json")

    def resolve(self, body: bytes, name: str, revision: str, path: str, kind: str = "model") -> None:
        repo = self.repo(kind, name)
        if repo.gated is not None:
            status, code = repo.gated
            raise Answer(status, X_Error_Code=code, X_Error_Message="Access to model is restricted")
        commit = repo.find(revision)
        if path not in commit.files:
            raise Answer(
                404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit.oid
            )
        blob = commit.files[path]
        content, status = self.hub.read(blob), 200
        headers = {"ETag": f'"{blob.sha256 or blob.oid}"', "X_Repo_Commit": commit.oid, "Accept_Ranges": "bytes"}
        if reach := self.headers.get("Range"):
            first, last = reach.removeprefix("bytes=").split("-")
            whole, status = len(content), 206
            content = content[int(first) : int(last or whole) + 1]
            headers["Content_Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{whole}"
        raise Answer(status, content, **headers)


_NAME = r"(?P<name>[^/]+/[^/]+)"
_API = rf"/api/(?P<kind>model|dataset)s/{_NAME}"
ROUTES = [
    ("GET", r"/api/whoami-v2", HubHandler.whoami),
    ("POST", r"/api/repos/create", HubHandler.create),
    ("POST", r"/api/validate-yaml", HubHandler.validate),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", HubHandler.preupload),
    ("POST", rf"/(?:datasets/)?{_NAME}\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    ("PUT", r"/lfs/upload/(?P<oid>[0-9a-f]{64})", HubHandler.lfs_upload),
    ("POST", r"/lfs/verify/(?P<oid>[0-9a-f]{64})", HubHandler.lfs_verify),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", HubHandler.make_commit),
    ("GET", rf"{_API}/refs", HubHandler.refs),
    ("POST DELETE", rf"{_API}/(?P<what>tag|branch)/(?P<ref>[^/]+)", HubHandler.ref),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", HubHandler.tree),
    ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", HubHandler.info),
    ("GET", _API, HubHandler.info),
    (
        "GET HEAD",
        rf"/(?:(?P<kind>dataset)s/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        HubHandler.resolve,
    ),
]
