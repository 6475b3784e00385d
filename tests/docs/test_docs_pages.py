"""docs/: the messages that troubleshooting quotes are the sources' own, links lead somewhere, pages are indexed."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
PLACEHOLDER = re.compile(r"\b(?:N|KEY|HOW|WHY|URL|(?!JSON)[A-Z]{4,})\b")
HOLE = "\0"  # where a message of the sources has a value


def templates() -> list[str]:
    """The strings of stages/ and tools/, values left out."""
    found = []
    for file in [*(ROOT / "stages").rglob("*.py"), *(ROOT / "tools").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.\d]*[sdrfx]", HOLE, node.value))
            elif isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values]
                found.append("".join(parts))
    return found


def messages() -> list[str]:
    """The messages of ours that docs/troubleshooting.md quotes, one a row."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8").partition("## DVC's own")[0]
    return re.findall(r"^\| `([^`]+)` \|", page, flags=re.MULTILINE)


def said_by(message: str, known: list[str]) -> bool:
    """Whether one of `known` is worded like `message`, with a value (or the same word) where it has a placeholder."""
    pattern, end = "", 0
    for found in PLACEHOLDER.finditer(message):
        pattern += re.escape(message[end : found.start()]) + f"(?:[^{HOLE}]*{HOLE}[^{HOLE}]*|{found[0]})"
        end = found.end()
    return any(re.search(pattern + re.escape(message[end:]), template) for template in known)


@pytest.fixture(scope="module")
def known() -> list[str]:
    return templates()


@pytest.mark.parametrize("message", messages())
def test_troubleshooting_message_stands_in_the_sources(message: str, known: list[str]) -> None:
    assert max(map(len, PLACEHOLDER.split(message))) >= 8  # enough to be told from others
    assert said_by(message, known)


def test_troubleshooting_message_that_was_reworded_is_noticed(known: list[str]) -> None:
    assert said_by("block_size=N: the SPLIT split has only N tokens", known)
    assert not said_by("block_size=N: the SPLIT split has merely N tokens", known)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The anchors that a forge makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_index_names_every_page() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    named = re.findall(r"^- \[(.+?)\]", index, flags=re.MULTILINE)
    assert sorted([*named, "README.md"]) == [page.name for page in DOCS]
