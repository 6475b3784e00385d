"""Schema of conf/pairs."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from stages.core.config import whole
from stages.core.errors import printable

_CONFIG = "{config}"  # in hub.file, the name of a configuration


@whole
class HubPairs:
    """A data set of the Hub, in place of the file at `path`."""

    path: str
    """OWNER/NAME of the data set."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """Commit of the data set."""
    file: str
    """Parquet file of a configuration, with {config} for its name."""
    configs: Annotated[list[str], Field(min_length=1)]
    """Configurations to score."""

    @field_validator("configs")
    @classmethod
    def _differ(cls, configs: list[str]) -> list[str]:
        if repeated := sorted({name for name in configs if configs.count(name) > 1}):
            raise ValueError(f"pairs.hub.configs names {printable(', '.join(repeated))} more than once")
        return configs

    @model_validator(mode="after")
    def _tells_configurations_apart(self) -> "HubPairs":
        if len(self.configs) > 1 and _CONFIG not in self.file:
            raise ValueError(f"pairs.hub.file={printable(self.file)} needs {_CONFIG}: pairs.hub.configs names several")
        return self

    @property
    def files(self) -> dict[str, str]:
        """Configuration to its file."""
        return {name: self.file.replace(_CONFIG, name) for name in self.configs}


@whole
class PairColumns:
    good: str
    """Column of the acceptable text of a minimal pair."""
    bad: str
    """Column of the unacceptable text of a minimal pair."""
    prompt: str
    """Column of the text that the choices continue; it may be empty."""
    choices: str
    """Column of the list of choices."""
    answer: str
    """Column of the index of the right choice, from 0."""


@whole
class Pairs:
    """Minimal pairs or multiple-choice questions."""

    path: str
    """A local JSONL file; ignored where `hub` names a data set."""
    hub: HubPairs | None
    """A data set of the Hub; null: the file at `path`."""
    columns: PairColumns
    joiner: str
    """Text between a prompt and a choice; left out after an empty prompt."""
    groups: list[str]
    """Columns by whose values accuracy is also reported."""
    context: Annotated[int, Field(ge=4)]
    """Tokens in a window; longer texts are scored in several windows."""

    @field_validator("path")
    @classmethod
    def _is_local(cls, path: str) -> str:
        if "://" in path or path.startswith("~"):
            raise ValueError(f"pairs.path={printable(path)}: give the path of a local file, without ~ or a scheme")
        return path

    @field_validator("groups")
    @classmethod
    def _group_once(cls, groups: list[str]) -> list[str]:
        if repeated := sorted({name for name in groups if groups.count(name) > 1}):
            raise ValueError(f"pairs.groups names {printable(', '.join(repeated))} more than once")
        return groups
