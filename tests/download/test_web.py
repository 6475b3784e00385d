"""Data over HTTP: refusals and timeouts are reported, slow transfers continue, and encodings are not decoded."""

import gzip
import http.server
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import make_questions, read_values, serve, serve_files
from fsspec.implementations.http import HTTPFileSystem

from stages.core.errors import StageError
from stages.download import web

Answer = Callable[[http.server.BaseHTTPRequestHandler], None]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in make_questions(20))


@pytest.fixture(autouse=True)
def short_silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Timeout of half a second."""
    monkeypatch.setattr(web, "SILENCE_SECONDS", 0.5)
    HTTPFileSystem.clear_instance_cache()  # existing sessions keep their timeout
    yield
    HTTPFileSystem.clear_instance_cache()


def serve_answers(get: Answer, head: Answer | None = None) -> Any:
    """Serve every GET request by `get`; a context manager with the URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        do_GET = get  # noqa: N815
        do_HEAD = head or get  # noqa: N815

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return serve(Handler)


def answer_status(code: int, reason: str | None = None) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(code, reason)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


def answer_body(body: bytes, declared: int | None = None, **headers: str) -> Answer:
    """Answer with the complete body, ignoring the requested range."""

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(body) if declared is None else declared))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        if handler.command == "GET":
            handler.wfile.write(body)

    return answer


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (401, "HTTP 401 Unauthorized: give fsspec the credentials"),
        (403, "HTTP 403 Forbidden: give fsspec credentials that may read it"),
        (404, "there is no such file"),
        (410, "HTTP 410 Gone: check the address"),
        (429, "HTTP 429 Too Many Requests: the server limits requests, try again later"),
        (500, "HTTP 500 Internal Server Error: the server failed, try again later"),
        (503, "HTTP 503 Service Unavailable: the server failed, try again later"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "directory/", "no_suffix"])
def test_refusal_of_a_server_is_reported_with_a_remedy(code: int, said: str, name: str) -> None:
    with serve_answers(answer_status(code)) as url, pytest.raises(StageError) as raised:
        read_values(f"{url}/{name}")
    assert str(raised.value).startswith(f"data.path={url}/{name}: {said}")


def test_refusal_with_a_hostile_reason_is_shown_in_one_printable_line() -> None:
    with serve_answers(answer_status(500, "no\x1b[2J" + "x" * 5000)) as url, pytest.raises(StageError) as raised:
        read_values(f"{url}/a.jsonl")
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 600


def test_refusal_of_only_head_requests_is_ignored() -> None:
    with serve_answers(answer_body(LINES), head=answer_status(403)) as url:
        assert read_values(f"{url}/a.jsonl") == make_questions(20)


def test_refusal_after_the_first_answer_is_reported() -> None:
    answers = iter([answer_body(LINES)])
    with (
        serve_answers(lambda handler: next(answers, answer_status(503))(handler), head=answer_status(405)) as url,
        pytest.raises(StageError, match=r"/a\.jsonl: HTTP 503 Service Unavailable"),
    ):
        read_values(f"{url}/a.jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "directory/"])
def test_silence_of_a_server_is_a_timeout_with_the_reason(name: str) -> None:
    with (
        serve_answers(lambda handler: time.sleep(1.0)) as url,
        pytest.raises(StageError, match=f"{url}/{name}: the server does not answer, or stopped sending for 0.5 s"),
    ):
        read_values(f"{url}/{name}")


def answer_slowly(pause: float) -> Answer:
    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(LINES)))
        handler.end_headers()
        if handler.command == "GET":
            try:
                for start in range(0, len(LINES), 100):
                    handler.wfile.write(LINES[start : start + 100])
                    handler.wfile.flush()
                    time.sleep(pause)
            except OSError:  # the client closed the connection
                pass

    return answer


def test_slow_transfer_longer_than_the_silence_is_read_to_its_end() -> None:
    with serve_answers(answer_slowly(0.1)) as url:
        assert read_values(f"{url}/a.jsonl") == make_questions(20)


def test_silence_in_the_middle_of_a_file_is_reported() -> None:
    with (
        serve_answers(answer_slowly(1.0)) as url,
        pytest.raises(StageError, match=r"/a\.jsonl: the server .* stopped sending"),
    ):
        read_values(f"{url}/a.jsonl")


@pytest.mark.parametrize(
    ("name", "body"), [("a.jsonl", LINES), ("a.txt", LINES), ("a.jsonl.gz", gzip.compress(LINES)), ("a.parquet", LINES)]
)
def test_transfer_that_is_cut_short_is_reported(name: str, body: bytes) -> None:
    with (
        serve_answers(answer_body(body, declared=len(body) + 1000)) as url,
        pytest.raises(StageError, match=rf"{url}/{name}: the transfer was interrupted, run it again: "),
    ):
        read_values(f"{url}/{name}")


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br"])
@pytest.mark.parametrize("name", ["a.jsonl", "no_suffix", "a.txt"])
def test_encoded_content_that_was_not_requested_is_refused(encoding: str, name: str) -> None:
    body = gzip.compress(bytes(2**20))
    with (
        serve_answers(answer_body(body, Content_Encoding=encoding)) as url,
        pytest.raises(StageError, match=rf"{url}/{name}: .*Content-Encoding: {encoding}\), which is not supported"),
    ):
        read_values(f"{url}/{name}")


def test_compressed_file_with_its_compression_declared_as_encoding_is_read() -> None:
    with serve_answers(answer_body(gzip.compress(LINES), Content_Encoding="x-gzip")) as url:
        assert read_values(f"{url}/a.jsonl.gz") == make_questions(20)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_long_file_of_a_server_without_range_requests_is_read(tmp_path: Path, name: str) -> None:
    filler = "x" * 1000
    line = json.dumps({"t": filler}) if name == "a.jsonl" else filler
    (tmp_path / name).write_text("t\n" * (name == "a.csv") + f"{line}\n" * 7000)
    with serve_files(tmp_path) as url:
        assert read_values(f"{url}/{name}") == [{"t": filler}] * 7000


def test_long_parquet_file_of_a_server_without_range_requests_is_refused() -> None:
    stream = io.BytesIO()
    pq.write_table(pa.table({"title": [bytes(range(256)).decode("latin1") * 30000]}), stream, compression="none")
    with (
        serve_answers(answer_body(stream.getvalue())) as url,
        pytest.raises(StageError, match=r"/a\.parquet: the server does not support range requests"),
    ):
        read_values(f"{url}/a.parquet")
