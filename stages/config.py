"""The schema of conf/: types, ranges and cross-field rules of what Hydra composes, and the errors that name a key."""

import difflib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from stages.errors import ConfigError

Schema = TypeVar("Schema")
CONF = Path(__file__).resolve().parent.parent / "conf"

# `part`: a stage's view of a config or file that other stages read too. `whole`: a section that belongs to its reader,
# where an unknown key is a mistake.
_COMMON = ConfigDict(strict=True, use_attribute_docstrings=True)
part = dataclass(kw_only=True, config=ConfigDict(**_COMMON, extra="ignore"))
whole = dataclass(kw_only=True, config=ConfigDict(**_COMMON, extra="forbid"))

Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


def load(schema: type[Schema], composed: DictConfig, stage: str, unchosen: list[str] | None = None) -> Schema:
    """`composed` as an instance of `schema`; fields that the schema does not name are left out.

    Args:
        unchosen: config groups of which no configuration was composed: what they lack is reported once a group.

    Raises:
        ConfigError: naming every missing, unknown, mistyped or out-of-range key at once.
    """
    values = _without_missing(OmegaConf.to_container(composed, resolve=True))
    try:
        return TypeAdapter(schema).validate_json(json.dumps(values))
    except ValidationError as error:
        problems = [f"{group} is not chosen: add {group}=NAME, one of {_choices(group)}" for group in unchosen or []]
        # A rule may find several things, a line each.
        found = [problem for item in error.errors() for problem in _problem(dict(item), stage).split("\n")]
        problems += [problem for problem in found if not (unchosen and problem.endswith(" is missing"))]
        raise ConfigError(list(dict.fromkeys(problems))) from None


def _without_missing(value: Any) -> Any:
    """`value` without the keys whose value is OmegaConf's sign for a missing one."""
    if not isinstance(value, dict):
        return value
    return {key: _without_missing(item) for key, item in value.items() if item != "???"}


def _choices(group: str) -> str:
    return ", ".join(sorted(file.stem for file in (CONF / group).glob("*.yaml")))


def _problem(item: dict[str, Any], stage: str) -> str:
    key = ".".join(str(step) for step in item["loc"])
    if item["type"] == "value_error":  # a rule of ours: the message says it all
        return str(item["ctx"]["error"])
    if item["type"] == "missing":
        return f"{key} is missing"
    if item["type"] == "unexpected_keyword_argument":
        return f"{key} is not a key that {stage} knows"
    text = item["msg"][0].lower() + item["msg"][1:]
    return f"{key}={json.dumps(item['input'], ensure_ascii=False)}: {text.replace('input should', 'it should')}"


def nearest(name: str, names: list[str]) -> str:
    """`did you mean X?` for the name most like `name`, or which names there are."""
    found = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    if found:
        return f"did you mean {found[0]}?"
    return f"there are {', '.join(names)}" if len(names) <= 12 else "nothing is spelt like it"


# -- conf/data ---------------------------------------------------------------------------------------------------------

SAMPLE = "data/sample/askscience.jsonl"


@whole
class Columns:
    title: str | None
    """Column of the title that decides a record's split; null where records have none."""
    texts: Annotated[list[str], Field(min_length=1)]
    """Columns that hold a text or a list of texts; a dotted name goes into a nested field."""


@whole
class Split:
    by: Literal["hash", "source"]
    """hash: of the normalised title (of the text where there is none); source: the source's own splits."""
    seed: Seed
    """Draws another hash split."""
    train: Fraction
    validation: Fraction
    test: Fraction

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


@part
class SourceData:
    """What `download` reads of conf/data/NAME.yaml."""

    source: Literal["sample", "files", "hub"]
    path: str
    """File, directory or fsspec URL; ignored by hub."""
    hub: HubData | None
    columns: Columns
    filter: dict[str, Annotated[list[str | bool | int | float], Field(min_length=1)]] | None
    """Column to the values that a record may have there; a record must match all. null or {}: none."""
    text_record: Literal["file", "paragraph", "line"]
    """What a record of plain text is."""
    max_records: Positive | None
    """The first N records that pass the filter; null: all."""
    on_bad_record: Literal["error", "skip"]
    deduplicate: Literal["none", "exact", "near"]
    """exact: drop documents that came before; near: and those of train that nearly stand in validation or test."""
    count_near_duplicates: bool
    """Look for near duplicates across the split where they are not dropped, too; costs memory per held-out document."""
    split: Split

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
        if self.source != "hub" and self.hub is not None:
            raise ValueError(f"data.hub has no meaning for data.source={self.source}: set hub: null")
        if any(character in self.path for character in "'\"\n\\") or self.path != self.path.strip() or not self.path:
            raise ValueError(
                f"data.path={self.path!r}: quotes, backslashes and outer spaces cannot be passed on; rename it"
            )
        return self


