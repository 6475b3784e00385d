"""Schema of conf/data: the sources of text, their columns and their splits."""

import re
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.core.config import Fraction, Positive, Seed, config_section, config_view
from stages.core.errors import printable
from stages.download.cleaning_schema import Step

SAMPLE = "data/sample/askscience.jsonl"


@config_section
class Columns:
    title: str | None
    """Column of the title, which decides a record's split by default; null if records have no title."""
    texts: Annotated[list[str], Field(min_length=1)]
    """Columns of a text or a list of texts; a dotted name selects a nested field."""
    roles: str | None = None
    """Column with the role of each text, if texts are the messages of a conversation; null: no conversations."""

    @model_validator(mode="after")
    def _check_single_texts_column(self) -> "Columns":
        if self.roles is not None and len(self.texts) > 1:
            raise ValueError(
                f"columns.roles={printable(self.roles)}: columns.texts must name a single column of messages, not"
                f" {len(self.texts)}"
            )
        return self


@config_section
class Split:
    by: Literal["hash", "source"]
    """hash: by a hash of the normalized key; source: the source's own splits."""
    key: str | Annotated[list[str], Field(min_length=1)] | None
    """Column or columns that decide a record's split (its text, if they are empty); null: its text."""
    seed: Seed
    """Seed of the hash; another seed gives another split."""
    train: Fraction
    """Share of the records; the three shares must add up to 1."""
    validation: Fraction
    """Share of the records."""
    test: Fraction
    """Share of the records."""

    @model_validator(mode="after")
    def _check_shares(self) -> "Split":
        total = self.train + self.validation + self.test
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"split.train + split.validation + split.test = {total:g}: they must add up to 1")
        if min(self.train, self.validation, self.test) == 0.0:
            raise ValueError("split: train, validation and test must each be above 0")
        return self


@config_section
class HubData:
    id: str
    """Name of the data set, OWNER/NAME."""
    config: str | None
    """Name of the data set's configuration, if it has several."""
    revision: str
    """Commit, or a branch, which can move to another commit."""
    splits: Annotated[list[str], Field(min_length=1)]
    """Splits to read, one after the other."""

    @model_validator(mode="after")
    def _refuse_defunct(self) -> "HubData":
        if self.id.rpartition("/")[2] == "eli5" and self.id.partition("/")[0] in ("eli5", "defunct-datasets"):
            raise ValueError(
                f"data.hub.id={self.id}: the data set of the original guide is defunct: its source, Reddit's archive,"
                " was closed, and the Hub no longer serves it. Use data.name=eli5_category (the guide's own successor)"
                " or data.name=eli5_parquet (with r/askscience) instead"
            )
        return self


_ADDRESS_PASSWORD = re.compile(r"(://[^/@:]*):[^/@]+@")
_QUERY_SECRET = re.compile(
    r"([?&][^=&]*(?:token|secret|password|signature|credential|api_?key|sig)=)[^&]+", re.IGNORECASE
)


def mask_credentials(path: str) -> str | None:
    """Replace the passwords and tokens in `path` by ***; return None if it has none."""
    masked = _QUERY_SECRET.sub(r"\1***", _ADDRESS_PASSWORD.sub(r"\1:***@", path))
    return masked if masked != path else None


# URL schemes that both DVC (as a dependency) and fsspec can read, with the DVC package that each requires.
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
_DOWNLOAD_REMEDY = "download the file, and set the path to it"
_SCHEME_REMEDIES = {
    "hf": "set data.name=hub and, in conf/data/hub.yaml, hub.id=OWNER/NAME",
    "file": "write the path without file://",
    "local": "write the path without local://",
    "gcs": "write gs://",
    "sftp": "write ssh://",
    "s3a": "write s3://",
    **dict.fromkeys(
        ("zip", "tar", "libarchive"), "archives are not supported: unpack it, and set the path to the directory"
    ),
}


