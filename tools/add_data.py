"""Write conf/data/NAME.yaml for a file, directory or URL of your own, after a look at its first records.

Command python -m tools.add_data PATH --texts COLUMN... [--title COLUMN] [--key COLUMN...] [--groups COLUMN...]

Without `--texts` (for plain text: without `--text-record`) it shows the columns, proposes which to use and writes
nothing. Names of nested columns are dotted: answers.text. A column whose name begins with a hyphen: `--texts=-name`.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stages.core.artifacts import write_text
from stages.core.config import CONF, nearest, read_yaml, validate
from stages.core.errors import ConfigError, StageError, printable, printable_lines
from stages.download.files import FORMATS
from stages.download.records import BadRecordError, to_record
from stages.download.schema import Columns, SourceData
from tools.data_columns import (
    Column,
    Look,
    columns_of,
    excerpt,
    look_at,
    num_keys,
    propose_text_record,
    text_excerpt,
)
from tools.data_config import (
    TEMPLATE,
    Choice,
    check,
    command,
    configuration,
    hydra_value,
    options,
    shell_path,
    yaml_value,
)

NUM_RECORDS = 1000
TITLE_NAMES = ("title", "subject", "question", "headline", "heading")
ROLE_NAMES = {"content": "role", "value": "from"}  # of the text of a message, and of who wrote it
FEW_KEYS = 30  # different keys, with fewer of which a split may stay empty
FEW_GROUPS = 20  # values of a column that is proposed as a group
SIMILAR_LENGTH = 0.3  # of the best column's score: others that are proposed with it
_SHOWN = 40  # columns in the table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.add_data")
    parser.add_argument("path", metavar="PATH", help="file, directory or URL, as for data.path")
    columns: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "COLUMN"}
    parser.add_argument("--texts", **columns, help="columns that hold the text, or lists of texts")
    parser.add_argument("--title", metavar="COLUMN", help="column of the title (default: one called so; '': none)")
    parser.add_argument("--key", **columns, help="columns whose values stay in one split (default: the title)")
    parser.add_argument("--groups", **columns, help="columns by whose values figures are reported as well")
    parser.add_argument("--answers-only", action="store_true", help="train on the texts, given the title as a prompt")
    parser.add_argument("--roles", metavar="COLUMN", help="column of who wrote each text: texts are messages")
    parser.add_argument("--text-record", choices=("file", "paragraph", "line"), help="what a record of plain text is")
    parser.add_argument("--name", help="name of the configuration (default: the file's)")
    parser.add_argument("--records", type=int, default=NUM_RECORDS, help=f"records to look at ({NUM_RECORDS:,})")
    parser.add_argument("--force", action="store_true", help="overwrite an existing configuration")
    try:
        add_data(parser.parse_args())
    except (OSError, ValueError) as error:
        sys.exit(printable_lines(f"add_data: {error}"))


def add_data(arguments: argparse.Namespace) -> None:
    """Look at the data, then write and check its configuration, or propose one.

    Raises:
        StageError: if the data cannot be read, or the columns chosen are not there.
    """
    path = arguments.path
    check_path(path)
    name = slug(arguments.name or stem(path))
    target = CONF / "data" / f"{name}.yaml"
    look = look_at(path, max(1, arguments.records))
    columns = {} if look.is_plain_text else columns_of(look.rows)
    console = Console(highlight=False, soft_wrap=True)
    show_look(console, path, look, columns)
    if not (arguments.text_record if look.is_plain_text else arguments.texts):
        propose(arguments, name, look, columns)
        return
    if target.exists() and (name == TEMPLATE or not arguments.force):
        other = "" if name == TEMPLATE else ", or --force"
        raise StageError(f"conf/data/{name}.yaml exists: choose another name with --name{other}")
    choice = choose_plain_text(arguments) if look.is_plain_text else choose_columns(arguments, columns)
    show_documents(look, choice)
    for warning in warnings_of(look, choice, columns):
        print(f"Warning: {warning}")
    before = target.read_text(encoding="utf-8") if target.exists() else None
    write_text(target, configuration(path, choice))
    problems = check(name, path, choice)
    can_use = [task for task in problems if not problems[task]]
    # Conversations are not for all tasks.
    if not can_use or (choice.roles is None and len(can_use) < len(problems)):
        target.unlink() if before is None else write_text(target, before)
        raise ConfigError(list(dict.fromkeys(problem for found in problems.values() for problem in found)))
    targets = [f"evaluate@{task}" for task in can_use] if len(can_use) < len(problems) else []
    for task, found in problems.items():
        if found:
            print(f"Warning: the task {task} cannot use this data: {'; '.join(found)}")
    print(f"\nWrote conf/data/{name}.yaml, and checked it. Next, an experiment on this data:")
    values = ["-S", f"data.name={name}", "-S", f"data.path={hydra_value(path)}"]
    print(f"  {command('dvc', 'exp', 'run', *values, *targets)}")
    print("To keep it as the data of all experiments, set in params.yaml:")
    print(f"  data:\n    name: {name}\n    path: {yaml_value(path)}")


def check_path(path: str) -> None:
    """Raise ConfigError if `path` cannot be data.path, before anything is opened or shown."""
    validate(SourceData, {**read_yaml(CONF / "data" / f"{TEMPLATE}.yaml"), "path": path}, "data")


def stem(path: str) -> str:
    """The name of the file, directory or URL `path` without what says its format."""
    name = PurePosixPath(path.split("?")[0] if "://" in path else path).name
    known = {*FORMATS, ".gz", ".zst", ".bz2", ".xz"}
    while (suffix := PurePosixPath(name).suffix.lower()) in known:
        name = name[: -len(suffix)]
    return name


def slug(name: str) -> str:
    """`name` as the name of a configuration: letters, digits, dots, _ and - only."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "data"


