"""Schema of conf/data."""

import re
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.core.config import Fraction, Positive, Seed, part, whole
from stages.core.errors import printable
from stages.download.cleaning_schema import Step

SAMPLE = "data/sample/askscience.jsonl"


@whole
class Columns:
    title: str | None
    """Column of the title that decides a record's split; null where records have none."""
    texts: Annotated[list[str], Field(min_length=1)]
    """Columns that hold a text or a list of texts; a dotted name goes into a nested field."""
    roles: str | None = None
    """Column of the roles beside the texts, which are then the messages of a conversation; null: they have none."""

    @model_validator(mode="after")
    def _belongs_to_one(self) -> "Columns":
        if self.roles is not None and len(self.texts) > 1:
            raise ValueError(
                f"columns.roles={printable(self.roles)}: name one column of messages in columns.texts, not"
                f" {len(self.texts)}"
            )
        return self


@whole
class Split:
    by: Literal["hash", "source"]
    """hash: of the normalised key; source: the source's own splits."""
    key: str | Annotated[list[str], Field(min_length=1)] | None
    """Column, or columns, whose value decides a record's split (of its text where that is empty); null: its text."""
    seed: Seed
    """Draws another hash split."""
    train: Fraction
    """Share of the records; the three add up to 1."""
    validation: Fraction
    """Share of the records."""
    test: Fraction
    """Share of the records."""

    @model_validator(mode="after")
    def _adds_up(self) -> "Split":
        total = self.train + self.validation + self.test
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"split.train + split.validation + split.test = {total:g}: they must add up to 1")
        if min(self.train, self.validation, self.test) == 0.0:
            raise ValueError("split: train, validation and test must each be above 0")
        return self


@whole
class HubData:
    id: str
    """OWNER/NAME of the data set."""
    config: str | None
    """The data set's configuration, where it has several."""
    revision: str
    """A commit; a branch name moves."""
    splits: Annotated[list[str], Field(min_length=1)]
    """Splits read, one after the other."""

    @model_validator(mode="after")
    def _exists(self) -> "HubData":
        if self.id.rpartition("/")[2] == "eli5" and self.id.partition("/")[0] in ("eli5", "defunct-datasets"):
            raise ValueError(
                f"data.hub.id={self.id}: the data set of the original guide is defunct: its source, Reddit's archive,"
                " was closed, and the Hub serves it no more. Ways on: data.name=eli5_category (the guide's own"
                " successor) or data.name=eli5_parquet (with r/askscience)"
            )
        return self


_IN_ADDRESS = re.compile(r"(://[^/@:]*):[^/@]+@")
_IN_QUERY = re.compile(r"([?&][^=&]*(?:token|secret|password|signature|credential|api_?key|sig)=)[^&]+", re.IGNORECASE)


def without_credentials(path: str) -> str | None:
    """`path` with *** in place of the passwords and tokens that it holds; None where it holds none."""
    shown = _IN_QUERY.sub(r"\1***", _IN_ADDRESS.sub(r"\1:***@", path))
    return shown if shown != path else None


# URLs that DVC takes as a dependency and fsspec opens, each with DVC's package for it.
REMOTES = {
    "http": "dvc_http",
    "https": "dvc_http",
    "s3": "dvc_s3",
    "gs": "dvc_gs",
    "ssh": "dvc_ssh",
    "hdfs": "dvc_hdfs",
    "webhdfs": "dvc_webhdfs",
    "oss": "dvc_oss",
}
_INSTEAD = {
    "hf": "set data.name=hub and, in conf/data/hub.yaml, hub.id=OWNER/NAME",
    "file": "write the path without file://",
    "local": "write the path without local://",
    "gcs": "write gs://",
    "sftp": "write ssh://",
    "s3a": "write s3://",
    **dict.fromkeys(("zip", "tar", "libarchive"), "archives are not unpacked: unpack it, and name the directory"),
}


