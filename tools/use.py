"""Write a preset of presets/ to params.yaml, and show the difference.

Command python -m tools.use [NAME] [--path PATH] [--dry-run] [--force]

Without NAME, list the presets. A preset sets values of params.yaml and, in a section with the name of a file of conf/
(conf/GROUP/NAME.yaml), values of that file. All other values stay. If the result does not pass `make check`, the files
are restored.
"""

import argparse
import difflib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml

from stages.core.artifacts import write_text
from stages.core.compose import find_forbidden_values
from stages.core.config import CONF, list_configurations, read_yaml, suggest_name
from stages.core.errors import ConfigError, StageError, escape_controls, printable, printable_lines
from tools.yaml_edit import edit_yaml, find_path_value, list_leaves

ROOT = CONF.parent
PARAMS = "params.yaml"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_FILE = re.compile(r"conf/[a-z_]+/[A-Za-z0-9_-][A-Za-z0-9._-]*\.yaml")


class Preset(NamedTuple):
    """Content of a file of presets/."""

    name: str
    head: list[str]
    """Lines of the comment at its top."""
    files: dict[str, dict[str, Any]]
    """Nested values to set, by file of the repository."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.use")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the preset (default: list them)")
    parser.add_argument("--path", help="your own file, directory or URL, for a preset that reads one")
    parser.add_argument("--dry-run", action="store_true", help="show the difference without writing it")
    parser.add_argument("--force", action="store_true", help="overwrite uncommitted edits")
    arguments = parser.parse_args()
    try:
        if arguments.name is None:
            print_presets()
        else:
            apply_preset(arguments.name, arguments.path, arguments.dry_run, arguments.force)
    except (OSError, ValueError) as error:
        sys.exit(printable_lines(f"use: {error}"))


def print_presets() -> None:
    """Print name and first line of each preset."""
    names = list_presets()
    width = max(map(len, names), default=0)
    for name in names:
        try:
            line = printable(read_preset(name).head[0])
        except ConfigError as error:  # an invalid preset; the others are still listed
            line = f"(invalid: {printable(error.problems[0])})"
        print(f"{name.ljust(width)}  {line}")
    print("\nTo see the changes that a preset makes: python -m tools.use NAME --dry-run")


def apply_preset(name: str, path: str | None, dry_run: bool, force: bool) -> None:
    """Set the values of a preset in params.yaml and conf/.

    Raises:
        StageError: if the preset is invalid, uncommitted edits would be lost, or the result does not pass the check.
    """
    preset = read_preset(name)
    if path is not None:
        set_data_path(preset, path)
    before, after = edit_files(preset)
    print(printable_lines("\n".join(preset.head)), end="\n\n")
    if not after:
        print(f"{' and '.join(preset.files)}: nothing changes")
    for file, text in after.items():
        print(format_diff(file, before[file], text))
    if after and not dry_run:
        if not force:
            refuse_uncommitted(list(after))
        write_checked(before, after, needs_path=path is None and reads_user_files(preset))
        print(f"Wrote {' and '.join(after)}.")
    if not dry_run:
        print_next_steps(preset)


def list_presets() -> list[str]:
    """List the names of the presets."""
    return sorted(file.stem for file in (ROOT / "presets").glob("*.yaml") if _NAME.fullmatch(file.stem))


def read_preset(name: str) -> Preset:
    """Read the preset `name`.

    Raises:
        ConfigError: if it does not exist, or sets a value that cannot be set.
    """
    names = list_presets()
    if name not in names:
        suggestion = suggest_name(name, names)
        all_names = "" if suggestion.startswith("there are") else f"; there are {', '.join(names)}"
        raise ConfigError([f"{printable(repr(name))} is not a preset: {suggestion}{all_names}"])
    file, where = ROOT / "presets" / f"{name}.yaml", f"presets/{name}.yaml"
    values = read_yaml(file)
    head = re.match(r"(#.*\n)+", file.read_text(encoding="utf-8").replace("\r\n", "\n"))
    if head is None:
        raise ConfigError([f"{where}: its first line should be a comment that states its purpose"])
    files = {key: values.pop(key) for key in list(values) if key.endswith(".yaml") and key != PARAMS}
    files = {**({PARAMS: values} if values else {}), **files}
    if problems := list(find_file_problems(files)):
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    return Preset(name, [line.lstrip("# ") for line in head[0].splitlines()], files)


def find_file_problems(files: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of a preset's files: unknown files, unknown keys and forbidden values."""
    if not files:
        yield "it sets nothing"
    for file, values in files.items():
        name = printable(file)
        if file != PARAMS and not (_FILE.fullmatch(file) and (ROOT / file).is_file()):
            known = [path.relative_to(ROOT).as_posix() for path in sorted(CONF.glob("*/*.yaml"))]
            yield f"{name} is not a file conf/GROUP/NAME.yaml; {suggest_name(file, known)}"
        elif not isinstance(values, dict) or not values:
            yield f"{name} should contain keys and values"
        else:
            yield from (f"{problem} ({name})" for problem in find_forbidden_values(values))
            yield from find_unknown_keys(file, values)