def explain_unreadable_path(path: str) -> str | None:
    """Explain why `path` cannot be a dependency of DVC, with a remedy; return None if it can be one.

    For an unknown scheme, DVC assumes a relative path or reports an error about its own configuration.
    """
    if path.startswith("~"):
        return "~ is not expanded: write the absolute path"
    scheme, separator, _ = path.partition("://")
    if not separator:
        return None
    if "::" in path:
        return f"chained URLs are not supported: {_SCHEME_REMEDIES.get(scheme, _DOWNLOAD_REMEDY)}"
    if scheme not in REMOTES:
        remedy = _SCHEME_REMEDIES.get(scheme, _DOWNLOAD_REMEDY)
        return f"not a URL that both DVC and fsspec can read ({', '.join(REMOTES)}): {remedy}"
    if find_spec(package := REMOTES[scheme]) is None:
        name = package.replace("_", "-")
        return f"DVC reads {scheme}:// with {name}, which is not installed: `uv pip install {name}`"
    return None


@config_view
class SourceData:
    """Values of conf/data/NAME.yaml that the stage `download` reads."""

    source: Literal["sample", "files", "hub", "sources"]
    """sample: the embedded corpus; files: the files at `path`; hub: a data set of the Hub; sources: several sources."""
    path: str
    """File, directory or URL (http, https, or s3, gs, ssh, ... with DVC's package for it); ignored by hub."""
    hub: HubData | None
    """Data set of the Hub; null unless source is hub."""
    sources: Annotated[list[Annotated[str, Field(pattern=r"^\w[\w.-]*$")]], Field(min_length=1)] | None
    """Names of sources in params.yaml; null unless source is sources."""
    columns: Columns
    """Columns of a record that correspond to ELI5's fields."""
    filter: dict[str, Annotated[list[str | bool | int | float], Field(min_length=1)]] | None
    """Column to its allowed values; a record must match all columns. null or {}: no filter."""
    text_record: Literal["file", "paragraph", "line"]
    """Unit of plain text that becomes a record."""
    max_records: Positive | None
    """Read only the first N records that pass the filter; null: all."""
    on_bad_record: Literal["error", "skip"]
    """error: a malformed record is an error with its file and line; skip: leave it out and count it in the ledger."""
    deduplicate: Literal["none", "exact", "near"]
    """exact: drop repeated documents; near: also drop near duplicates of held-out documents from train."""
    count_near_duplicates: bool
    """If True, count near duplicates between splits even if they are kept; needs memory per held-out document."""
    clean: list[Step]
    """Steps that remove or change texts, in this order (docs/data.md)."""
    groups: list[str]
    """Columns by which the metrics are also reported, one group per value."""
    split: Split | None
    """Division of the records into train, validation and test; null: no splits, for texts that are only evaluated."""

    @property
    def needs_signatures(self) -> bool:
        """True if near duplicates are counted or dropped."""
        return self.split is not None and (self.count_near_duplicates or self.deduplicate == "near")

    @model_validator(mode="after")
    def _check_source_options(self) -> "SourceData":
        if masked := mask_credentials(self.path):
            raise ValueError(
                f"data.path={masked}: credentials in a path would be written to dvc.lock and logs; remove them, and put"
                " them in the configuration of fsspec (~/.config/fsspec/*.json or an environment variable such as"
                " FSSPEC_HTTPS, docs/security.md)"
            )
        if self.source == "sample" and self.path != SAMPLE:
            raise ValueError(
                f"data.path={self.path}: data.name=sample only reads {SAMPLE}; set data.name=files for your own text"
            )
        if self.source == "hub" and self.hub is None:
            raise ValueError("data.hub is missing: set hub.id and hub.revision for data.source=hub")
        if (self.source == "sources") != (self.sources is not None):
            raise ValueError(
                "data.sources is missing: set it to the names of the sources that data.source=sources combines"
                if self.sources is None
                else f"data.sources has no meaning for data.source={self.source}: set sources: null"
            )
        if self.source == "sources" and (self.split is None or self.split.by != "source"):
            raise ValueError("data.split.by: data.source=sources uses the splits of its sources: set split.by: source")
        if self.split is None and self.deduplicate == "near":
            raise ValueError("data.deduplicate=near compares splits, but data.split is null: set deduplicate: exact")
        if self.source == "sources" and self.clean:
            raise ValueError(
                "data.clean has no meaning for data.source=sources: set it in the configuration of each source"
            )
        if self.source != "hub" and self.hub is not None:
            raise ValueError(f"data.hub has no meaning for data.source={self.source}: set hub: null")
        if not self.path.strip():
            raise ValueError("data.path is empty: set it to a file, a directory or a URL")
        if reason := explain_unreadable_path(self.path):
            raise ValueError(f"data.path={printable(self.path)}: {reason}")
        return self
