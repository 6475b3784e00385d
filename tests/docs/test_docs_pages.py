"""Tests of docs/: quoted messages are in the sources, links lead to existing targets, and all pages are indexed."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
PLACEHOLDER = re.compile(r"\b(?:N|KEY|HOW|WHY|URL|(?!JSON)[A-Z]{4,})\b")
HOLE = "\0"  # where a message of the sources has a value


def list_source_strings() -> list[str]:
    """Return the strings of stages/ and tools/, with HOLE in place of every value."""
    found = []
    for file in [*(ROOT / "stages").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.\d]*[sdrfx]", HOLE, node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values]
                found.append("".join(parts))
    return found


def list_quoted_messages() -> list[str]:
    """Return the messages of this project that docs/troubleshooting.md quotes, one per table row."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").partition("## DVC's own")[0]
    return re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)


def has_matching_string(message: str, source_strings: list[str]) -> bool:
    """Return True if a source string matches `message`, with a value or the same word for each placeholder."""
    pattern, end = "", 0
    for found in PLACEHOLDER.finditer(message):
        pattern += re.escape(message[end : found.start()]) + f"(?:[^{HOLE}]*{HOLE}[^{HOLE}]*|{found[0]})"
        end = found.end()
    return any(re.search(pattern + re.escape(message[end:]), template) for template in source_strings)


@pytest.fixture(scope="module")
def source_strings() -> list[str]:
    return list_source_strings()


@pytest.mark.parametrize("message", list_quoted_messages())
def test_troubleshooting_message_is_in_the_sources(message: str, source_strings: list[str]) -> None:
    assert max(map(len, PLACEHOLDER.split(message))) >= 8  # long enough to be unambiguous
    assert has_matching_string(message, source_strings)


def test_troubleshooting_message_that_was_reworded_is_noticed(source_strings: list[str]) -> None:
    assert has_matching_string("block_size=N: the SPLIT split has only N tokens", source_strings)
    assert not has_matching_string("block_size=N: the SPLIT split has merely N tokens", source_strings)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_existing_files_and_headings(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in list_anchors(file)):
            broken.append(target)
    assert broken == []


def list_anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub creates for the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(.+?)\]", index, flags=re.MULTILINE)
    assert sorted([*listed, "README.md"]) == [page.name for page in DOCS]
