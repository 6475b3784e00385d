"""A minimal Hugging Face Hub on the loopback interface, which serves files of models and data sets."""

import contextlib
import gzip
import hashlib
import json
import re
import time
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from data_helpers import serve

# /OWNER/NAME/resolve/REVISION/FILE of a model, with /datasets before it of a data set; /api/(models|datasets)/...
FILE_URL = re.compile(r"/(?P<repository>(?:datasets/)?[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
API_URL = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+?)"
    r"(?:/(?P<route>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.*))?)?"
)

Answer = tuple[int, dict[str, str], bytes]


class MiniHub:
    """Answers for `repositories`: repository (`datasets/OWNER/NAME` of a data set) to revision to file name to content.

    A revision is a commit, or a name that `branches` gives a commit. What fails, and how, may change at any time:

    failing: names of files, and `api`, for which the server answers `refusal`.
    failures: this many requests are answered by `refusal`, then all is well; headers: what comes with a refusal.
    seconds: before every answer. cut: this many answers of files end after half of their bytes. stall: seconds there.
    unsized: files come without a Content-Length, so that only their end says that they end. gzipped: and compressed.
    requests: the paths that were asked for; authorizations: what the client showed for it.
    """

    def __init__(
        self,
        repositories: dict[str, dict[str, dict[str, bytes]]],
        failing: tuple[str, ...] = (),
        refusal: int = 403,
        **changes: Any,
    ) -> None:
        self.repositories, self.failing, self.refusal = repositories, failing, refusal
        self.branches: dict[str, str] = {}
        self.headers: dict[str, str] = {}
        self.failures, self.cut, self.seconds, self.stall = 0, 0, 0.0, 0.0
        self.unsized = self.gzipped = False
        self.requests: list[str] = []
        self.authorizations: set[str] = set()
        for name, value in changes.items():
            assert hasattr(self, name), name
            setattr(self, name, value)

    def serve(self) -> Any:
        """A context in which the Hub runs; it gives the URL."""
        return serve(_make_handler(self))

    def answer(self, path: str, asked: dict[str, list[str]]) -> Answer:
        """Status, headers and content for the escaped `path`, with the values of its query or form."""
        self.requests.append(unquote(path))
        if path == "/":
            return 200, {}, b"the front page"
        if self.failures > 0:
            self.failures -= 1
            return self.refusal, self.headers, b""
        file, api = FILE_URL.fullmatch(path), API_URL.fullmatch(path)
        match = file or api
        name = unquote(match["file"]) if file and match else "api"
        if name in self.failing:
            return self.refusal, self.headers, b""
        if match is None:
            return 404, {}, b""
        repository = match["repository"] if file else match["name"]
        if api and api["kind"] == "datasets":
            repository = f"datasets/{repository}"
        if repository not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        revision = unquote(match["revision"] or "main")
        revision = self.branches.get(revision, revision)
        if revision not in self.repositories[repository]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = self.repositories[repository][revision]
        if api:
            return _answer_json(_answer_api(api, revision, files, asked))
        commit = {"X-Repo-Commit": revision}
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", **commit}, b""
        return 200, {"ETag": f'"{_hash_content(files[name])}"', "Accept-Ranges": "bytes", **commit}, files[name]


def _hash_content(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _answer_json(value: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _answer_api(match: re.Match[str], commit: str, files: dict[str, bytes], asked: dict[str, list[str]]) -> Any:
    """Return the API's answer about a commit of a repository, or about its files and directories."""
    if match["route"] in (None, "revision"):
        siblings = [{"rfilename": name} for name in files]
        return {"id": match["name"], "sha": commit, "private": False, "tags": [], "siblings": siblings}
    directories = {name.rpartition("/")[0] for name in files} - {""}
    directories |= {above.rpartition("/")[0] for above in directories} - {""}
    entries = [
        {"type": "file", "path": name, "size": len(content), "oid": _hash_content(content)}
        for name, content in files.items()
    ]
    entries += [{"type": "directory", "path": name, "size": 0, "oid": "0"} for name in sorted(directories)]
    if match["route"] == "paths-info":
        return [entry for entry in entries if entry["path"] in asked.get("paths", [])]
    above = f"{unquote(match['path'])}/" if match["path"] else ""
    below = [entry for entry in entries if str(entry["path"]).startswith(above)]
    if asked.get("recursive", ["false"])[0].lower() not in ("true", "1"):
        below = [entry for entry in below if "/" not in str(entry["path"]).removeprefix(above)]
    return below


def _make_handler(hub: MiniHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.authorizations.add(self.headers.get("Authorization", ""))
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            asked = {"paths": json.loads(body)["paths"]} if body.startswith("{") else parse_qs(url.query or body)
            status, headers, content = hub.answer(url.path, asked)
            time.sleep(hub.seconds if url.path != "/" else 0.0)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if status == 200 and wanted and "ETag" in headers:
                first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                status, content = 206, content[first : last + 1]
            self.send_response(status)
            # Like the Hub, answer a HEAD request with the uncompressed size.
            is_body = "ETag" in headers and self.command != "HEAD"
            if is_body and hub.gzipped:
                headers["Content-Encoding"], content = "gzip", gzip.compress(content)
            if not (is_body and (hub.unsized or hub.gzipped)):
                headers["Content-Length"] = str(len(content))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if "ETag" in headers and hub.cut > 0 and len(content) > 1:
                hub.cut -= 1
                content = content[: len(content) // 2]
            with contextlib.suppress(OSError):  # the client may have gone
                self.wfile.write(content[: len(content) // 2])
                time.sleep(hub.stall if "ETag" in headers else 0.0)
                self.wfile.write(content[len(content) // 2 :])

        do_HEAD = do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
