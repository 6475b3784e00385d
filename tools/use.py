"""Write a preset of presets/ to params.yaml, and show the difference.

Command python -m tools.use [NAME] [--path PATH] [--dry-run] [--force]

Without NAME it lists the presets. A preset sets values of params.yaml and, below the name of a file of conf/
(conf/GROUP/NAME.yaml), values of that file. What it does not name stays. The result only stays if it passes the check
that `make check` runs.
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
from stages.core.compose import forbidden_values
from stages.core.config import CONF, choices, nearest, read_yaml
from stages.core.errors import ConfigError, StageError, printable, printable_lines, without_controls
from tools.yaml_edit import edit_yaml, find_path, leaves

ROOT = CONF.parent
PARAMS = "params.yaml"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_FILE = re.compile(r"conf/[a-z_]+/[A-Za-z0-9_-][A-Za-z0-9._-]*\.yaml")


class Preset(NamedTuple):
    """What a file of presets/ says."""

    name: str
    head: list[str]
    """Lines of the comment that it begins with."""
    files: dict[str, dict[str, Any]]
    """File of the repository to the nested values to set in it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.use")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the preset (default: list them)")
    parser.add_argument("--path", help="your own file, directory or URL, for a preset that reads one")
    parser.add_argument("--dry-run", action="store_true", help="show the difference, write nothing")
    parser.add_argument("--force", action="store_true", help="overwrite uncommitted edits")
    arguments = parser.parse_args()
    try:
        if arguments.name is None:
            show_presets()
        else:
            use(arguments.name, arguments.path, arguments.dry_run, arguments.force)
    except (OSError, ValueError) as error:
        sys.exit(printable_lines(f"use: {error}"))


def show_presets() -> None:
    """Print the name and the first line of each preset."""
    names = preset_names()
    width = max(map(len, names), default=0)
    for name in names:
        try:
            line = printable(read_preset(name).head[0])
        except ConfigError as error:  # of one preset, which is no reason not to list the others
            line = f"(wrong: {printable(error.problems[0])})"
        print(f"{name.ljust(width)}  {line}")
    print("\nTo see what one would change: python -m tools.use NAME --dry-run")


def use(name: str, path: str | None, dry_run: bool, force: bool) -> None:
    """Set the values of a preset in params.yaml and conf/.

    Raises:
        StageError: if the preset is wrong, uncommitted edits would be lost, or the result does not pass the check.
    """
    preset = read_preset(name)
    if path is not None:
        set_path(preset, path)
    before, after = edited_files(preset)
    print(printable_lines("\n".join(preset.head)), end="\n\n")
    if not after:
        print(f"{' and '.join(preset.files)}: nothing changes")
    for file, text in after.items():
        print(difference(file, before[file], text))
    if after and not dry_run:
        if not force:
            refuse_uncommitted(list(after))
        write_checked(before, after, needs_path=path is None and reads_files(preset))
        print(f"Wrote {' and '.join(after)}.")
    if not dry_run:
        show_next(preset)


def preset_names() -> list[str]:
    """Names of the presets."""
    return sorted(file.stem for file in (ROOT / "presets").glob("*.yaml") if _NAME.fullmatch(file.stem))


def read_preset(name: str) -> Preset:
    """The preset `name`.

    Raises:
        ConfigError: if there is none, or it sets what cannot be set.
    """
    names = preset_names()
    if name not in names:
        near = nearest(name, names)
        listed = "" if near.startswith("there are") else f"; there are {', '.join(names)}"
        raise ConfigError([f"{printable(repr(name))} is no preset: {near}{listed}"])
    file, where = ROOT / "presets" / f"{name}.yaml", f"presets/{name}.yaml"
    values = read_yaml(file)
    head = re.match(r"(#.*\n)+", file.read_text(encoding="utf-8").replace("\r\n", "\n"))
    if head is None:
        raise ConfigError([f"{where}: its first line should be a comment that says what it is for"])
    files = {key: values.pop(key) for key in list(values) if key.endswith(".yaml") and key != PARAMS}
    files = {**({PARAMS: values} if values else {}), **files}
    if problems := list(wrong_files(files)):
        raise ConfigError([f"{where}: {problem}" for problem in problems])
    return Preset(name, [line.lstrip("# ") for line in head[0].splitlines()], files)


def wrong_files(files: Mapping[str, Any]) -> Iterator[str]:
    """What a preset sets that cannot be set."""
    if not files:
        yield "it sets nothing"
    for file, values in files.items():
        shown = printable(file)
        if file != PARAMS and not (_FILE.fullmatch(file) and (ROOT / file).is_file()):
            known = [path.relative_to(ROOT).as_posix() for path in sorted(CONF.glob("*/*.yaml"))]
            yield f"{shown} is no file conf/GROUP/NAME.yaml; {nearest(file, known)}"
        elif not isinstance(values, dict) or not values:
            yield f"{shown} should hold keys and values"
        else:
            yield from (f"{problem} ({shown})" for problem in forbidden_values(values))
            yield from unknown_keys(file, values)