def find_unknown_keys(file: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the keys of `values` that `file` does not have or, in params.yaml, that no stage reads."""
    known = list_known_params() if file == PARAMS else list_key_paths(read_yaml(ROOT / file))
    for path, value in list_leaves(values):
        # An empty section is valid if its keys are known; a section that may be null is checked by its schema.
        if any(is_same_key(path, key) or (value == {} and is_same_key(path, key[: len(path)])) for key in known):
            continue
        dotted = [".".join(key) for key in known]
        yield f"{printable('.'.join(path))} is not a key of {file}; {suggest_name('.'.join(path), dotted)}"


def list_known_params() -> list[tuple[str, ...]]:
    """List the keys of params.yaml that dvc.yaml declares; `*` is the name of any task or source."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
    declared = [item for stage in stages for item in stage.get("do", stage).get("params", [])]
    keys = [key for item in declared if isinstance(item, dict) for key in item.get(PARAMS) or []]
    return sorted({tuple(key.replace("${key}", "*").split(".")) for key in keys})


def list_key_paths(values: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """List the paths of all keys, including sections."""
    found = []
    for key, value in values.items():
        children = list_key_paths(value) if isinstance(value, dict) else []
        found += [(str(key),), *((str(key), *rest) for rest in children)]
    return found


def is_same_key(path: tuple[str, ...], known: tuple[str, ...]) -> bool:
    """Return True if `path` is the key `known`, in which `*` is any name."""
    return len(path) == len(known) and all(
        step == name or (name == "*" and _NAME.fullmatch(step) and "." not in step)
        for step, name in zip(path, known, strict=True)
    )


def set_data_path(preset: Preset, path: str) -> None:
    """Set data.path of a preset that reads the user's own file.

    Raises:
        ConfigError: if the preset reads no file, or the path has forbidden characters.
    """
    if not reads_user_files(preset):
        raise ConfigError([f"--path: the preset {preset.name} reads no file of your own"])
    preset.files[PARAMS]["data"]["path"] = path
    if problems := list(find_forbidden_values({"--path": path})):
        raise ConfigError(problems)


def reads_user_files(preset: Preset) -> bool:
    """Return True if the preset's data configuration reads the user's own files."""
    name = find_path_value(preset.files, (PARAMS, "data", "name"))
    if not isinstance(name, str) or name not in list_configurations("data"):
        return False
    return bool(find_path_value(read_yaml(CONF / "data" / f"{name}.yaml"), ("source",)) == "files")


def edit_files(preset: Preset) -> tuple[dict[str, str], dict[str, str]]:
    """Return the old and the new text of each file that the preset changes."""
    before, after = {}, {}
    for file, values in preset.files.items():
        read_yaml(ROOT / file)  # raises the project's own errors
        text = (ROOT / file).read_bytes().decode()
        edited = edit_yaml(text, values, file)
        if edited != text:
            before[file], after[file] = text, edited
    return before, after


def format_diff(file: str, before: str, after: str) -> str:
    """Format the unified diff of two texts of a file."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), file, file, lineterm="")
    return "\n".join([*map(escape_controls, lines), ""])


def refuse_uncommitted(files: list[str]) -> None:
    """Raise StageError if one of `files` has uncommitted changes."""
    command = ["git", "status", "--porcelain", "--ignored", "--", *files]
    try:
        process = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, errors="replace")
        failed = process.stderr.strip() if process.returncode else None
    except OSError as error:
        failed, process = str(error), None
    if failed is not None:
        raise StageError(
            f"git cannot say whether edits of {' and '.join(files)} would be lost ({printable(failed)}): copy the"
            " files elsewhere, then use --force"
        )
    assert process is not None
    if changed := [line[3:] for line in process.stdout.splitlines()]:
        paths = " ".join(changed)
        raise StageError(
            f"uncommitted edits of {' and '.join(changed)} would be lost: commit them, return to the committed state"
            f" (git checkout HEAD -- {paths}), or use --force"
        )


def write_checked(before: Mapping[str, str], after: Mapping[str, str], needs_path: bool) -> None:
    """Write the files `after` and check the configuration.

    Args:
        needs_path: True if the preset reads the user's own file and no path was given.

    Raises:
        StageError: if the check fails; the files are then restored.
    """
    try:
        for file, text in after.items():
            write_text(ROOT / file, text)
        command = [sys.executable, "-m", "tools.check"]
        process = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, errors="replace")
        if process.returncode:
            output = escape_controls(process.stderr.strip())
            if needs_path and "data.path=" in output:
                output += "\nSet your own file with --path FILE."
            raise StageError(f"nothing was changed, because the result does not pass the check:\n{output}")
        print(escape_controls((process.stderr + process.stdout).strip()))
    except BaseException:
        for file, text in before.items():
            write_text(ROOT / file, text)
        raise


def print_next_steps(preset: Preset) -> None:
    """Print the commands that run the preset's tasks."""
    all_tasks = [str(task) for task in read_yaml(ROOT / PARAMS).get("tasks") or {}]
    tasks = [task for task in preset.files.get(PARAMS, {}).get("tasks", {}) if task in all_tasks]
    targets = "" if not tasks or set(tasks) == set(all_tasks) else " ".join(["", *(f"evaluate@{t}" for t in tasks)])
    stage = f" STAGE={shlex.quote(targets.split()[0])}" if len(targets.split()) == 1 else ""
    print("Next:")
    for command, purpose in (
        (f"make plan{stage}", "steps, memory, disk and time"),
        (f"dvc exp run -n {preset.name}{targets}", "run it, as an experiment to compare"),
        ("git checkout HEAD -- params.yaml conf", "return to the committed state"),
    ):
        print(f"  {command.ljust(46)} # {purpose}")


if __name__ == "__main__":
    main()