@whole
class Flatten:
    columns: Annotated[list[Literal["title", "selftext", "answers.text"]], Field(min_length=1)]
    """Columns of ELI5's schema that make up a document's text, in this order."""
    joiner: str
    """Stands between them, and between the answers."""


# -- conf/model --------------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@whole
class TrainedTokenizer:
    vocab_size: Annotated[int, Field(ge=257 + len(SPECIAL_TOKENS))]
    """Tokens, the 256 bytes and the special tokens included."""
    special_tokens: dict[str, str]
    """Role (eos_token, mask_token, ...) to token; ids follow this order from 0. cls and sep wrap a document."""

    @model_validator(mode="after")
    def _known_roles(self) -> "TrainedTokenizer":
        for role in self.special_tokens:
            if role not in SPECIAL_TOKENS:
                raise ValueError(f"tokenizer.train.special_tokens.{role} is not a role: {', '.join(SPECIAL_TOKENS)}")
        return self


@whole
class TokenizerSource:
    """Either `train`, or `path` with a pin: a Hub `revision` or the hashes of local `files`."""

    train: TrainedTokenizer | None = None
    path: str | None = None
    revision: str | None = None
    files: dict[str, str] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "TokenizerSource":
        if (self.train is None) == (self.path is None):
            raise ValueError("model.tokenizer: give either `train` or `path`")
        if self.path is not None:
            check_pin("model.tokenizer", self.path, self.revision, self.files)
        return self


@part
class ModelTokenizer:
    """What `tokenize` reads of conf/model/NAME.yaml."""

    tokenizer: TokenizerSource


@part
class Model:
    """What baseline and train read of conf/model/NAME.yaml."""

    task: Literal["causal", "mlm"]
    """The task that the architecture is for."""
    path: str | None
    """A Hub repository or a local directory; null: built from `config` alone."""
    revision: str | None
    files: dict[str, str] | None
    """File name to sha256 of a local directory, as tools/pin_model writes them."""
    from_scratch: bool
    """Fresh weights, whatever `path` holds."""
    max_positions: Positive
    """Tokens that the model can attend to; checked against the model itself when it is built."""
    config: dict[str, Any]
    """Values that override the architecture's configuration."""

    @model_validator(mode="after")
    def _buildable(self) -> "Model":
        if self.path is not None:
            check_pin("model", self.path, self.revision, self.files)
        elif not self.from_scratch:
            raise ValueError("model.path is missing: a model that is not from_scratch needs one")
        elif "model_type" not in self.config:
            raise ValueError("model.config.model_type is missing: a model without path needs its architecture's name")
        return self


def origin(source: TokenizerSource | Model) -> dict[str, Any] | None:
    """For a ledger, what `source` is pinned to: a Hub revision, or the hashes of local files, wherever they stand."""
    if source.path is None:
        return None
    if source.revision is not None:
        return {"path": source.path, "revision": source.revision}
    return {"path": Path(source.path).name, "files": source.files}


def check_task(model: Model, task: str) -> None:
    """Raise ValueError unless `model` is for `task`."""
    if model.task != task:
        raise ValueError(f"{task}.model: this model is for task={model.task}")


def check_pin(where: str, path: str, revision: str | None, files: dict[str, str] | None) -> None:
    """Raise ValueError unless `path` is pinned by exactly one of a revision and file hashes."""
    if (revision is None) == (files is None):
        raise ValueError(
            f"{where}.path={path} is not pinned: a Hub repository needs `revision` (a commit),"
            f" a local directory `files` (run: python -m tools.pin_model DIRECTORY)"
        )


# -- conf/adapter ------------------------------------------------------------------------------------------------------


@whole
class Adapter:
    """Train low-rank additions to a model's linear layers in place of its weights (LoRA, arXiv 2106.09685)."""

    rank: Positive
    """Inner size of an addition."""
    alpha: Annotated[float, Field(gt=0.0)]
    """An addition is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    """Of an addition's inputs while training."""
    targets: Annotated[list[str], Field(min_length=1)] | None
    """Ends of the names of the layers that get one; null: every linear layer but the output embedding."""
    merge: bool
    """Write the model with the additions in its weights; false: the additions alone, with the name of their model."""


