"""Compare experiments: `dvc exp show` with the columns that matter, and what repeats over seeds come to.

Command python -m tools.compare [--split test]

Choose among experiments by validation (the default); report test.
"""

import argparse
import json
import statistics
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

OPTIONS = ("--no-pager", "--drop", ".*", "--keep")


def columns(split: str) -> str:
    """The regular expression of the columns that matter."""
    return rf"Experiment|.*\.{split}\.(pseudo_)?bits_per_byte$|block_size"


def command(split: str) -> str:
    """The command that shows them, as one types it."""
    return f"dvc exp show --no-pager --drop '.*' --keep '{columns(split)}'"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.compare")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    split = parser.parse_args().split
    subprocess.run(["dvc", "exp", "show", *OPTIONS, columns(split)], check=True)
    shown = subprocess.run(["dvc", "exp", "show", "--json"], check=True, capture_output=True, text=True)
    found = list(rows(json.loads(shown.stdout)))
    for title, lines in (
        ("What they differ in:", differences(found)),
        ("Experiments that differ in seed alone:", list(over_seeds(found, split))),
    ):
        if lines:
            print(f"\n{title}", *lines, sep="\n")


def rows(shown: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The committed revisions and their experiments that have results: name, params and metrics by file."""
    for row in revisions(shown):
        if row["rev"] != "workspace" and (row.get("data") or {}).get("metrics"):
            yield {"name": name_of(row), **row["data"]}


def revisions(shown: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """All that `dvc exp show --json` shows: workspace and commits, each before its experiments.

    An experiment has a key `executor` more: None, or what runs it or failed to.
    """
    for revision in shown:
        yield revision
        for experiment in revision.get("experiments") or []:
            for row in experiment["revs"]:
                yield {**row, "executor": experiment.get("executor")}


def name_of(row: dict[str, Any]) -> str:
    """What one calls a revision: its name, or the beginning of its commit."""
    return str(row.get("name") or (row["rev"] if row["rev"] == "workspace" else row["rev"][:7]))


def differences(found: list[dict[str, Any]]) -> list[str]:
    """A line each with the params in which the rows differ, as `-S` takes them; none where nothing differs.

    Below the table: as columns beside the metrics they would not fit into a terminal.
    """
    params = [dict(flat(row["params"])) for row in found]
    changed = differing(params)
    lines = [
        (row["name"], [f"{key}={values[key]}" for key in changed if key in values])
        for row, values in zip(found, params, strict=True)
    ]
    width = max((len(name) for name, _ in lines), default=0)
    return [f"  {name:{width}}  {' '.join(values)}" for name, values in lines] if changed else []


def differing(params: list[dict[str, str]]) -> list[str]:
    """The keys whose values are not the same in all rows."""
    keys = dict.fromkeys(key for values in params for key in values)
    return [key for key in keys if len({values.get(key) for values in params}) > 1]


def flat(files: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each param of `dvc exp show --json` under the name that `-S` knows it by, and its value as JSON.

    A file that could not be read at a revision has none.
    """

    def leaves(prefix: str, content: dict[str, Any]) -> Iterator[tuple[str, str]]:
        for key, value in content.items():
            if isinstance(value, dict) and value:
                yield from leaves(f"{prefix}{key}.", value)
            else:
                yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)

    for file, content in files.items():
        yield from leaves("" if file == "params.yaml" else f"{file}:", content.get("data", {}))


def over_seeds(found: list[dict[str, Any]], split: str) -> Iterator[str]:
    """For each group of experiments that differ in `seed` alone: mean and standard deviation of each metric."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        params = json.loads(json.dumps(row["params"]))
        params["params.yaml"]["data"].pop("seed")
        groups[json.dumps(params, sort_keys=True)].append(row)
    for members in groups.values():
        # One row a seed: the same experiment may stand under several names.
        seeds = {row["params"]["params.yaml"]["data"]["seed"]: row for row in members}
        if len(seeds) > 1:
            yield f"  {', '.join(row['name'] for row in seeds.values())} (seeds {', '.join(map(str, seeds))})"
            for name, values in metrics(list(seeds.values()), split).items():
                yield f"    {name}: {statistics.mean(values):.4f} +- {statistics.stdev(values):.4f}"


def metrics(members: list[dict[str, Any]], split: str) -> dict[str, list[float]]:
    """Name to the members' values of the metrics that compare."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in members:
        for file in row["metrics"].values():
            for task, splits in file["data"].items():
                for name, value in splits[split].items():
                    if name in ("bits_per_byte", "pseudo_bits_per_byte"):
                        values[f"{task}.{split}.{name}"].append(value)
    return {name: found for name, found in values.items() if len(found) == len(members)}


if __name__ == "__main__":
    main()