def unknown_keys(file: str, values: Mapping[str, Any]) -> Iterator[str]:
    """Keys of `values` that `file` does not have or, if it is params.yaml, that no stage reads."""
    known = known_params() if file == PARAMS else list_keys(read_yaml(ROOT / file))
    for path, value in leaves(values):
        # An empty section is one of which the keys are known; a section that may be null is checked by its schema.
        if any(matches(path, key) or (value == {} and matches(path, key[: len(path)])) for key in known):
            continue
        dotted = [".".join(key) for key in known]
        yield f"{printable('.'.join(path))} is no key of {file}; {nearest('.'.join(path), dotted)}"


def known_params() -> list[tuple[str, ...]]:
    """Keys of params.yaml that dvc.yaml declares; `*` is the name of a task or source."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
    declared = [item for stage in stages for item in stage.get("do", stage).get("params", [])]
    keys = [key for item in declared if isinstance(item, dict) for key in item.get(PARAMS) or []]
    return sorted({tuple(key.replace("${key}", "*").split(".")) for key in keys})


def list_keys(values: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Paths of all keys, sections included."""
    found = []
    for key, value in values.items():
        below = list_keys(value) if isinstance(value, dict) else []
        found += [(str(key),), *((str(key), *rest) for rest in below)]
    return found


def matches(path: tuple[str, ...], known: tuple[str, ...]) -> bool:
    """Whether `path` is the key `known`."""
    return len(path) == len(known) and all(
        step == name or (name == "*" and _NAME.fullmatch(step) and "." not in step)
        for step, name in zip(path, known, strict=True)
    )


def set_path(preset: Preset, path: str) -> None:
    """Set data.path of a preset that reads a file of the user's own.

    Raises:
        ConfigError: if it reads none, or the path cannot be written.
    """
    if not reads_files(preset):
        raise ConfigError([f"--path: the preset {preset.name} reads no file of your own"])
    preset.files[PARAMS]["data"]["path"] = path
    if problems := list(forbidden_values({"--path": path})):
        raise ConfigError(problems)


def reads_files(preset: Preset) -> bool:
    """Whether the data configuration that a preset names reads files of the user's own."""
    name = find_path(preset.files, (PARAMS, "data", "name"))
    if not isinstance(name, str) or name not in choices("data"):
        return False
    return bool(find_path(read_yaml(CONF / "data" / f"{name}.yaml"), ("source",)) == "files")


def edited_files(preset: Preset) -> tuple[dict[str, str], dict[str, str]]:
    """File to text before, and with the preset's values, of the files that change."""
    before, after = {}, {}
    for file, values in preset.files.items():
        read_yaml(ROOT / file)  # with the project's own errors
        text = (ROOT / file).read_bytes().decode()
        edited = edit_yaml(text, values, file)
        if edited != text:
            before[file], after[file] = text, edited
    return before, after


def difference(file: str, before: str, after: str) -> str:
    """The unified difference of two texts of a file."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), file, file, lineterm="")
    return "\n".join([*map(without_controls, lines), ""])


def refuse_uncommitted(files: list[str]) -> None:
    """Raise StageError if git does not have the present content of one of `files`."""
    command = ["git", "status", "--porcelain", "--ignored", "--", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, errors="replace")
        failed = done.stderr.strip() if done.returncode else None
    except OSError as error:
        failed, done = str(error), None
    if failed is not None:
        raise StageError(
            f"git cannot say whether edits of {' and '.join(files)} would be lost ({printable(failed)}): copy the"
            " files elsewhere, then use --force"
        )
    assert done is not None
    if changed := [line[3:] for line in done.stdout.splitlines()]:
        shown = " ".join(changed)
        raise StageError(
            f"uncommitted edits of {' and '.join(changed)} would be lost: commit them, return to the committed state"
            f" (git restore {shown}), or use --force"
        )


def write_checked(before: Mapping[str, str], after: Mapping[str, str], needs_path: bool) -> None:
    """Write the files `after` and check the configuration.

    Args:
        needs_path: whether the preset reads a file of the user's own that was not named.

    Raises:
        StageError: if it does not pass; the files are then as they were.
    """
    try:
        for file, text in after.items():
            write_text(ROOT / file, text)
        command = [sys.executable, "-m", "tools.check"]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, errors="replace")
        if done.returncode:
            said = without_controls(done.stderr.strip())
            if needs_path and "data.path=" in said:
                said += "\nName your own file with --path FILE."
            raise StageError(f"nothing was changed, since the result does not pass the check:\n{said}")
        print(without_controls((done.stderr + done.stdout).strip()))
    except BaseException:
        for file, text in before.items():
            write_text(ROOT / file, text)
        raise


def show_next(preset: Preset) -> None:
    """Print the commands that run the preset's tasks."""
    all_tasks = [str(task) for task in read_yaml(ROOT / PARAMS).get("tasks") or {}]
    tasks = [task for task in preset.files.get(PARAMS, {}).get("tasks", {}) if task in all_tasks]
    targets = "" if not tasks or set(tasks) == set(all_tasks) else " ".join(["", *(f"evaluate@{t}" for t in tasks)])
    stage = f" STAGE={shlex.quote(targets.split()[0])}" if len(targets.split()) == 1 else ""
    print("Next:")
    for command, does in (
        (f"make plan{stage}", "steps, memory, disk and time"),
        (f"dvc exp run -n {preset.name}{targets}", "run it, as an experiment to compare"),
        ("git restore params.yaml conf", "return to the committed state"),
    ):
        print(f"  {command.ljust(46)} # {does}")


if __name__ == "__main__":
    main()
