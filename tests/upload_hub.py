"""A Hugging Face Hub on the loopback interface for publishing: it creates repositories and accepts files and commits.

It accepts small files in the commit and weights by LFS, as the real Hub does for clients without Xet.
"""

import base64
import json
import re
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

import yaml
from data_helpers import serve

LICENSES = ("apache-2.0", "cc0-1.0", "cc-by-4.0", "mit", "other")  # of the Hub's list, some
PIPELINES = ("text-generation", "fill-mask")
MODEL = r"/api/models/(?P<name>[^/]+/[^/]+)"


class UploadHub:
    """Keeps `repositories`: name to {"private": ..., "files": {path: bytes}}; `commits`: their summaries, in order.

    `refusal` is the status of every answer to the API; `authorizations` what the client showed for it.
    """

    def __init__(self, refusal: int | None = None) -> None:
        self.refusal = refusal
        self.repositories: dict[str, dict[str, Any]] = {}
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.authorizations: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.url = ""

    def serve(self) -> Any:
        """A context in which the Hub runs; it gives the URL."""
        return serve(_make_handler(self))

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON value of the answer to a request."""
        self.requests.append(f"{method} {path}")
        if path == "/":
            return 200, "the front page"
        if path == "/api/validate-yaml":
            problems = find_metadata_problems(json.loads(body)["content"])
            return (400 if problems else 200), {"errors": [{"message": text} for text in problems], "warnings": []}
        if self.refusal is not None:
            return self.refusal, {"error": "no"}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            self.blobs[match[1]] = body
            return 200, {}
        if match := re.fullmatch(r"/(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return 200, {"transfer": "basic", "objects": [self._upload(item) for item in json.loads(body)["objects"]]}
        match = re.fullmatch(rf"{MODEL}(?P<rest>/preupload/main|/commit/main|)", path)
        if match is None or match["name"] not in self.repositories:
            return 404, {"error": f"no {path}"}
        repository = self.repositories[match["name"]]
        if match["rest"] == "/preupload/main":
            return 200, {"files": [_choose_upload_mode(file["path"]) for file in json.loads(body)["files"]]}
        if match["rest"] == "/commit/main":
            self._commit(repository["files"], body)
            return 200, {"commitUrl": f"{self.url}/{match['name']}/commit/{'1' * 40}", "commitOid": "1" * 40}
        siblings = [{"rfilename": file} for file in repository["files"]]
        return 200, {"id": match["name"], "private": repository["private"], "siblings": siblings, "sha": "1" * 40}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.url}/{name}", "id": name}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", **answer}
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.repositories[name] = {"private": private, "files": {}}
        return 200, answer

    def _upload(self, item: dict[str, Any]) -> dict[str, Any]:
        there = item["oid"] in self.blobs
        return {**item, **({} if there else {"actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}})}

    def _commit(self, files: dict[str, bytes], body: bytes) -> None:
        for line in body.decode().splitlines():
            key, value = json.loads(line).values()
            match key:
                case "header":
                    self.commits.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]


def find_metadata_problems(content: str) -> list[str]:
    """Return the violations of the Hub's rules for metadata of model cards (hub-docs, modelcard.md)."""
    match = re.match(r"---\n(.*?)\n---\n", content, flags=re.DOTALL)
    data = yaml.safe_load(match[1]) if match else None
    if not isinstance(data, dict):
        return ["no metadata"]
    problems = []
    if data.get("license", "other") not in LICENSES:
        problems.append(f'"license" must be one of {", ".join(LICENSES)}')
    languages = data.get("language", [])
    for language in [languages] if isinstance(languages, str) else languages:
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
            problems.append('"language" must be ISO 639 codes')
    if data.get("pipeline_tag") not in PIPELINES:
        problems.append('"pipeline_tag" is none of the Hub\'s')
    for model in data.get("model-index", []):
        for result in model["results"]:
            given = [("name" in model, "name"), ("type" in result["task"], "task.type")]
            given += [(key in result["dataset"], f"dataset.{key}") for key in ("type", "name")]
            given += [(key in metric, f"metrics.{key}") for metric in result["metrics"] for key in ("type", "value")]
            problems += [f"model-index: {name} is required" for there, name in given if not there]
    return problems


def _choose_upload_mode(path: str) -> dict[str, Any]:
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None}


def _make_handler(hub: UploadHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hub.authorizations.add(self.headers.get("Authorization", ""))
            hub.url = f"http://{self.headers['Host']}"
            length = self.headers.get("Content-Length")
            body = self.rfile.read(int(length)) if length else b"".join(self._chunks())
            status, value = hub.answer(self.command, urlsplit(self.path).path, body)
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_PUT = do_POST  # noqa: N815

        def _chunks(self) -> Any:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler
