"""Schema of conf/pairs."""

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from stages.core.config import config_section
from stages.core.errors import printable

_CONFIG_PLACEHOLDER = "{config}"  # in hub.file: replaced by the name of a configuration


@config_section
class HubPairs:
    """A data set of the Hub, which replaces the file at `path`."""

    path: str
    """OWNER/NAME of the data set."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    """Commit of the data set."""
    file: str
    """Parquet file of each configuration; {config} is replaced by the configuration's name."""
    configs: Annotated[list[str], Field(min_length=1)]
    """Configurations to score."""

    @field_validator("configs")
    @classmethod
    def _check_duplicates(cls, configs: list[str]) -> list[str]:
        if repeated := sorted({name for name in configs if configs.count(name) > 1}):
            raise ValueError(f"pairs.hub.configs names {printable(', '.join(repeated))} more than once")
        return configs

    @model_validator(mode="after")
    def _check_placeholder(self) -> "HubPairs":
        if len(self.configs) > 1 and _CONFIG_PLACEHOLDER not in self.file:
            raise ValueError(
                f"pairs.hub.file={printable(self.file)} needs {_CONFIG_PLACEHOLDER}: pairs.hub.configs names several"
            )
        return self

    @property
    def files(self) -> dict[str, str]:
        """Maps each configuration to its file."""
        return {name: self.file.replace(_CONFIG_PLACEHOLDER, name) for name in self.configs}


@config_section
class PairColumns:
    good: str
    """Column of the acceptable text of a minimal pair."""
    bad: str
    """Column of the unacceptable text of a minimal pair."""
    prompt: str
    """Column of the text that the choices continue; it may be empty."""
    choices: str
    """Column of the list of choices of a question."""
    answer: str
    """Column of the index of the right choice, from 0."""


@config_section
class Pairs:
    """Minimal pairs or multiple-choice questions."""

    path: str
    """Local JSONL file; ignored if `hub` is set."""
    hub: HubPairs | None
    """Data set of the Hub; null: use the file at `path`."""
    columns: PairColumns
    joiner: str
    """Text between a prompt and a choice; omitted if the prompt is empty."""
    groups: list[str]
    """Columns to group items by; accuracy is also reported for each value of each column."""
    context: Annotated[int, Field(ge=4)]
    """Tokens per window; longer texts are scored in several windows."""

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        if "://" in path or path.startswith("~"):
            raise ValueError(f"pairs.path={printable(path)}: give the path of a local file, without ~ or a scheme")
        return path

    @field_validator("groups")
    @classmethod
    def _check_groups(cls, groups: list[str]) -> list[str]:
        if repeated := sorted({name for name in groups if groups.count(name) > 1}):
            raise ValueError(f"pairs.groups names {printable(', '.join(repeated))} more than once")
        return groups
