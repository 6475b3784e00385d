"""A Hugging Face Hub on the loopback: as much of it as a download of single files asks for."""

import hashlib
import re
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

from data_helpers import serving

# Repository, revision and file name of https://huggingface.co/OWNER/NAME/resolve/REVISION/FILE.
FILE_URL = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


class MiniHub:
    """Answers for `repositories`: repository to revision to file name to content.

    `failing` names files for which the server answers `refusal`. `requests` lists the paths that were asked for,
    `authorizations` what the client showed for it.
    """

    def __init__(
        self,
        repositories: dict[str, dict[str, dict[str, bytes]]],
        failing: tuple[str, ...] = (),
        refusal: int = 403,
    ) -> None:
        self.repositories, self.failing, self.refusal = repositories, failing, refusal
        self.requests: list[str] = []
        self.authorizations: set[str] = set()

    def serve(self) -> Any:
        """A context in which the Hub runs; it gives the URL."""
        return serving(_handler(self.answer, self.authorizations))

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content for `path`."""
        self.requests.append(path)
        match = FILE_URL.fullmatch(path)
        if match is None and path.startswith("/api/") and "api" in self.failing:
            return self.refusal, {}, b""
        if match is None:
            return 200, {}, b"the front page"
        repository, revision, file = match.group("repository", "revision", "file")
        if file in self.failing:
            return self.refusal, {}, b""
        if repository not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in self.repositories[repository]:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        commit = {"X-Repo-Commit": revision}
        content = self.repositories[repository][revision].get(file)
        if content is None:
            return 404, {"X-Error-Code": "EntryNotFound", **commit}, b""
        return 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', **commit}, content


def _handler(
    answer: Callable[[str], tuple[int, dict[str, str], bytes]], authorizations: set[str]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            authorizations.add(self.headers.get("Authorization", ""))
            status, headers, content = answer(unquote(urlsplit(self.path).path))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
