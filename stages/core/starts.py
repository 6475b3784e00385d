"""Tasks that start from another task of params.yaml: which may, and what keeps one from it."""

from collections.abc import Iterator, Mapping
from typing import Any

from stages.core import config
from stages.core.config import MISSING, find, nearest, read_yaml
from stages.core.errors import printable

NO_START = "none"
"""`start` of a task that starts from no other. models/none and data/tokens/none stand in git, for dvc.yaml to name."""


def wrong_start(tasks: Mapping[str, Any], task: str, start: Any, model: str | None = None) -> Iterator[str]:
    """What keeps a task from starting from another one, a line each.

    Args:
        tasks: sections of params.yaml.
        start: `tasks.TASK.start`.
        model: name of the task's model; None: not known.
    """
    key = f"tasks.{task}.start={printable(start)}"
    if start == NO_START:
        return
    if not isinstance(start, str) or start not in tasks or start == task:
        others = [name for name in tasks if name != task]
        what = "a task cannot start from itself" if start == task else "params.yaml has no such task"
        yield f"{key}: {what}; {nearest(str(start), others)} (`start: {NO_START}` starts from tasks.{task}.model)"
        return
    links = follow_starts(tasks, task)
    if links[-1] in links[:-1]:
        yield f"{key}: the tasks start from each other ({' from '.join(links)}): give one of them start: {NO_START}"
        return
    own, other = (_objective(name) for name in (task, start))
    if MISSING not in (own, other) and own != other:
        yield (
            f"{key}: {task} has objective.name={printable(own)}, {start} has {printable(other)} (conf/task): a model"
            " goes on with the objective that it was trained with"
        )
        return
    first = find(tasks, f"{start}.model")
    if model is not None and first not in (MISSING, model):
        yield (
            f"{key}: {task} has the model {model} with {_tokenizer(model)}, {start} the model {printable(first)} with"
            f" {_tokenizer(first)}, and a task has both from its start: set tasks.{task}.model: {printable(first)}"
        )


def follow_starts(tasks: Mapping[str, Any], task: str) -> list[str]:
    """`task`, the task that it starts from, and so on; where they start from each other, the last one twice."""
    links = [task]
    while (start := find(tasks, f"{links[-1]}.start")) in tasks:
        links.append(str(start))
        if links.count(links[-1]) > 1:
            break
    return links


def _objective(task: str) -> Any:
    """The objective of a task; MISSING where its file has none, or is not there."""
    file = config.CONF / "task" / f"{task}.yaml"
    return find(read_yaml(file), "objective.name") if file.is_file() else MISSING


def _tokenizer(model: Any) -> str:
    """In words, the tokenizer of a model's configuration."""
    file = config.CONF / "model" / f"{model}.yaml"
    source = find(read_yaml(file), "tokenizer") if file.is_file() else MISSING
    if not isinstance(source, dict):
        return "an unknown tokenizer"
    if source.get("train"):
        return "a tokenizer trained on its own text"
    if isinstance(origin := source.get("from"), dict):
        return f"the tokenizer of models/{printable(origin.get('task'))} of {printable(origin.get('rev'))}"
    return f"the tokenizer of {printable(source.get('path'))}"
