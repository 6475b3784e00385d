"""Files at a path or URL, with their formats and splits."""

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_helpers import make_source_data
from dvc.config import ConfigError
from dvc.fs import get_cloud_fs
from fsspec.registry import known_implementations
from hostile import AS_UNPRIVILEGED, needs_modes, run_process_for_error

from stages.core.compose import compose_config
from stages.core.errors import StageError
from stages.download.files import find_files, get_format, infer_split
from stages.download.schema import REMOTES, explain_unreadable_path
from tools.check import find_missing_data


@pytest.mark.parametrize("name", ["absent.jsonl", "absent", "empty"])
def test_find_files_without_any_files_names_the_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/picture.png").write_bytes(b"")
    with pytest.raises(StageError, match=f"data.path={tmp_path / name}: no such file"):
        find_files(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.docx", "a", "a.jsonl.zip", "a.gz"])
def test_find_files_of_an_unknown_suffix_names_the_file_and_lists_known_suffixes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(StageError, match=rf"data.path={tmp_path / name}: unknown format.*\.jsonl.*\.parquet"):
        find_files(str(tmp_path / name))


def list_names(path: Path) -> list[str]:
    return [file.removeprefix(f"{path}/") for _, file in find_files(str(path))]


def write_files(directory: Path, *files: str) -> Path:
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}\n")
    return directory


@pytest.mark.parametrize("name", ["a::b.jsonl", "file:a.jsonl", "data:,x.jsonl", "a b*[c]?.jsonl", "ü\n.jsonl", "-"])
def test_find_files_of_a_local_name_with_a_meaning_to_fsspec_takes_it_literally(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, f"{name}/x.jsonl")
    assert list_names(tmp_path / name) == ["x.jsonl"]


# -- files left out of a directory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("structured", ["data.parquet", "data/train.jsonl.gz", "a.csv", "b.json", "c.ndjson"])
def test_find_files_leaves_out_text_next_to_data_and_logs_it(
    tmp_path: Path, structured: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(
        tmp_path, structured, "README.md", "LICENSE", "LICENSE.txt", "docs/CARD.MD", "picture.png", ".git/x.txt"
    )
    with caplog.at_level("INFO"):
        assert list_names(tmp_path) == [structured]
    assert "plain text next to data files left out: LICENSE.txt, README.md, CARD.MD" in caplog.text
    assert "2 files of other formats left out" in caplog.text


def test_find_files_of_only_text_takes_all_of_it(tmp_path: Path) -> None:
    write_files(tmp_path, "README.md", "b/one.txt", "two.txt.gz")
    assert list_names(tmp_path) == ["README.md", "b/one.txt", "two.txt.gz"]


def test_find_files_next_to_many_texts_logs_the_first_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_files(tmp_path, "a.jsonl", *(f"{number:03}-{'x' * 150}\x1b\n.txt" for number in range(300)))
    with caplog.at_level("INFO"):
        assert list_names(tmp_path) == ["a.jsonl"]
    assert "and 280 more" in caplog.text
    assert len(caplog.messages[-1]) < 3000
    assert caplog.messages[-1].isprintable()


@pytest.mark.parametrize("place", ["linked", "deep/er/linked", "linked.jsonl"])
@pytest.mark.parametrize("target", ["elsewhere", "a/own", "a", "."])
def test_find_files_with_a_linked_directory_refuses_it_by_name(tmp_path: Path, place: str, target: str) -> None:
    write_files(tmp_path, "a/x.jsonl", "a/own/y.jsonl", "elsewhere/z.jsonl")
    link = tmp_path / "a" / place
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / target)
    with pytest.raises(StageError, match=f"^{link} is a link to a directory, which DVC does not track"):
        find_files(str(tmp_path / "a"))


def test_find_files_of_linked_files_and_of_a_path_that_is_a_link_reads_them(tmp_path: Path) -> None:
    write_files(tmp_path, "blobs/one", "a/b.jsonl", "a/.cache/x.jsonl")
    (tmp_path / "a/c.jsonl").symlink_to("../blobs/one")
    (tmp_path / "a/.hidden").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to("a")
    assert list_names(tmp_path / "link") == ["b.jsonl", "c.jsonl"]


@needs_modes
def test_find_files_with_an_unreadable_directory_names_it(tmp_path: Path) -> None:
    write_files(tmp_path, "a/x.jsonl", "a/closed/y.jsonl")
    (tmp_path / "a/closed").chmod(0)
    paths = [f"data.path={tmp_path}/a", f"out={tmp_path}/raw"]
    said = run_process_for_error("download", "data=files", *paths, prefix=AS_UNPRIVILEGED)
    (tmp_path / "a/closed").chmod(0o700)
    assert said.startswith(f"Permission denied: {tmp_path}/a/closed")


# -- special files -----------------------------------------------------------------------------------------------------


def bind_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # the path of a socket is limited to 107 characters
        server.bind(path.name)
        os.chdir(here)


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "fifo": os.mkfifo,
    "socket": bind_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["a.jsonl", "a", "a.txt.gz", "in/a.csv", "in/deep/a"])
def test_find_files_of_a_special_file_refuses_it_without_reading(tmp_path: Path, kind: str, name: str) -> None:
    write_files(tmp_path, "in/deep/x.jsonl")
    SPECIAL[kind](tmp_path / name)
    path = tmp_path / name.partition("/")[0]
    message = f"^{tmp_path / name} is a FIFO, a socket or a device: "
    with pytest.raises(StageError, match=message):
        find_files(str(path))
    (problem,) = find_missing_data([compose_config("download", ["data=files", f"data.path={path}"])])
    with pytest.raises(StageError, match=message):
        raise StageError(problem)


