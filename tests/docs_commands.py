"""Commands in the documentation, and checks of them that do not run them.

A command is a line of a ```console fence that begins with `$ ` (`\\` continues it, `# ...` ends it), or a whole
```python fence. A command in a sentence is a span between backticks that begins with a program.
"""

import contextlib
import io
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from dvc.cli.parser import get_main_parser
from dvc_project import ROOT

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{file.name}" for file in sorted((ROOT / "docs").glob("*.md")))]
PROGRAMS = (
    "cd",
    "cp",
    "dvc",
    "export",
    "git",
    "make",
    "mkdir",
    "mutmut",
    "pre-commit",
    "python",
    "ray",
    "source",
    "timeout",
    "uv",
)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)
# Key of params.yaml to the group in conf/ that it chooses from.
GROUPS = {
    "data.name": "data",
    "hardware": "hardware",
    "framework": "framework",
    "tasks.TASK.model": "model",
    "tasks.TASK.adapter": "adapter",
}
OWN_DIRECTORIES = (
    "benchmarks",
    "conf",
    "docs",
    "ladders",
    "presets",
    "stages",
    "tests",
    "tools",
)  # directories with no file outside git


class Command(NamedTuple):
    """A command of a page."""

    page: str
    section: int
    """Headings of second level above it."""
    line: int
    language: str
    """console or python."""
    text: str
    """Text of the command, without the prompt."""
    answered: bool
    """The page shows output below it."""

    @property
    def name(self) -> str:
        """Name in the tables of test_docs_commands.py: the first line, without comment."""
        return strip_comment(self.text.split("\n")[0]) if self.language == "console" else self.text.split("\n")[0]


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def parse_commands(page: str, text: str) -> Iterator[Command]:
    """The commands in the fences of `text`, in order."""
    for fence in FENCE.finditer(text):
        first = text.count("\n", 0, fence.start()) + 2
        section = text.count("\n## ", 0, fence.start())
        content = textwrap.dedent(fence[3])
        if fence[2] == "python":
            yield Command(page, section, first, "python", content, answered=False)
        if fence[2] == "console":
            yield from parse_console(page, section, first, content.split("\n"))


def parse_console(page: str, section: int, first: int, lines: list[str]) -> Iterator[Command]:
    """The commands of a console's lines, of which the first is line `first` of the page."""
    number = 0
    while number < len(lines):
        start = number
        number += 1
        if not lines[start].startswith("$ "):
            continue
        while lines[number - 1].endswith("\\"):
            number += 1
        text = "\n".join(lines[start:number]).removeprefix("$ ")
        answered = number < len(lines) and lines[number].strip() != "" and not lines[number].startswith("$")
        yield Command(page, section, first + start, "console", text, answered)


def strip_comment(text: str) -> str:
    """A command's text up to a `#` that begins a word outside quotes."""
    match = re.match(r"""(?:[^\s'"]+|'[^']*'|"(?:[^"\\]|\\.)*"|\s+(?!#))*""", text, flags=re.DOTALL)
    assert match is not None
    return match[0].strip()


def find_code_spans(text: str) -> Iterator[str]:
    """Yield the text between single backticks outside fences, each on one line."""
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", FENCE.sub("", text)):
        yield " ".join(match[1].split())


def split_words(text: str) -> list[list[str]]:
    """The words of each program that a command line starts; assignments before it and redirections are left out.

    Raises:
        ValueError: if a quote is not closed.
    """
    lexer = shlex.shlex(strip_comment(text.replace("\\\n", " ")), posix=True, punctuation_chars="&|;()<>")
    lexer.whitespace_split = True
    lexer.commenters = ""
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;()"):
            found.append([])
        elif found[-1] or not re.match(r"\w+=", word):
            found[-1].append(word)
    return [words[: words.index(">")] if ">" in words else words for words in found if words]


def find_problems(text: str, made: str = "") -> Iterator[str]:
    """Yield the problems of a command line: unknown programs, modules, files, targets and options.

    `made` is the text of the page before the command; it may say how to create a file of conf/.
    """
    for program, *rest in split_words(text):
        if program not in PROGRAMS:
            yield f"{program} is no known program"
        if program == "python":
            yield from find_missing_modules(rest)
        if program == "make":
            wanted = [word for word in rest if not word.startswith("-") and "=" not in word]  # no option, no variable
            yield from (f"no target {word}" for word in wanted if word not in read_make_targets())
        if program == "dvc":
            yield from find_wrong_options(rest)
        for word in rest[:-1] if program == "cp" else rest:
            yield from (
                f"no file {name}" for name in find_file_names(word) if not path_exists(name) and not is_made(name, made)
            )


def is_made(name: str, text: str) -> bool:
    """Return True if `text` says how to create a file of conf/: by its path, or by --name of tools.pin_model."""
    return name in text or re.search(rf"--name {Path(name).stem}\b", text) is not None


def find_missing_modules(words: list[str]) -> Iterator[str]:
    """`python -m MODULE` or `python FILE` of the project's that is not there."""
    if words[:1] == ["-m"] and words[1].split(".")[0] in OWN_DIRECTORIES:
        path = words[1].replace(".", "/")
        if not path_exists(f"{path}.py") and not path_exists(f"{path}/__main__.py"):
            yield f"no module {words[1]}"
    if words and words[0].endswith(".py") and not path_exists(words[0]):
        yield f"no file {words[0]}"


def read_make_targets() -> set[str]:
    """Return the targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", read_page("Makefile"), flags=re.MULTILINE))


def find_wrong_options(words: list[str]) -> Iterator[str]:
    """Yield errors of DVC's argument parser, and settings (`-S`) of unknown keys."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            # A single word may be a group of commands (`dvc plots`).
            arguments = get_main_parser().parse_args(words if len(words) > 1 else [*words, "--help"])
        except SystemExit as end:
            if end.code:
                yield f"dvc {' '.join(words)}: {said.getvalue().strip()}"
            return
        except Exception as error:  # DVC's own, on an unknown option
            yield f"dvc {' '.join(words)}: {error}{said.getvalue()}"
            return
    for setting in getattr(arguments, "set_param", None) or []:
        file, colon, assignment = setting.rpartition(":") if ":" in setting.partition("=")[0] else ("", "", setting)
        key = assignment.partition("=")[0].removeprefix("~")
        if not key.startswith("+") and path_exists(file or "params.yaml") and not has_key(file or "params.yaml", key):
            yield f"{file}{colon}{key}: no such key"


def has_key(file: str, dotted: str) -> bool:
    """Return True if a YAML file of the project has a key; any key is allowed below an empty or null one."""
    value = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    for key in dotted.split("."):
        if not isinstance(value, dict) or key not in value:
            return not value
        value = value[key]
    return True


def find_file_names(word: str) -> Iterator[str]:
    """Files of the project that a word of a command names, a choice among those of conf/ included."""
    yield from re.findall(rf"(?:^|[=:'\"])((?:{'|'.join(OWN_DIRECTORIES)})/[\w./-]+\w)", word)
    if match := re.fullmatch(r"([a-z]+(?:\.[a-z]+)*)=([\w.,-]+)", word):
        key = re.sub(r"^tasks\.\w+\.", "tasks.TASK.", match[1])
        if group := GROUPS.get(key):
            yield from (f"conf/{group}/{choice}.yaml" for choice in match[2].split(","))


def path_exists(name: str) -> bool:
    """Return True if a path exists; a word in capitals (TASK, NAME) matches any name."""
    return (ROOT / name).exists() or any(ROOT.glob(re.sub(r"\b[A-Z]{3,}\b", "*", name)))