# -- what is there -----------------------------------------------------------------------------------------------------


def show_look(console: Console, path: str, look: Look, columns: dict[str, Column]) -> None:
    """Print format, columns and examples."""
    formats = ", ".join(f"{count} {name}" for name, count in look.formats.items())
    what = "lines" if look.is_plain_text else "records"
    files = "file" if look.num_files == 1 else "files"
    print(f"{printable(path)}: {formats} {files}; looked at {len(look.rows):,} {what}")
    if look.num_bad:
        print(f"{look.num_bad:,} more cannot be read; the first: {look.first_bad}")
    if columns:
        console.print(make_table(list(columns.values()), len(look.rows)), soft_wrap=False)
    if len(columns) > _SHOWN:
        print(f"... and {len(columns) - _SHOWN:,} more columns")


def make_table(columns: Sequence[Column], num_records: int) -> Table:
    """A row for each column: its kinds of value, how often it is empty, how much text and an example."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("column", "holds"):
        table.add_column(heading, overflow="fold")
    for heading in ("empty", "different", "characters"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("example", overflow="fold")
    for column in columns[:_SHOWN]:
        kinds = ", ".join(kind for kind, _ in column.kinds.most_common()) or "nothing"
        length = f"{column.mean_characters:,.0f}" if column.num_characters else ""
        counts = f"{num_records - column.num_filled:,}", f"{len(column.values):,}", length
        table.add_row(*map(Text, (printable(column.name, 60), kinds, *counts, column.example)))
    return table


def show_documents(look: Look, choice: Choice) -> None:
    """Print how many of the records looked at give a document, and the first."""
    if look.is_plain_text:
        documents = [text_excerpt(look, choice.text_record)]
    else:
        chosen = {"title": choice.title, "texts": choice.texts, "roles": choice.roles}
        columns = validate(Columns, chosen, "data")
        documents = [text for row in look.rows if (text := document_of(row.value, columns))]
        print(f"Records with text: {len(documents):,} of {len(look.rows):,} looked at")
    if documents:
        print(f"The first document: {excerpt(documents[0], 300)}")


def document_of(row: Any, columns: Columns) -> str:
    """The flattened text of a record; the empty string where it has none or is malformed."""
    try:
        record, _ = to_record(row, columns)
    except BadRecordError:
        return ""
    return " ".join(record["answers"]["text"])


# -- what to use of it -------------------------------------------------------------------------------------------------


def propose(arguments: argparse.Namespace, name: str, look: Look, columns: dict[str, Column]) -> None:
    """Print what to use of the data, ending with the command that writes its configuration."""
    words = ["python", "-m", "tools.add_data", shell_path(arguments.path)]
    if look.is_plain_text:
        record, reason = propose_text_record(look)
        print(f"Proposal: each {record} a record, since {reason}.")
        print(f"The first: {excerpt(text_excerpt(look, record), 300)}")
        words += ["--text-record", record]
    elif is_eli5(columns):
        print("These are ELI5's columns, which conf/data/files.yaml reads as they are: there is nothing to choose.")
        path = f"data.path={hydra_value(arguments.path)}"
        print(
            f"Next, an experiment on this data:\n  {command('dvc', 'exp', 'run', '-S', 'data.name=files', '-S', path)}"
        )
        print("A configuration of its own can have a --key and --groups as well.")
        words += ["--texts", "answers.text"]
    else:
        ranked = rank_texts(columns)
        if not ranked:
            raise StageError("no column holds text: name a file with text, or give the column that --texts should take")
        texts = [column.name for column in ranked if score(column) >= SIMILAR_LENGTH * score(ranked[0])]
        print("Columns with text, by length and share of different values:")
        for column in ranked[:10]:
            mark = "*" if column.name in texts else " "
            shown = f"{column.mean_characters:,.0f} characters, {column.distinct:.0%} different"
            print(f"  {mark} {printable(column.name, 60)}: {shown}")
        for hint in hints(columns, texts, len(look.rows)):
            print(hint)
        if (roles := guess_roles(columns, ranked)) is not None:
            print(f"Messages of conversations: {roles[0]}, written by {roles[1]}")
            words += [*options("--texts", [roles[0]]), *options("--roles", [roles[1]])]
        else:
            words += [*options("--texts", texts), *title_option(columns, texts)]
    name_option = ["--name", name] if arguments.name else []
    print(f"\nTo write conf/data/{name}.yaml:\n  {command(*words, *name_option)}")


def is_eli5(columns: dict[str, Column]) -> bool:
    """Whether the records are in the schema that the template reads."""
    return all(
        name in columns and columns[name].is_text and columns[name].num_filled for name in ("title", "answers.text")
    )


def rank_texts(columns: dict[str, Column]) -> list[Column]:
    """The columns that hold text, the likeliest first."""
    return sorted(filter(lambda column: column.is_prose, columns.values()), key=score, reverse=True)


def score(column: Column) -> float:
    """How much a column looks like the text to train on: long, and different in each record."""
    return column.mean_characters * column.distinct


def hints(columns: dict[str, Column], texts: list[str], num_records: int) -> Iterator[str]:
    """Lines on columns that could be the key of the split or a group."""
    others = [column for column in columns.values() if column.name not in texts and column.is_scalar]
    for column in others:
        num_values, name = len(column.values), printable(column.name, 60)
        if FEW_KEYS <= num_values <= 0.7 * column.num_filled and column.num_filled > num_records / 2:
            per_value = column.num_filled / num_values
            yield f"Possible --key: {name}, {num_values:,} values, each in {per_value:.1f} records"
        elif 1 < num_values <= min(FEW_GROUPS, column.num_filled // 2):
            yield f"Possible --groups: {name}, {num_values} values"


def title_option(columns: dict[str, Column], texts: list[str]) -> list[str]:
    return [] if (title := guess_title(columns, texts)) is None else options("--title", [title])


def guess_roles(columns: dict[str, Column], ranked: Sequence[Column]) -> tuple[str, str] | None:
    """The columns of messages and of who wrote them, if they are called as in a common format of conversations."""
    for column in ranked:
        parent, _, name = column.name.rpartition(".")
        role = f"{parent}.{ROLE_NAMES[name]}" if parent and name in ROLE_NAMES else ""
        if role in columns and column.holds("list of texts") and columns[role].holds("list of texts"):
            return column.name, role
    return None


def guess_title(columns: dict[str, Column], texts: list[str]) -> str | None:
    """The column that is called as titles are, if there is one with text in most records."""
    for column in columns.values():
        called = column.name.rpartition(".")[2].lower()
        if called in TITLE_NAMES and column.name not in texts and column.is_scalar and column.is_prose:
            return column.name
    return None


def choose_plain_text(arguments: argparse.Namespace) -> Choice:
    """The choice for plain text, which has no columns."""
    names = ("texts", "title", "key", "groups", "roles", "answers_only")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
    if given:
        raise StageError(f"plain text has no columns: leave out {' and '.join(given)}")
    return Choice(["answers.text"], "title", [], [], arguments.text_record)


def choose_columns(arguments: argparse.Namespace, columns: dict[str, Column]) -> Choice:
    """The columns that are asked for.

    Raises:
        StageError: naming all columns that are not there or do not hold what they should.
    """
    if arguments.text_record:
        raise StageError("--text-record is for plain text: these records have columns")
    texts = list(dict.fromkeys(arguments.texts))
    title = guess_title(columns, texts) if arguments.title is None else arguments.title or None
    problems = [problem for name in texts for problem in wrong_column("texts", name, columns)]
    for option, names in (
        ("title", [] if title is None else [title]),
        ("key", arguments.key),
        ("groups", arguments.groups),
    ):
        problems += [problem for name in names for problem in wrong_column(option, name, columns)]
    if arguments.roles is not None:
        problems += wrong_column("roles", arguments.roles, columns)
        if len(texts) > 1:
            problems.append(f"--roles {printable(arguments.roles)}: give one column of messages to --texts")
        if arguments.answers_only:
            problems.append("--answers-only: what the assistant says in a conversation counts anyway: leave it out")
    elif arguments.answers_only and title is None:
        problems.append("--answers-only: the title is the prompt: name its column with --title")
    if "title" in arguments.key and title != "title":
        problems.append("--key title: in split.key this word means the record's title: use --title title as well")
    if problems:
        raise StageError("\n  ".join(["columns that cannot be used:", *dict.fromkeys(problems)]))
    key, groups = list(dict.fromkeys(arguments.key)), list(dict.fromkeys(arguments.groups))
    return Choice(texts, title, key, groups, "file", arguments.roles, arguments.answers_only)


def wrong_column(option: str, name: str, columns: dict[str, Column]) -> Iterator[str]:
    """What keeps the column `name` from being used for `--option`, if anything does."""
    shown = f"--{option} {printable(repr(name))}"
    if "${" in name:
        yield f"{shown}: a configuration cannot hold ${{: rename the column"
    elif name not in columns:
        nested = [other for other in columns if other.startswith(f"{name}.")]
        if nested:
            yield f"{shown}: holds nested fields: {printable(', '.join(nested[:12]))}"
        else:
            yield f"{shown}: no such column; {printable(nearest(name, list(columns)))}"
    else:
        column = columns[name]
        kinds = ", ".join(column.kinds)
        if option in ("texts", "roles") and not column.is_text:
            yield f"{shown}: holds {kinds}, not text"
        elif option == "title" and not (column.is_text and column.is_scalar):
            yield f"{shown}: holds {kinds}, not one text"
        elif not column.is_scalar and option in ("key", "groups"):
            yield f"{shown}: holds {kinds}, not one value a record"


def warnings_of(look: Look, choice: Choice, columns: dict[str, Column]) -> Iterator[str]:
    """What is possible, but may not be meant."""
    if look.is_plain_text:
        proposed, reason = propose_text_record(look)
        if choice.text_record == "file" != proposed:
            yield f"one record a file may leave a split empty: {reason}"
        return
    for name in [*choice.texts, *choice.key, *choice.groups]:
        if not columns[name].num_filled:
            yield f"column {printable(repr(name))} is empty in all {len(look.rows):,} records looked at"
    for name in choice.texts:
        if columns[name].num_filled and not columns[name].is_prose:
            yield f"column {printable(repr(name))} holds numbers only"
    key = choice.key or ([] if choice.title is None else [choice.title])
    if key and (num_values := num_keys(look.rows, key)) < min(FEW_KEYS, len(look.rows)):
        shown = printable(", ".join(key))
        yield (
            f"{shown} decides the split and has only {num_values} different values in {len(look.rows):,} records: a"
            " split may stay empty, or its share be far from what conf/data asks (--key chooses another column)"
        )


if __name__ == "__main__":
    main()
