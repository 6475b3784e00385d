"""The Hub over HTTP: how long it is waited for, and what its refusals ask of the user."""

import logging
import os
import time
from collections.abc import Iterator
from typing import Any

# Before the libraries are imported: no one is told what is read, and no other server is waited for.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")

import httpx2 as httpx  # huggingface_hub's own
from huggingface_hub import constants, get_session, set_client_factory
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

from stages.core.errors import printable

log = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0  # without a byte before a request counts as failed
_PATIENCE_SECONDS = 7.0  # from the first failure to the last: with imports and the first look, 15 s for a dead network

_PROGRESS_BYTES = 2**20  # of a file, that begin the patience anew: a server that hangs again and again gives a few
FAILURES = (OSError, ValueError, httpx.HTTPError)  # what huggingface_hub raises; ValueError: of impossible names
# What a transfer that is cut short raises; where the server does not tell the size, huggingface_hub compares it.
_CUT_SHORT = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.DecodingError)

_silent: dict[str, str] = {}  # hosts that were given up, each with the reason


class HubSilentError(OSError):
    """A server that gives nothing for as long as it is waited for; an error that no library takes for a passing one."""


class _PatientClient(httpx.Client):
    """The client of huggingface_hub and datasets, which tries again what fails, up to PATIENCE_SECONDS.

    Theirs try again for 23 s (the Hub's files), for minutes (a data set that is streamed) or not at all (the Hub's
    API); here it is the same for all, and over them nothing is left to try again.
    """

    _silent_since: float | None = None

    def send(self, request: httpx.Request, *, stream: bool = False, **options: Any) -> httpx.Response:
        """The answer to `request`.

        Raises:
            HubSilentError: if there is none, or 500 and above.
        """
        wait = 0.5
        while True:
            if reason := _silent.get(request.url.host):
                raise HubSilentError(reason)
            since = self._silent_since or time.monotonic()
            seconds = max(1.0, min(ANSWER_SECONDS, since + _PATIENCE_SECONDS - time.monotonic()))
            request.extensions = {**request.extensions, "timeout": httpx.Timeout(seconds).as_dict()}
            try:
                response = super().send(request, stream=stream, **options)
            except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
                self.failed(request, error, wait)
            else:
                if response.status_code < 500:
                    if stream:
                        assert isinstance(response.stream, httpx.SyncByteStream)
                        response.stream = _Body(response.stream, self, request)
                    else:
                        self.answered()
                    return response
                response.close()
                self.failed(request, f"HTTP {response.status_code}", wait)
            time.sleep(wait)
            wait *= 2

    def answered(self) -> None:
        self._silent_since = None

    def failed(self, request: httpx.Request, problem: Exception | str, wait: float) -> None:
        """Note that `request` failed; raise HubSilentError where another attempt after `wait` would come too late."""
        now = time.monotonic()
        silence = request.extensions["timeout"]["read"] if isinstance(problem, httpx.TimeoutException) else 0.0
        self._silent_since = self._silent_since or now - silence
        url = request.url.copy_with(query=None)  # which may hold a signature
        reason = f"{url}: {_words(problem)}"
        if now + wait >= self._silent_since + _PATIENCE_SECONDS:
            _silent[request.url.host] = reason
            raise HubSilentError(reason)
        log.warning("%s: trying again", reason)


class _Body(httpx.SyncByteStream):
    """The bytes of a response as they come; what breaks off is an error that huggingface_hub goes on from."""

    def __init__(self, stream: httpx.SyncByteStream, client: _PatientClient, request: httpx.Request) -> None:
        self._stream, self._client, self._request = stream, client, request

    def __iter__(self) -> Iterator[bytes]:
        try:
            num_bytes = 0
            for chunk in self._stream:
                num_bytes += len(chunk)
                if num_bytes >= _PROGRESS_BYTES:
                    self._client.answered()
                yield chunk
            self._client.answered()
        except (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError) as error:
            self._client.failed(self._request, error, wait=1.0)  # as long as huggingface_hub waits
            raise httpx.RemoteProtocolError(str(error)) from error

    def close(self) -> None:
        self._stream.close()


def _words(problem: Exception | str) -> str:
    if isinstance(problem, httpx.TimeoutException):
        return "no answer in time"
    return str(problem) or type(problem).__name__


def hub_unreachable() -> str:
    """Why the Hub gives no answer, or the empty string where it does; from then on, its clients are patient."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    session = get_session()
    if not isinstance(session, _PatientClient):
        hooks = session.event_hooks
        set_client_factory(lambda: _PatientClient(event_hooks=hooks, follow_redirects=True))
    host = httpx.URL(constants.ENDPOINT).host
    _silent.pop(host, None)
    try:
        httpx.head(constants.ENDPOINT, timeout=ANSWER_SECONDS)
    except Exception as error:  # whatever it is: no answer is no answer
        _silent[host] = f"{constants.ENDPOINT}: {_words(error)}"
    return _silent.get(host, "")


def page_of(repository: str, kind: str = "") -> str:
    """The address at which a browser shows a model, or with `datasets/` before its name a data set."""
    return f"{constants.ENDPOINT}/{kind}{repository}"


def explain(error: BaseException, page: str) -> str:
    """What the Hub's `error` means for the repository at `page`, and what to do about it."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    answer = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    status = answer.response.status_code if answer is not None else None
    words = printable((str(error).strip() or type(error).__name__).splitlines()[0], 500)
    if isinstance(error, HubSilentError):
        return f"{words}: the Hub fails, try again later (https://status.huggingface.co tells of its state)"
    if isinstance(answer, RevisionNotFoundError):
        return f"it has no such revision: {page}/commits/main lists its commits"
    if isinstance(answer, RepositoryNotFoundError) and not isinstance(answer, GatedRepoError):
        return (
            f"there is none ({page}), or it is private: check its name, or show who you are with `hf auth login` or"
            " HF_TOKEN"
        )
    if status in (401, 403) or "gated" in words:
        said = f"HTTP {status}" if status else "it is gated"
        return f"access is refused ({said}): accept its terms on {page}, then `hf auth login`, or set HF_TOKEN"
    if any(isinstance(cause, _CUT_SHORT) for cause in causes) or "Consistency check failed" in words:
        return f"{words}: the transfer was cut short, run the same command again"
    return words