@pytest.mark.parametrize("name", ["absent", "a.docx", "empty"])
def test_check_of_a_source_without_readable_files_reports_it(tmp_path: Path, name: str) -> None:
    write_files(tmp_path, "a.docx", "empty/picture.png")
    (problem,) = find_missing_data([compose_config("download", ["data=files", f"data.path={tmp_path / name}"])])
    assert problem.startswith(f"data.path={tmp_path / name}: ")


# -- URLs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("~/x.jsonl", "~ is not expanded: write the absolute path"),
        ("~me/x.jsonl", "~ is not expanded"),
        ("~", "~ is not expanded"),
        ("hf://datasets/x/y/a.parquet", "set data.name=hub and, in conf/data/hub.yaml, hub.id=OWNER/NAME"),
        ("file:///x/a.jsonl", "write the path without file://"),
        ("local:///x/a.jsonl", "write the path without local://"),
        ("zip://a.jsonl::/x/a.zip", "archives are not supported: unpack it, and set the path to the directory"),
        ("zip:///x/a.zip", "archives are not supported"),
        ("tar://a.jsonl::https://h/a.tar", "archives are not supported"),
        ("simplecache::https://h/a.jsonl", "chained URLs are not supported: download the file, and set the path to it"),
        ("gcs://b/a.jsonl", "write gs://"),
        ("sftp://h/a.jsonl", "write ssh://"),
        ("HTTPS://h/a.jsonl", "not a URL that both DVC and fsspec can read (http, https, s3, gs, ssh, "),
        ("ftp://h/a.jsonl", "download the file, and set the path to it"),
        ("github://main/a.jsonl", "download the file, and set the path to it"),
        ("memory://a.jsonl", "download the file, and set the path to it"),
        ("azure://c/a.jsonl", "download the file, and set the path to it"),
        ("nope://\x1b[2J" + "x" * 9999, "download the file, and set the path to it"),
    ],
)
def test_path_that_dvc_does_not_support_is_refused_with_a_remedy(path: str, remedy: str) -> None:
    assert remedy in str(explain_unreadable_path(path))
    with pytest.raises(ValueError, match=r"Value error, data\.path=.*" + re.escape(remedy)) as raised:
        make_source_data(path)
    (said,) = [line for line in str(raised.value).splitlines() if remedy in line]
    assert said.partition(" [type=")[0].isprintable()
    assert len(said) < 1000


@pytest.mark.parametrize("scheme", REMOTES)
def test_supported_remote_is_known_to_fsspec_and_to_dvc_by_its_package(scheme: str) -> None:
    assert scheme in known_implementations
    try:
        found = get_cloud_fs({}, url=f"{scheme}://host/path")[0].__module__
    except ImportError as error:
        found = str(error)
    assert re.search(REMOTES[scheme].replace("_", "[_-]"), found)


@pytest.mark.parametrize("scheme", ["hf", "zip", "ftp", "gcs", "sftp", "memory", "github", "abfs"])
def test_refused_scheme_is_unknown_to_dvc(scheme: str) -> None:
    assert scheme not in REMOTES
    with pytest.raises(ConfigError, match=f"Unsupported URL type {scheme}://"):
        get_cloud_fs({}, url=f"{scheme}://host/path")


@pytest.mark.parametrize("path", ["http://h/a.jsonl", "https://h/a.jsonl?x=y", "data/a.jsonl", "a::b", "./~/a", "-"])
def test_path_that_dvc_supports_is_accepted(path: str) -> None:
    assert make_source_data(path).path == path


@pytest.mark.parametrize("scheme", ["s3", "gs", "ssh", "oss"])
def test_remote_without_its_package_names_the_package(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr("stages.download.schema.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"DVC reads {scheme}:// with dvc-{scheme}, .*`uv pip install dvc-{scheme}`"):
        make_source_data(f"{scheme}://place/a.jsonl")
    monkeypatch.setattr("stages.download.schema.find_spec", lambda name: name == f"dvc_{scheme}" or None)
    assert make_source_data(f"{scheme}://place/a.jsonl").path == f"{scheme}://place/a.jsonl"


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("a.b.jsonl.zst", "jsonl"),
        ("x/A.CSV", "csv"),
        ("http://h/a.json.gz?v=1.txt", "json"),
        ("a.md", "text"),
        ("a.gz", None),
        ("a.zip", None),
        ("a.jsonl.gz.zst", None),
        ("jsonl", None),
    ],
)
def test_get_format_of_a_name_is_its_suffix_before_the_compression(name: str, expected: str | None) -> None:
    assert get_format(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train", "train"),
        ("d/train-00000-of-00002.parquet", "train"),
        ("TEST.jsonl", "test"),
        ("d/valid.csv", "validation"),
        ("val.json", "validation"),
        ("dev_1.txt", "validation"),
        ("validation.parquet", "validation"),
        ("test/part-0.jsonl", "test"),
        ("train/validation.jsonl", "validation"),
        ("training.jsonl", None),
        ("testimony.txt", None),
        ("my_train.jsonl", None),
        ("latest/a.jsonl", None),
        ("a.jsonl", None),
    ],
)
def test_infer_split_of_a_name_is_the_word_that_it_begins_with(name: str, expected: str | None) -> None:
    assert infer_split(name) == expected