# -- conf/task ---------------------------------------------------------------------------------------------------------


@whole
class Tokenize:
    wrap: Literal["end_of_sequence", "template"]
    """end_of_sequence: before the first and after every document; template: the tokenizer's own special tokens."""
    requires: list[Literal["eos_token", "mask_token"]]
    """Special tokens without which the task cannot be trained."""


@part
class ObjectiveName:
    name: Literal["causal", "mlm"]


# Architectures for which tests prove that documents of a block do not reach each other. (transformers' masks follow
# reset position_ids in the causal ones; the others need a mask of their own.)
ISOLATION_PROVEN = {"causal": ("gpt2", "gpt_neo", "gptj", "llama"), "mlm": ("bert", "modernbert", "roberta")}


def check_isolation(objective: "Objective", model_type: str | None) -> None:
    """Raise ValueError if documents are to be isolated in an architecture for which that is not proven."""
    if objective.isolate_documents and model_type not in (None, *ISOLATION_PROVEN[objective.name]):
        raise ValueError(
            f"objective.isolate_documents=true is not proven for {model_type} under {objective.name} (it is for"
            f" {', '.join(ISOLATION_PROVEN[objective.name])}): set isolate_documents: false in"
            f" conf/task/{objective.name}.yaml"
        )


@whole
class Objective:
    name: Literal["causal", "mlm"]
    isolate_documents: bool
    """Attention and positions restart at each document inside a block."""
    mlm_probability: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of the text tokens to predict (mlm)."""
    mask_replace_prob: Fraction | None = None
    """Share of these that the mask token replaces (mlm)."""
    random_replace_prob: Fraction | None = None
    """Share of these that a random token replaces (mlm); the rest stay as they are."""

    @model_validator(mode="after")
    def _matches_name(self) -> "Objective":
        masking = {
            "mlm_probability": self.mlm_probability,
            "mask_replace_prob": self.mask_replace_prob,
            "random_replace_prob": self.random_replace_prob,
        }
        wrong = [key for key, value in masking.items() if (value is None) == (self.name == "mlm")]
        if wrong:
            verb = "is missing" if self.name == "mlm" else "has no meaning"
            raise ValueError(f"objective.{wrong[0]} {verb} for objective.name={self.name}")
        if self.name == "mlm" and (self.mask_replace_prob or 0.0) + (self.random_replace_prob or 0.0) > 1.0 + 1e-9:
            raise ValueError("objective.mask_replace_prob + objective.random_replace_prob is above 1")
        return self


@whole
class Evaluate:
    context: Annotated[int, Field(ge=4)]
    """Tokens in a window of bits_per_byte and pseudo_bits_per_byte."""
    max_documents: Positive | None
    """Documents evaluated, evenly spaced over the split; null: all."""


@whole
class Samples:
    seed: Seed
    """Of the sampling (causal)."""
    max_new_tokens: Positive | None = None
    """Tokens generated after a prompt (causal)."""
    temperature: Annotated[float, Field(gt=0.0)] | None = None
    """Sampling temperature (causal)."""
    top_k: Positive
    """causal: sampled from this many most likely tokens; mlm: this many tokens are shown."""
    prompts: list[str]
    """causal: beginnings to complete; mlm: sentences with one {mask}."""


@whole
class EarlyStopping:
    patience: Positive
    """Evaluations without improvement before training stops."""
    threshold: Annotated[float, Field(ge=0.0)]
    """Improvement that counts, in units of trainer.metric_for_best_model."""


# -- conf/hardware -----------------------------------------------------------------------------------------------------


@whole
class Hardware:
    device: Literal["cpu", "cuda", "mps"]
    num_threads: Positive
    """Threads of a process on the CPU."""
    per_device_batch_size: Positive | None
    """Sequences at once on a device; null: the whole batch_size. Less means gradient accumulation."""
    evaluate_batch_tokens: Positive
    """Tokens at once in evaluation; changes no figure."""


@whole
class CheckpointSettings:
    """What a killed training goes on from; changes no result."""

    minutes: Annotated[float, Field(gt=0.0)]
    """Between two checkpoints."""
    keep: Positive
    """Checkpoints kept of a run that is not finished; the best one stays as well where it is asked for."""
