"""The record of a search: an Optuna study in a file, and the values and runs of its trials."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.config import MISSING
from stages.core.errors import StageError, format_cause, printable
from tools.search.space import Choices, Range, Space, read_current_value
from tools.yaml_edit import is_same_value

if TYPE_CHECKING:
    import optuna

DIRECTORY = Path("reports/search")


def import_optuna() -> Any:
    """Return the module `optuna`, silenced.

    Raises:
        StageError: if it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise StageError("Optuna is not installed: `make optuna` adds it to the environment") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def open_study(name: str, create: bool) -> "optuna.Study":
    """Open the study of a search.

    Args:
        create: True to create it if it does not exist, and to repair what a kill has left; requires `lock_search`.

    Raises:
        StageError: if there is none, or its file cannot be read.
    """
    optuna = import_optuna()
    from optuna.storages.journal import JournalFileBackend

    file = DIRECTORY / f"{name}.journal"
    if create:
        repair_journal(file)
    elif not file.is_file():
        raise StageError(f"there is no search named {name} ({file}): start it with --budget")
    try:
        storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
        study: Any = (
            optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
            if create
            else optuna.load_study(storage=storage, study_name=name)
        )
    except Exception as error:  # Optuna raises errors of several kinds for a damaged file
        raise StageError(
            f"{file} cannot be read ({format_cause(error)}): move it away; the search then finds its finished"
            " experiments again by their names"
        ) from None
    return study


def repair_journal(file: Path) -> None:
    """Remove what a kill can leave: a line that was not written to its end, and Optuna's own lock."""
    file.with_name(f"{file.name}.lock").unlink(missing_ok=True)
    if file.is_file() and (content := file.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)


def prepare_study(study: "optuna.Study", name: str, space: Space, fingerprints: Mapping[str, str]) -> None:
    """Record the space in a new study, and propose the current values as its first trial.

    Args:
        fingerprints: stage or path of source data to a hash of what all trials have in common.

    Raises:
        StageError: if the study was made with another space or other fingerprints.
    """
    described = {"space": space.describe(), "fingerprints": dict(fingerprints)}
    if "search" not in study.user_attrs:
        current = {key: read_current_value(key) for key in space.keys}
        if not study.trials and all(is_in_space(spec, current[key]) for key, spec in space.keys.items()):
            study.enqueue_trial({key: encode_value(spec, current[key]) for key, spec in space.keys.items()})
        study.set_user_attr("search", described)
        return
    check_space_is_recorded(study, name, space)
    recorded = study.user_attrs["search"]["fingerprints"]
    if changed := [stage for stage, value in fingerprints.items() if recorded.get(stage) != value]:
        raise StageError(
            f"values, code or data changed since search {name} was started ({', '.join(changed)}), so that its trials"
            " would not be comparable: undo the change, or start a new search (--name OTHER)"
        )


def check_space_is_recorded(study: "optuna.Study", name: str, space: Space) -> None:
    """Check that a study, if it is not new, was made with this space.

    Raises:
        StageError: with the first difference.
    """
    described = json.loads(json.dumps(space.describe()))
    recorded = study.user_attrs.get("search", {"space": described})
    if difference := find_difference(recorded["space"], described):
        raise StageError(
            f"search {name} was started with another space: {difference}: undo the change, or start a new search"
            " (--name OTHER)"
        )


def find_difference(recorded: Any, given: Any, path: str = "") -> str:
    """Describe the first difference of two spaces; the empty string if they are equal."""
    if isinstance(recorded, dict) and isinstance(given, dict):
        names = dict.fromkeys([*recorded, *given])
        found = (
            find_difference(recorded.get(name, MISSING), given.get(name, MISSING), f"{path} {name}") for name in names
        )
        return next(filter(None, found), "")
    if is_same_value(recorded, given):
        return ""
    before, now = ("nothing" if value is MISSING else json.dumps(value) for value in (recorded, given))
    return printable(f"{path.strip()} was {before}, and is now {now}")


# -- values ------------------------------------------------------------------------------------------------------------


def suggest_value(trial: "optuna.Trial", key: str, spec: Range | Choices) -> None:
    """Let Optuna propose the value of a key, unless the trial was given one."""
    if isinstance(spec, Choices):  # as JSON, since choices can be of any type
        trial.suggest_categorical(key, [encode_value(spec, choice) for choice in spec.choices])
    elif spec.is_whole:
        trial.suggest_int(key, spec.low, spec.high, step=spec.step or 1, log=spec.log)
    else:
        trial.suggest_float(key, spec.low, spec.high, step=spec.step, log=spec.log)


def encode_value(spec: Range | Choices, value: Any) -> Any:
    """Return a value as Optuna stores it."""
    return json.dumps(value, sort_keys=True) if isinstance(spec, Choices) else value


def decode_value(spec: Range | Choices, value: Any) -> Any:
    """Return a value of a trial from the one that Optuna stores."""
    return json.loads(value) if isinstance(spec, Choices) else spec.round_value(value)


def is_in_space(spec: Range | Choices, value: Any) -> bool:
    """Return True if Optuna could propose `value`."""
    if value is MISSING:
        return False
    if isinstance(spec, Choices):
        return encode_value(spec, value) in [encode_value(spec, choice) for choice in spec.choices]
    if isinstance(value, bool) or not isinstance(value, int | float) or not spec.low <= value <= spec.high:
        return False
    step = spec.step or (1 if spec.is_whole else None)
    return step is None or math.isclose(round((value - spec.low) / step) * step + spec.low, value)


def decode_values(space: Space, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return key to value from the parameters of a trial."""
    return {key: decode_value(spec, params[key]) for key, spec in space.keys.items()}


# -- runs of trials ----------------------------------------------------------------------------------------------------


def list_runs(trials: "list[optuna.trial.FrozenTrial]") -> list[dict[str, Any]]:
    """Return the runs of all trials: `name`, `epochs`, `seconds` (None if found finished), `rev` or `error`."""
    return [run for trial in trials for run in trial.user_attrs.get("runs", [])]


def sum_seconds(trials: "list[optuna.trial.FrozenTrial]") -> float:
    """Return the seconds that all runs took."""
    return sum(run["seconds"] or 0.0 for run in list_runs(trials))
