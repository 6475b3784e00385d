"""HTTP client for fsspec: times out on silence instead of on total duration, and reports the server's error."""

from typing import Any

import aiohttp

from stages.core.errors import printable

SILENCE_SECONDS = 30.0  # a request fails after this time without a connection or a byte

_REMEDIES = {
    401: "give fsspec the credentials (docs/security.md)",
    403: "give fsspec credentials that may read it (docs/security.md)",
    429: "the server limits requests, try again later",
}


class RefusedError(OSError):
    """A response without a usable file; the message gives its status or encoding."""


async def create_client(**options: Any) -> aiohttp.ClientSession:
    """Create the session of fsspec's HTTP file system (its `get_client`).

    Content encodings are neither requested nor decoded, since a few bytes of gzip can expand to gigabytes.

    Args:
        options: the user's client_kwargs.
    """
    headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}
    options.setdefault("timeout", aiohttp.ClientTimeout(total=None, connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS))
    return aiohttp.ClientSession(headers=headers, auto_decompress=False, raise_for_status=_check_response, **options)


async def _check_response(response: aiohttp.ClientResponse) -> None:
    """Raise RefusedError if the response is an error, or is encoded."""
    status = response.status
    if status in (404, 416):  # fsspec handles these: an absent file, and a range past the end of a file
        return
    if status >= 400:
        remedy = _REMEDIES.get(status, "the server failed, try again later" if status >= 500 else "check the address")
        raise RefusedError(f"HTTP {status} {printable(response.reason or '')}: {remedy}")
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    # Some servers declare the compression of a .gz file as its encoding; its bytes are still those of the file.
    if encoding not in ("", "identity") and not (encoding.endswith("gzip") and ".gz" in response.request_info.url.path):
        raise RefusedError(
            f"the server only sends it encoded (Content-Encoding: {printable(encoding, 40)}), which is not supported:"
            " download the file, and set the path to it"
        )


def explain_client_error(error: BaseException) -> str:
    """Describe an error of this client, for a message; return the empty string for other errors."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec wraps every error in it
        return explain_client_error(error.__cause__) or printable(error.__cause__)
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"the server does not answer, or stopped sending for {SILENCE_SECONDS:g} s: try again later"
    if isinstance(error, aiohttp.ClientConnectionError):
        return f"the server cannot be reached: {printable(error)}"
    if isinstance(error, aiohttp.ClientError):
        return f"the transfer was interrupted, run it again: {printable(error)}"
    if isinstance(error, ValueError) and "range requests" in str(error):
        return (
            "the server does not support range requests, which reading Parquet requires: download the file, and set"
            " the path to it"
        )
    return ""
