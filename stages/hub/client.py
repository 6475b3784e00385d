"""HTTP client of the Hugging Face Hub: time-outs, retries, and error messages for users."""

import logging
import os
import time
from collections.abc import Iterator
from typing import Any

# Set before the libraries are imported: no telemetry, which would also be another server to wait for.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

import httpx2 as httpx  # the package that huggingface_hub uses
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from stages.core.errors import printable

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_SECONDS = 5.0  # without a byte from the server
_RETRY_SECONDS = 7.0  # from the first failure to the last attempt; with imports and the first probe, at most 15 s
_PROGRESS_BYTES = 2**20  # bytes of a response that reset the retry time; a server that hangs repeatedly sends fewer
FAILURES = (OSError, ValueError, httpx.HTTPError)  # raised by huggingface_hub; ValueError is for invalid names
# Raised when a transfer is cut short. If the server does not send the size, huggingface_hub compares it afterwards.
_CUT_SHORT = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.DecodingError)

_failed_hosts: dict[str, str] = {}  # host to the reason why it is not asked again


class HubTimeoutError(OSError):
    """The server did not answer within the retry time. No library treats this error as temporary."""


class _RetryingClient(httpx.Client):
    """HTTP client for huggingface_hub and datasets that retries failed requests for up to _RETRY_SECONDS.

    Without it, the libraries retry for 23 s (files), for minutes (streamed data sets) or not at all (API). Here all
    requests are retried alike, and the libraries do not retry on top of that.
    """

    _failing_since: float | None = None

    def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        """Send `request` and return the response.

        Raises:
            HubTimeoutError: if there is no response within the retry time, or only responses with status 500 or above.
        """
        wait = 0.5
        while True:
            if reason := _failed_hosts.get(request.url.host):
                raise HubTimeoutError(reason)
            since = self._failing_since or time.monotonic()
            seconds = max(1.0, min(REQUEST_TIMEOUT_SECONDS, since + _RETRY_SECONDS - time.monotonic()))
            request.extensions = {**request.extensions, "timeout": httpx.Timeout(seconds).as_dict()}
            try:
                response = super().send(request, stream=stream, **options)
            except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
                self.record_failure(request, error, wait)
            else:
                if response.status_code < 500:
                    if stream:
                        assert isinstance(response.stream, httpx.SyncByteStream)
                        response.stream = _ResponseStream(response.stream, self, request)
                    else:
                        self.reset_retries()
                    return response
                response.close()
                self.record_failure(request, f"HTTP {response.status_code}", wait)
            time.sleep(wait)
            wait *= 2

    def reset_retries(self) -> None:
        self._failing_since = None

    def record_failure(self, request: httpx.Request, problem: Exception | str, wait: float) -> None:
        """Record a failed request; raise HubTimeoutError if a retry after `wait` seconds would come too late."""
        now = time.monotonic()
        silence = request.extensions["timeout"]["read"] if isinstance(problem, httpx.TimeoutException) else 0.0
        self._failing_since = self._failing_since or now - silence
        url = request.url.copy_with(query=None)  # a query may contain a signature
        reason = f"{url}: {_format_problem(problem)}"
        if now + wait >= self._failing_since + _RETRY_SECONDS:
            _failed_hosts[request.url.host] = reason
            raise HubTimeoutError(reason)
        log.warning("%s: retrying", reason)


class _ResponseStream(httpx.SyncByteStream):
    """Body of a response. A broken connection is raised as an error from which huggingface_hub resumes the download."""

    def __init__(self, stream: httpx.SyncByteStream, client: _RetryingClient, request: httpx.Request) -> None:
        self._stream, self._client, self._request = stream, client, request

    def __iter__(self) -> Iterator[bytes]:
        try:
            num_bytes = 0
            for chunk in self._stream:
                num_bytes += len(chunk)
                if num_bytes >= _PROGRESS_BYTES:
                    self._client.reset_retries()
                yield chunk
            self._client.reset_retries()
        except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
            self._client.record_failure(self._request, error, wait=1.0)  # huggingface_hub waits as long
            raise httpx.RemoteProtocolError(str(error)) from error

    def close(self) -> None:
        self._stream.close()


def _format_problem(problem: Exception | str) -> str:
    if isinstance(problem, httpx.TimeoutException):
        return "no answer in time"
    return str(problem) or type(problem).__name__


def find_hub_problem() -> str:
    """Probe the Hub and return why it cannot be reached, or an empty string; install the retrying client."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    session = get_session()
    if not isinstance(session, _RetryingClient):
        hooks = session.event_hooks
        set_client_factory(lambda: _RetryingClient(event_hooks=hooks, follow_redirects=True))
    host = httpx.URL(constants.ENDPOINT).host
    _failed_hosts.pop(host, None)
    try:
        httpx.head(constants.ENDPOINT, timeout=REQUEST_TIMEOUT_SECONDS)
    except Exception as error:  # any error means that there was no answer
        _failed_hosts[host] = f"{constants.ENDPOINT}: {_format_problem(error)}"
    return _failed_hosts.get(host, "")


def format_page_url(repository: str, kind: str = "") -> str:
    """Return the URL of a model's web page; of a data set's if `kind` is `datasets/`."""
    return f"{constants.ENDPOINT}/{kind}{repository}"


def explain_hub_error(error: BaseException, page: str) -> str:
    """Return what an error of the Hub means for the repository at `page`, and how to resolve it."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    status = answer.response.status_code if answer is not None else None
    words = printable((str(error).strip() or type(error).__name__).splitlines()[0], 500)
    if isinstance(error, HubTimeoutError):
        return f"{words}: the Hub fails, try again later (https://status.huggingface.co shows its state)"
    if isinstance(answer, RevisionNotFoundError):
        return f"it has no such revision: {page}/commits/main lists its commits"
    if isinstance(answer, RepositoryNotFoundError) and not isinstance(answer, GatedRepoError):
        return (
            f"it does not exist ({page}), or it is private: check its name, or authenticate with `hf auth login` or"
            " HF_TOKEN"
        )
    if status in (401, 403) or "gated" in words:
        reason = f"HTTP {status}" if status else "it is gated"
        return f"access is refused ({reason}): accept its terms on {page}, then `hf auth login`, or set HF_TOKEN"
    if any(isinstance(cause, _CUT_SHORT) for cause in causes) or "Consistency check failed" in words:
        return f"{words}: the transfer was cut short; run the same command again"
    return words
