"""Tests of the listings of directories in DVC's cache."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from stages.core.dvc_cache import DvcCache

LISTING = json.dumps([{"md5": "0" * 32, "relpath": "a/b"}, {"md5": "1" * 32, "relpath": "c"}])
MD5 = f"{hashlib.md5(LISTING.encode()).hexdigest()}.dir"


@pytest.fixture
def cache(tmp_path: Path) -> DvcCache:
    """DVC's cache with LISTING."""
    (tmp_path / MD5).write_text(LISTING)
    return DvcCache(SimpleNamespace(cache=SimpleNamespace(local=SimpleNamespace(oid_to_path=tmp_path.joinpath))))


def test_listing_maps_relative_paths_to_md5_sums(cache: DvcCache) -> None:
    assert cache.list_files(MD5) == {"a/b": "0" * 32, "c": "1" * 32}


@pytest.mark.parametrize("md5", ["2" * 32 + ".dir", "2" * 32], ids=["another directory", "file"])
def test_listing_that_is_not_in_the_cache_is_none(cache: DvcCache, md5: str) -> None:
    assert cache.list_files(md5) is None


@pytest.mark.parametrize("content", [b"", LISTING.encode()[:20], b"[]", b"{}", b"\xff", LISTING.encode() + b"\n"])
def test_listing_that_is_damaged_is_none(cache: DvcCache, content: bytes) -> None:
    cache.get_path(MD5).write_bytes(content)
    assert cache.list_files(MD5) is None
