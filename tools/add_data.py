"""Write conf/data/NAME.yaml for your own file, directory or URL, based on its first records.

Command python -m tools.add_data PATH --texts COLUMN... [--title COLUMN] [--key COLUMN...] [--groups COLUMN...]

Without `--texts` (for plain text: without `--text-record`), the command shows the columns, proposes which ones to use
and writes nothing. Names of nested columns are dotted: answers.text. If a name begins with a hyphen, write
`--texts=-name`.
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
from stages.core.config import CONF, read_yaml, suggest_name, validate_values
from stages.core.errors import ConfigError, StageError, printable, printable_lines
from stages.download.files import FORMATS
from stages.download.records import BadRecordError, build_record
from stages.download.schema import Columns, SourceData
from tools.data_columns import (
    Column,
    DataPreview,
    collect_columns,
    count_keys,
    get_first_text_record,
    make_excerpt,
    preview_data,
    propose_text_record,
)
from tools.data_config import (
    TEMPLATE,
    DataChoice,
    build_configuration,
    build_option,
    check_configuration,
    format_command,
    format_path_argument,
    format_yaml_value,
    quote_hydra_value,
)

NUM_RECORDS = 1000
TITLE_NAMES = ("title", "subject", "question", "headline", "heading")
ROLE_NAMES = {"content": "role", "value": "from"}  # field with a message's text to the field with its role
MIN_KEYS = 30  # with fewer distinct keys, a split may be empty
MAX_GROUP_VALUES = 20  # distinct values of a column that is proposed as a group
MIN_RELATIVE_SCORE = 0.3  # share of the best column's score that a column needs to be proposed too
MAX_SHOWN_COLUMNS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.add_data")
    parser.add_argument("path", metavar="PATH", help="file, directory or URL, as for data.path")
    columns: dict[str, Any] = {"nargs": "+", "action": "extend", "default": [], "metavar": "COLUMN"}
    parser.add_argument("--texts", **columns, help="columns with the text, or with lists of texts")
    parser.add_argument("--title", metavar="COLUMN", help="column of the title (default: by its name; '': no title)")
    parser.add_argument(
        "--key", **columns, help="columns that decide the split: equal values are in the same split (default: title)"
    )
    parser.add_argument("--groups", **columns, help="columns by whose values metrics are also reported")
    parser.add_argument(
        "--answers-only", action="store_true", help="train only on the texts, with the title as the prompt"
    )
    parser.add_argument("--roles", metavar="COLUMN", help="column of each text's role; the texts are messages")
    parser.add_argument(
        "--text-record", choices=("file", "paragraph", "line"), help="unit of plain text that is a record"
    )
    parser.add_argument("--name", help="name of the configuration (default: from PATH)")
    parser.add_argument(
        "--records", type=int, default=NUM_RECORDS, help=f"number of records to read (default: {NUM_RECORDS:,})"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing configuration")
    try:
        add_data(parser.parse_args())
    except (OSError, ValueError) as error:
        sys.exit(printable_lines(f"add_data: {error}"))


def add_data(arguments: argparse.Namespace) -> None:
    """Read the first records, then write and check the configuration, or propose columns if none are chosen.

    Raises:
        StageError: if the data cannot be read, or the chosen columns cannot be used.
        ConfigError: if a task (for conversations: every task) cannot use the configuration. Its file is then restored
            or removed.
    """
    path = arguments.path
    check_data_path(path)
    name = make_configuration_name(arguments.name or get_source_stem(path))
    target = CONF / "data" / f"{name}.yaml"
    preview = preview_data(path, max(1, arguments.records))
    columns = {} if preview.is_plain_text else collect_columns(preview.rows)
    console = Console(highlight=False, soft_wrap=True)
    print_preview(console, path, preview, columns)
    if not (arguments.text_record if preview.is_plain_text else arguments.texts):
        print_proposal(arguments, name, preview, columns)
        return
    if target.exists() and (name == TEMPLATE or not arguments.force):
        other = "" if name == TEMPLATE else ", or --force"
        raise StageError(f"conf/data/{name}.yaml exists: choose another name with --name{other}")
    choice = choose_plain_text(arguments) if preview.is_plain_text else choose_columns(arguments, columns)
    print_first_document(preview, choice)
    for warning in find_choice_warnings(preview, choice, columns):
        print(f"Warning: {warning}")
    old_text = target.read_text(encoding="utf-8") if target.exists() else None
    write_text(target, build_configuration(path, choice))
    problems = check_configuration(name, path, choice)
    usable_tasks = [task for task in problems if not problems[task]]
    # Not all tasks can use conversations.
    if not usable_tasks or (choice.roles is None and len(usable_tasks) < len(problems)):
        target.unlink() if old_text is None else write_text(target, old_text)
        raise ConfigError(list(dict.fromkeys(problem for found in problems.values() for problem in found)))
    targets = [f"evaluate@{task}" for task in usable_tasks] if len(usable_tasks) < len(problems) else []
    for task, found in problems.items():
        if found:
            print(f"Warning: the task {task} cannot use this data: {'; '.join(found)}")
    print(f"\nWrote and checked conf/data/{name}.yaml. To run an experiment on this data:")
    values = ["-S", f"data.name={name}", "-S", f"data.path={quote_hydra_value(path)}"]
    print(f"  {format_command('dvc', 'exp', 'run', *values, *targets)}")
    print("To use this data for all experiments, set in params.yaml:")
    print(f"  data:\n    name: {name}\n    path: {format_yaml_value(path)}")


def check_data_path(path: str) -> None:
    """Raise ConfigError if `path` is not a valid data.path; called before the path is opened or printed."""
    validate_values(SourceData, {**read_yaml(CONF / "data" / f"{TEMPLATE}.yaml"), "path": path}, "data")


def get_source_stem(path: str) -> str:
    """Return the last part of a path or URL without the suffixes of its format and compression."""
    name = PurePosixPath(path.split("?")[0] if "://" in path else path).name
    known = {*FORMATS, ".gz", ".zst", ".bz2", ".xz"}
    while (suffix := PurePosixPath(name).suffix.lower()) in known:
        name = name[: -len(suffix)]
    return name


def make_configuration_name(name: str) -> str:
    """Return `name` as a valid configuration name: only letters, digits, `.`, `_` and `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "data"


# -- preview -----------------------------------------------------------------------------------------------------------


def print_preview(console: Console, path: str, preview: DataPreview, columns: dict[str, Column]) -> None:
    """Print the formats and the table of columns."""
    formats = ", ".join(f"{count} {name}" for name, count in preview.formats.items())
    unit = "lines" if preview.is_plain_text else "records"
    files = "file" if preview.num_files == 1 else "files"
    print(f"{printable(path)}: {formats} {files}; read {len(preview.rows):,} {unit}")
    if preview.num_bad_records:
        print(f"{preview.num_bad_records:,} other records cannot be read; the first: {preview.first_bad_record}")
    if columns:
        console.print(make_columns_table(list(columns.values()), len(preview.rows)), soft_wrap=False)
    if len(columns) > MAX_SHOWN_COLUMNS:
        print(f"... and {len(columns) - MAX_SHOWN_COLUMNS:,} more columns")


def make_columns_table(columns: Sequence[Column], num_records: int) -> Table:
    """Return a table with one row per column: its kinds of values, their counts, mean length and an example."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("column", "holds"):
        table.add_column(heading, overflow="fold")
    for heading in ("empty", "different", "characters"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("example", overflow="fold")
    for column in columns[:MAX_SHOWN_COLUMNS]:
        kinds = ", ".join(kind for kind, _ in column.kinds.most_common()) or "nothing"
        length = f"{column.mean_characters:,.0f}" if column.num_characters else ""
        counts = f"{num_records - column.num_filled:,}", f"{len(column.values):,}", length
        table.add_row(*map(Text, (printable(column.name, 60), kinds, *counts, column.example)))
    return table


def print_first_document(preview: DataPreview, choice: DataChoice) -> None:
    """Print how many of the preview's records have text, and the first document."""
    if preview.is_plain_text:
        documents = [get_first_text_record(preview, choice.text_record)]
    else:
        chosen = {"title": choice.title, "texts": choice.texts, "roles": choice.roles}
        columns = validate_values(Columns, chosen, "data")
        documents = [text for row in preview.rows if (text := build_document_text(row.value, columns))]
        print(f"Records with text: {len(documents):,} of {len(preview.rows):,} read")
    if documents:
        print(f"The first document: {make_excerpt(documents[0], 300)}")


def build_document_text(row: Any, columns: Columns) -> str:
    """Return the flattened text of a record; the empty string if it has none or is malformed."""
    try:
        record, _ = build_record(row, columns)
    except BadRecordError:
        return ""
    return " ".join(record["answers"]["text"])


# -- columns -----------------------------------------------------------------------------------------------------------


def print_proposal(arguments: argparse.Namespace, name: str, preview: DataPreview, columns: dict[str, Column]) -> None:
    """Print which columns to use, and the command that writes the configuration."""
    command = ["python", "-m", "tools.add_data", format_path_argument(arguments.path)]
    if preview.is_plain_text:
        record, reason = propose_text_record(preview)
        print(f"Proposal: one record per {record}, because {reason}.")
        print(f"The first: {make_excerpt(get_first_text_record(preview, record), 300)}")
        command += ["--text-record", record]
    elif has_eli5_columns(columns):
        print("These are ELI5's columns. conf/data/files.yaml reads them, so there is nothing to choose.")
        values = ["-S", "data.name=files", "-S", f"data.path={quote_hydra_value(arguments.path)}"]
        print(f"To run an experiment on this data:\n  {format_command('dvc', 'exp', 'run', *values)}")
        print("To set --key or --groups, write a separate configuration.")
        command += ["--texts", "answers.text"]
    else:
        ranked = rank_text_columns(columns)
        if not ranked:
            raise StageError("no column has text: use a file with text, or choose a column with --texts")
        texts = [
            column.name
            for column in ranked
            if score_text_column(column) >= MIN_RELATIVE_SCORE * score_text_column(ranked[0])
        ]
        print("Columns with text, ranked by length and share of distinct values:")
        for column in ranked[:10]:
            mark = "*" if column.name in texts else " "
            shown = f"{column.mean_characters:,.0f} characters, {column.distinct_share:.0%} distinct"
            print(f"  {mark} {printable(column.name, 60)}: {shown}")
        for hint in suggest_keys_and_groups(columns, texts, len(preview.rows)):
            print(hint)
        if (roles := guess_roles(columns, ranked)) is not None:
            print(f"Messages of conversations: {roles[0]}, written by {roles[1]}")
            command += [*build_option("--texts", [roles[0]]), *build_option("--roles", [roles[1]])]
        else:
            command += [*build_option("--texts", texts), *build_title_option(columns, texts)]
    name_option = ["--name", name] if arguments.name else []
    print(f"\nTo write conf/data/{name}.yaml:\n  {format_command(*command, *name_option)}")


def has_eli5_columns(columns: dict[str, Column]) -> bool:
    """Return True if the columns are those of ELI5, which the template reads."""
    return all(
        name in columns and columns[name].is_text and columns[name].num_filled for name in ("title", "answers.text")
    )


def rank_text_columns(columns: dict[str, Column]) -> list[Column]:
    """Return the columns with text, best candidate first."""
    return sorted(filter(lambda column: column.is_prose, columns.values()), key=score_text_column, reverse=True)


def score_text_column(column: Column) -> float:
    """Return a score for how likely a column is the text to train on: long texts, distinct in each record."""
    return column.mean_characters * column.distinct_share


def suggest_keys_and_groups(columns: dict[str, Column], texts: list[str], num_records: int) -> Iterator[str]:
    """Yield lines about columns that could be the key of the split or a group."""
    others = [column for column in columns.values() if column.name not in texts and column.is_scalar]
    for column in others:
        num_values, name = len(column.values), printable(column.name, 60)
        if MIN_KEYS <= num_values <= 0.7 * column.num_filled and column.num_filled > num_records / 2:
            per_value = column.num_filled / num_values
            yield f"Possible --key: {name}, {num_values:,} values, each in {per_value:.1f} records"
        elif 1 < num_values <= min(MAX_GROUP_VALUES, column.num_filled // 2):
            yield f"Possible --groups: {name}, {num_values} values"


def build_title_option(columns: dict[str, Column], texts: list[str]) -> list[str]:
    return [] if (title := guess_title(columns, texts)) is None else build_option("--title", [title])


def guess_roles(columns: dict[str, Column], ranked: Sequence[Column]) -> tuple[str, str] | None:
    """Return the columns of messages and of their roles if their names are those of a common conversation format."""
    for column in ranked:
        parent, _, name = column.name.rpartition(".")
        role = f"{parent}.{ROLE_NAMES[name]}" if parent and name in ROLE_NAMES else ""
        if role in columns and column.has_only_kinds("list of texts") and columns[role].has_only_kinds("list of texts"):
            return column.name, role
    return None


def guess_title(columns: dict[str, Column], texts: list[str]) -> str | None:
    """Return the first column with text that has a typical name of a title; None if there is none."""
    for column in columns.values():
        last_name = column.name.rpartition(".")[2].lower()
        if last_name in TITLE_NAMES and column.name not in texts and column.is_scalar and column.is_prose:
            return column.name
    return None


def choose_plain_text(arguments: argparse.Namespace) -> DataChoice:
    """Return the choice for plain text.

    Raises:
        StageError: if the arguments name columns, which plain text does not have.
    """
    names = ("texts", "title", "key", "groups", "roles", "answers_only")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
    if given:
        raise StageError(f"plain text has no columns: omit {' and '.join(given)}")
    return DataChoice(["answers.text"], "title", [], [], arguments.text_record)


def choose_columns(arguments: argparse.Namespace, columns: dict[str, Column]) -> DataChoice:
    """Return the columns that the arguments name, with the guessed title unless --title is given.

    Raises:
        StageError: with all columns that do not exist or have the wrong kind of values.
    """
    if arguments.text_record:
        raise StageError("--text-record is for plain text: these records have columns")
    texts = list(dict.fromkeys(arguments.texts))
    title = guess_title(columns, texts) if arguments.title is None else arguments.title or None
    problems = [problem for name in texts for problem in find_column_problems("texts", name, columns)]
    for option, names in (
        ("title", [] if title is None else [title]),
        ("key", arguments.key),
        ("groups", arguments.groups),
    ):
        problems += [problem for name in names for problem in find_column_problems(option, name, columns)]
    if arguments.roles is not None:
        problems += find_column_problems("roles", arguments.roles, columns)
        if len(texts) > 1:
            problems.append(f"--roles {printable(arguments.roles)}: give one column of messages to --texts")
        if arguments.answers_only:
            problems.append("--answers-only: in conversations, only the assistant's messages count: omit the option")
    elif arguments.answers_only and title is None:
        problems.append("--answers-only: the title is the prompt: name its column with --title")
    if "title" in arguments.key and title != "title":
        problems.append("--key title: in split.key, `title` means the record's title: also use --title title")
    if problems:
        raise StageError("\n  ".join(["columns that cannot be used:", *dict.fromkeys(problems)]))
    key, groups = list(dict.fromkeys(arguments.key)), list(dict.fromkeys(arguments.groups))
    return DataChoice(texts, title, key, groups, "file", arguments.roles, arguments.answers_only)


def find_column_problems(option: str, name: str, columns: dict[str, Column]) -> Iterator[str]:
    """Yield the reason why the column `name` cannot be used for `--option`, if there is one."""
    shown = f"--{option} {printable(repr(name))}"
    if "${" in name:
        yield f"{shown}: a configuration cannot contain ${{: rename the column"
    elif name not in columns:
        nested = [other for other in columns if other.startswith(f"{name}.")]
        if nested:
            yield f"{shown}: has nested fields: {printable(', '.join(nested[:12]))}"
        else:
            yield f"{shown}: no such column; {printable(suggest_name(name, list(columns)))}"
    else:
        column = columns[name]
        kinds = ", ".join(column.kinds)
        if option in ("texts", "roles") and not column.is_text:
            yield f"{shown}: contains {kinds}, not text"
        elif option == "title" and not (column.is_text and column.is_scalar):
            yield f"{shown}: contains {kinds}, not one text per record"
        elif not column.is_scalar and option in ("key", "groups"):
            yield f"{shown}: contains {kinds}, not one value per record"


def find_choice_warnings(preview: DataPreview, choice: DataChoice, columns: dict[str, Column]) -> Iterator[str]:
    """Yield warnings about valid choices that may be mistakes."""
    if preview.is_plain_text:
        proposed, reason = propose_text_record(preview)
        if choice.text_record == "file" != proposed:
            yield f"with one record per file, a split may be empty: {reason}"
        return
    for name in [*choice.texts, *choice.key, *choice.groups]:
        if not columns[name].num_filled:
            yield f"column {printable(repr(name))} is empty in all {len(preview.rows):,} records read"
    for name in choice.texts:
        if columns[name].num_filled and not columns[name].is_prose:
            yield f"column {printable(repr(name))} contains only numbers"
    key = choice.key or ([] if choice.title is None else [choice.title])
    if key and (num_values := count_keys(preview.rows, key)) < min(MIN_KEYS, len(preview.rows)):
        shown = printable(", ".join(key))
        yield (
            f"{shown} decides the split and has only {num_values} distinct values in {len(preview.rows):,} records: a"
            " split may be empty or have a very different share than conf/data sets (--key chooses another column)"
        )


if __name__ == "__main__":
    main()
