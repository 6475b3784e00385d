"""HTTP as fsspec speaks it: given up by silence rather than by duration, and refused in the server's own words."""

from typing import Any

import aiohttp

from stages.core.errors import printable

SILENCE_SECONDS = 30.0  # without a connection or a byte before a request counts as failed

_REMEDIES = {
    401: "give fsspec the credentials (docs/security.md)",
    403: "give fsspec credentials that may read it (docs/security.md)",
    429: "the server limits requests, try again later",
}


class RefusedError(OSError):
    """An answer that holds no file; the message says which."""


async def client(**options: Any) -> aiohttp.ClientSession:
    """The session of fsspec's HTTP file system (its `get_client`); `options` are the user's client_kwargs.

    Content encodings are neither asked for nor decoded: a few bytes of gzip stand for gigabytes.
    """
    headers = {"Accept-Encoding": "identity", **options.pop("headers", {})}
    options.setdefault("timeout", aiohttp.ClientTimeout(total=None, connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS))
    return aiohttp.ClientSession(headers=headers, auto_decompress=False, raise_for_status=_refuse, **options)


async def _refuse(response: aiohttp.ClientResponse) -> None:
    status = response.status
    if status in (404, 416):  # which fsspec knows as an absent file and as the end of one
        return
    if status >= 400:
        remedy = _REMEDIES.get(status, "the server fails, try again later" if status >= 500 else "check the address")
        raise RefusedError(f"HTTP {status} {printable(response.reason or '')}: {remedy}")
    encoding = response.headers.get("Content-Encoding", "identity").lower()
    # Some servers call the compression of a .gz file its encoding: those bytes are the file.
    if encoding not in ("", "identity") and not (encoding.endswith("gzip") and ".gz" in response.request_info.url.path):
        raise RefusedError(
            f"the server only sends it encoded (Content-Encoding: {printable(encoding, 40)}), which is not decoded:"
            " fetch the file, and name it"
        )


def describe(error: BaseException) -> str:
    """Words for an error of the client; the empty string where it is none of its own."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # fsspec's, whatever it was
        return describe(error.__cause__) or printable(error.__cause__)
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, TimeoutError):
        return f"the server does not answer, or stopped sending for {SILENCE_SECONDS:g} s: try again later"
    if isinstance(error, aiohttp.ClientConnectionError):
        return f"the server cannot be reached: {printable(error)}"
    if isinstance(error, aiohttp.ClientError):
        return f"the transfer broke off, run it again: {printable(error)}"
    if isinstance(error, ValueError) and "range requests" in str(error):
        return "the server sends no parts of a file, and Parquet is read in parts: fetch the file, and name it"
    return ""