def unreadable_path(path: str) -> str | None:
    """Why `path` cannot be a dependency of DVC, and what to write instead; None where it can.

    DVC takes what it does not know for a relative path, or refuses it in words about its own configuration.
    """
    if path.startswith("~"):
        return "~ is not resolved: write the absolute path"
    scheme, separator, _ = path.partition("://")
    if not separator:
        return None
    if "::" in path:
        return f"chained URLs are not read: {_INSTEAD.get(scheme, 'fetch the file, and name it')}"
    if scheme not in REMOTES:
        instead = _INSTEAD.get(scheme, "fetch the file, and name it")
        return f"not a URL that DVC and fsspec both read ({', '.join(REMOTES)}): {instead}"
    if find_spec(package := REMOTES[scheme]) is None:
        name = package.replace("_", "-")
        return f"DVC reads {scheme}:// with {name}, which is not installed: `uv pip install {name}`"
    return None


@part
class SourceData:
    """What `download` reads of conf/data/NAME.yaml."""

    source: Literal["sample", "files", "hub", "sources"]
    """sample: the embedded corpus; files: those at `path`; hub: a data set of the Hub; sources: several of these."""
    path: str
    """File, directory or URL (http, https, or s3, gs, ssh, ... with DVC's package for it); ignored by hub."""
    hub: HubData | None
    """The data set, for source hub; null for the others."""
    sources: Annotated[list[Annotated[str, Field(pattern=r"^\w[\w.-]*$")]], Field(min_length=1)] | None
    """Names of the sources of params.yaml, for source sources; null for the others."""
    columns: Columns
    """Where ELI5's fields stand in a record."""
    filter: dict[str, Annotated[list[str | bool | int | float], Field(min_length=1)]] | None
    """Column to the values that a record may have there; a record must match all. null or {}: none."""
    text_record: Literal["file", "paragraph", "line"]
    """What a record of plain text is."""
    max_records: Positive | None
    """The first N records that pass the filter; null: all."""
    on_bad_record: Literal["error", "skip"]
    """error: a malformed record ends the stage, named by file and line; skip: it is counted in the ledger."""
    deduplicate: Literal["none", "exact", "near"]
    """exact: drop documents that came before; near: and those of train that nearly stand in validation or test."""
    count_near_duplicates: bool
    """Look for near duplicates across the split where they are not dropped, too; costs memory per held-out document."""
    clean: list[Step]
    """Steps that leave out or change texts, in this order (docs/data.md)."""
    groups: list[str]
    """Columns by whose values the figures are reported as well."""
    split: Split | None
    """Which records are trained on, chosen by and reported; null: none, for texts that are only evaluated."""

    @property
    def needs_signatures(self) -> bool:
        """Whether near duplicates are looked for."""
        return self.split is not None and (self.count_near_duplicates or self.deduplicate == "near")

    @model_validator(mode="after")
    def _matches_source(self) -> "SourceData":
        if shown := without_credentials(self.path):
            raise ValueError(
                f"data.path={shown}: a path with credentials would stand in dvc.lock and in logs; leave them out, and"
                " give them to fsspec by its configuration (~/.config/fsspec/*.json or an environment variable such as"
                " FSSPEC_HTTPS, docs/security.md)"
            )
        if self.source == "sample" and self.path != SAMPLE:
            raise ValueError(
                f"data.path={self.path}: data.name=sample reads {SAMPLE} alone; set data.name=files for your own text"
            )
        if self.source == "hub" and self.hub is None:
            raise ValueError("data.hub is missing: a Hub source needs hub.id and hub.revision")
        if (self.source == "sources") != (self.sources is not None):
            raise ValueError(
                "data.sources is missing: data.source=sources needs the names of those that it consists of"
                if self.sources is None
                else f"data.sources has no meaning for data.source={self.source}: set sources: null"
            )
        if self.source == "sources" and (self.split is None or self.split.by != "source"):
            raise ValueError("data.split.by: data.source=sources keeps the splits of its sources: set split.by: source")
        if self.split is None and self.deduplicate == "near":
            raise ValueError("data.deduplicate=near compares splits, and data.split is null: set deduplicate: exact")
        if self.source == "sources" and self.clean:
            raise ValueError(
                "data.clean has no meaning for data.source=sources: set it in the configuration of each source"
            )
        if self.source != "hub" and self.hub is not None:
            raise ValueError(f"data.hub has no meaning for data.source={self.source}: set hub: null")
        if not self.path.strip():
            raise ValueError("data.path is empty: name a file, a directory or a URL")
        if reason := unreadable_path(self.path):
            raise ValueError(f"data.path={printable(self.path)}: {reason}")
        return self
