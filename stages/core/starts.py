"""Tasks that start from the trained model of another task of params.yaml, and the rules for them."""

from collections.abc import Iterator, Mapping
from typing import Any

from stages.core import config
from stages.core.config import MISSING, find_value, read_yaml, suggest_name
from stages.core.errors import printable

NO_START = "none"
"""`start` of a task that does not start from another one.

models/none and data/tokens/none are in git, since dvc.yaml depends on them.
"""


def find_start_problems(tasks: Mapping[str, Any], task: str, start: Any, model: str | None = None) -> Iterator[str]:
    """Yield an error text for each reason why a task cannot start from another one.

    Args:
        tasks: sections of params.yaml.
        start: `tasks.TASK.start`.
        model: name of the task's model; None if unknown.
    """
    key = f"tasks.{task}.start={printable(start)}"
    if start == NO_START:
        return
    if not isinstance(start, str) or start not in tasks or start == task:
        hint = suggest_name(str(start), [name for name in tasks if name != task])
        reason = "a task cannot start from itself" if start == task else "params.yaml has no such task"
        yield f"{key}: {reason}; {hint} (`start: {NO_START}` starts from tasks.{task}.model)"
        return
    links = follow_starts(tasks, task)
    if links[-1] in links[:-1]:
        yield f"{key}: the tasks start from each other ({' from '.join(links)}): give one of them start: {NO_START}"
        return
    own, other = (_read_objective(name) for name in (task, start))
    if MISSING not in (own, other) and own != other:
        yield (
            f"{key}: {task} has objective.name={printable(own)}, {start} has {printable(other)} (conf/task): further"
            " training needs the same objective"
        )
        return
    start_model = find_value(tasks, f"{start}.model")
    if model is not None and start_model not in (MISSING, model):
        shown = printable(start_model)
        yield (
            f"{key}: {task} has the model {model} with {_describe_tokenizer(model)}, {start} the model {shown} with"
            f" {_describe_tokenizer(start_model)}, but a task has both from its start: set tasks.{task}.model: {shown}"
        )


def follow_starts(tasks: Mapping[str, Any], task: str) -> list[str]:
    """Return `task`, the task that it starts from, and so on. In a cycle, the last task occurs twice."""
    links = [task]
    while (start := find_value(tasks, f"{links[-1]}.start")) in tasks:
        links.append(str(start))
        if links.count(links[-1]) > 1:
            break
    return links


def _read_objective(task: str) -> Any:
    """Return objective.name of a task; MISSING if its file does not exist or does not set it."""
    file = config.CONF / "task" / f"{task}.yaml"
    return find_value(read_yaml(file), "objective.name") if file.is_file() else MISSING


def _describe_tokenizer(model: Any) -> str:
    """Describe the tokenizer of a model's configuration for a message."""
    file = config.CONF / "model" / f"{model}.yaml"
    source = find_value(read_yaml(file), "tokenizer") if file.is_file() else MISSING
    if not isinstance(source, dict):
        return "an unknown tokenizer"
    if source.get("train"):
        return "a tokenizer trained on its own text"
    if isinstance(origin := source.get("from"), dict):
        return f"the tokenizer of models/{printable(origin.get('task'))} of {printable(origin.get('rev'))}"
    return f"the tokenizer of {printable(source.get('path'))}"
