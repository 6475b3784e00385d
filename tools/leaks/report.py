"""Report of `python -m tools.leaks`: its file, the limits of conf/publish.yaml, and its section in the model card."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from stages.core.artifacts import compute_sha256, read_json
from stages.core.config import Fraction, config_section
from stages.core.errors import StageError
from tools.leaks.canaries import read_canaries
from tools.lock_history import get_hashes

DEFINITIONS = 2
"""Version of the definitions of the figures; a report of another version is made again."""
DEFAULT_DOCUMENTS = 200
"""Highest number of documents of train, and of held-out ones. A report on fewer is not used for publishing."""


@config_section
class LeakLimits:
    """Limits of the leak report above which publishing is refused, and the planted canaries."""

    max_verbatim_share: Fraction | None
    """Highest share of documents of train that the model continues near-verbatim; null: no limit (masked models)."""
    max_membership_auc: Fraction | None
    """Highest AUC of telling documents of train from held-out ones by 32 tokens (0.5: by chance); null: no limit."""
    max_exposure: Annotated[float, Field(ge=0.0)] | None
    """Highest exposure of a planted canary in bits (of at most 12); null: no limit."""
    canaries: str | None
    """File of the canaries in the data (`python -m tools.leaks TASK --make-canaries`); null: none are planted."""

    @property
    def has_limits(self) -> bool:
        return any(limit is not None for limit in (self.max_verbatim_share, self.max_membership_auc, self.max_exposure))


class Figure(NamedTuple):
    """A figure of the report, formatted for a table."""

    name: str
    value: str
    interval: str
    """95 % interval; empty if there is none."""
    held_out: str
    """The same figure of held-out documents, or its value for a model that remembers nothing; empty if unknown."""
    limit: str
    """Empty if there is no limit."""
    is_above: bool
    """True if the value is above the limit."""


class Excess(NamedTuple):
    """A figure above its limit."""

    key: str
    """Key of the limit in `leaks` of conf/publish.yaml."""
    value: float
    limit: float


def get_report_path(task: str) -> Path:
    return Path(f"reports/leaks/{task}.json")


def get_examined_hashes(stages: Mapping[str, Any], task: str) -> dict[str, str]:
    """Return the md5 sums of the artifacts that a report is about: path to md5.

    Args:
        stages: stage name to its entry in dvc.lock.
    """
    evaluate = stages.get(f"evaluate@{task}", {})
    found = get_hashes(stages.get("download", {}), "outs") | get_hashes(evaluate, "deps") | get_hashes(evaluate, "outs")
    names = (
        "data/raw",
        f"data/tokens/{task}",
        f"reports/baseline/{task}",
        f"models/{task}",
        f"reports/evaluate/{task}",
    )
    return {name: found.get(name, "") for name in names}


def hash_canaries(limits: LeakLimits) -> str | None:
    """Return the hash of the file of canaries; None if none are planted.

    Raises:
        StageError: if the file cannot be read, or has no valid canaries.
    """
    if limits.canaries is None:
        return None
    read_canaries(Path(limits.canaries))
    return compute_sha256(Path(limits.canaries))


def read_report(task: str, stages: Mapping[str, Any], limits: LeakLimits) -> tuple[dict[str, Any] | None, str]:
    """Read the report on the current model.

    Args:
        stages: stage name to its entry in dvc.lock.

    Returns:
        The report, or None if there is none on this model or it is on too few documents; and the reason for None.

    Raises:
        StageError: as `hash_canaries`.
    """
    file = get_report_path(task)
    if not file.is_file():
        return None, f"{file} does not exist"
    try:
        report = read_json(file)
    except StageError:
        report = None
    if not isinstance(report, dict) or report.get("definitions") != DEFINITIONS:
        return None, f"{file} is damaged or was written by another version"
    if report.get("examined") != get_examined_hashes(stages, task):
        return None, f"{file} is about another model or other data"
    if report.get("canaries_sha256") != hash_canaries(limits):
        return None, f"{file} is about other canaries"
    if report["documents"] < DEFAULT_DOCUMENTS:
        return None, f"{file} was made with --documents {report['documents']}, below {DEFAULT_DOCUMENTS}"
    return report, ""


def find_excesses(report: Mapping[str, Any], limits: LeakLimits) -> list[Excess]:
    """Return the figures above their limits. Estimates are compared, not the bounds of their intervals.

    With few held-out documents, an interval is so wide that its lower bound would hide even perfect recognition.
    """
    values = {
        "max_verbatim_share": ((report["continuation"] or {}).get("train") or {}).get("share"),
        "max_membership_auc": report["membership"][0]["auc"] if report["membership"] else None,
        "max_exposure": (report["exposure"] or {}).get("highest"),
    }
    return [
        Excess(key, value, limit)
        for key, value in values.items()
        if value is not None and (limit := getattr(limits, key)) is not None and value > limit
    ]


def find_unmeasured(report: Mapping[str, Any]) -> dict[str, str]:
    """Return the key of the limit of each figure that could not be measured, with the reason.

    A figure that does not apply is not listed: continuations of a masked model, exposure without a file of canaries.
    """
    reasons = {}
    if report["continuation"] is not None and report["continuation"]["train"] is None:
        reasons["max_verbatim_share"] = "no document of train has 16 tokens within evaluate.context"
    if report["membership"] is None:
        reasons["max_membership_auc"] = (
            "the weights before all training are unknown, since git does not have the dvc.lock of a model that this one"
            " started from"
        )
    elif not report["membership"]:
        reasons["max_membership_auc"] = (
            "train or the held-out splits have no document of 16 tokens within evaluate.context"
        )
    if report["exposure"] is not None and report["exposure"]["highest"] is None:
        reasons["max_exposure"] = "none of the canaries is in a document of train"
    return reasons


def explain_refusal(report: Mapping[str, Any], limits: LeakLimits) -> str:
    """Return why publishing is refused, and the remedies; empty if it is allowed.

    It is refused if a figure is above its limit, or has a limit but could not be measured.
    """
    task, parts = report["task"], []
    if excesses := find_excesses(report, limits):
        shown = "; ".join(f"{item.key}: {item.value:.4g} is above {item.limit:g}" for item in excesses)
        parts.append(
            f"models/{task} gives away more of its training text than conf/publish.yaml allows ({task}.leaks):"
            f" {shown}\n  `python -m tools.leaks {task}` shows where. Train for fewer epochs, on more or deduplicated"
            " text or with a smaller model, or raise the limit: the card then shows the figure and the limit"
        )
    unmeasured = {key: why for key, why in find_unmeasured(report).items() if getattr(limits, key) is not None}
    if unmeasured:
        shown = "; ".join(f"{key}: {why}" for key, why in unmeasured.items())
        parts.append(
            f"conf/publish.yaml sets a limit for what could not be measured for models/{task} ({task}.leaks): {shown}\n"
            "  docs/leaks.md says how to have it measured. To publish without it, set"
            f" {', '.join(f'{key}: null' for key in unmeasured)}: the card then says that it was not measured"
        )
    return "\n".join(parts)


def list_figures(report: Mapping[str, Any], limits: LeakLimits) -> Iterator[Figure]:
    """Yield the figures of a report, as rows of a table."""
    above = {item.key for item in find_excesses(report, limits)}

    def format_limit(key: str, form: str) -> str:
        limit = getattr(limits, key)
        return "" if limit is None else format(limit, form)

    if train := (report["continuation"] or {}).get("train"):
        held_out, key = report["continuation"]["held_out"], "max_verbatim_share"
        yield Figure(
            "near-verbatim continuations",
            f"{train['share']:.1%}",
            f"{train['low']:.1%} to {train['high']:.1%}",
            f"{held_out['share']:.1%}" if held_out else "",
            format_limit(key, ".1%"),
            key in above,
        )
    for number, found in enumerate(report["membership"] or []):
        key, length = "max_membership_auc", f"{found['tokens']} tokens"
        yield Figure(
            f"membership AUC, {length}",
            f"{found['auc']:.3f}",
            f"{found['low']:.3f} to {found['high']:.3f}",
            "0.5",
            "" if number else format_limit(key, ".3f"),
            not number and key in above,
        )
        yield Figure(
            f"TPR at 1 % FPR, {length}",
            f"{found['tpr']:.1%}",
            "",
            f"{found['fpr']:.1%}",
            "",
            False,
        )
    if (report["exposure"] or {}).get("highest") is not None:
        key = "max_exposure"
        highest = report["exposure"]["highest"]
        yield Figure(
            "highest exposure of a canary (bits)", f"{highest:.1f}", "", "", format_limit(key, ".1f"), key in above
        )


def list_notes(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield what was measured on which documents, and what was not measured and why."""
    continuation, membership, exposure = report["continuation"], report["membership"], report["exposure"]
    unmeasured = find_unmeasured(report)
    if continuation is None:
        yield "A masked model does not continue text, so no continuations were measured."
    elif continuation["train"] is None:
        yield f"Continuations were not measured: {unmeasured['max_verbatim_share']}."
    else:
        train, held_out = continuation["train"], continuation["held_out"] or {"documents": 0}
        yield (
            f"Continuations: the model is given the first half of a document (at most {continuation['prompt_tokens']}"
            " tokens) and continues it greedily; near-verbatim: at most 10 % of at most"
            f" {continuation['continuation_tokens']} tokens differ by edit distance. {train['documents']:,} documents"
            f" of train ({train['exact']:,} exact), {held_out['documents']:,} held out."
        )
    if membership:
        yield (
            "Membership: documents of train are told from held-out ones by the share of bits of their first tokens that"
            f" training saved since the initial weights: {membership[0]['train']:,} documents of train,"
            f" {membership[0]['held_out']:,} of validation and test. AUC: probability that the one of train is"
            " recognized in a pair of documents; TPR at 1 % FPR: share of train that is found while at most 1 % of"
            " these held-out documents are taken for it. Of other held-out documents, about"
            f" {membership[0]['fpr']:.1%} would be."
        )
    else:
        yield f"Membership was not measured: {unmeasured['max_membership_auc']}."
    if exposure is None:
        yield "No canaries are planted."
    else:
        planted = sum(item["planted"] > 0 for item in exposure["canaries"])
        yield (
            f"Canaries: {planted} of {len(exposure['canaries'])} are in train. Exposure is 12 bits for a canary that is"
            f" likelier than {exposure['alternatives']:,} random texts of its form, and 1.4 bits on average without"
            " memorization."
        )


def render_memorization_section(report: Mapping[str, Any] | None, limits: LeakLimits) -> str:
    """Return the section of the model card: figures and limits, without any training text.

    Args:
        report: report on the model of the card; None if it was not examined.
    """
    if report is None:
        return "Not examined: conf/publish.yaml sets no limits of memorization."
    rows = ["| measure | train | 95 % interval | held out | limit |\n|---|---|---|---|---|"]
    for figure in list_figures(report, limits):
        limit = f"{figure.limit} (exceeded)" if figure.is_above else figure.limit
        rows.append(f"| {figure.name} | {figure.value} | {figure.interval} | {figure.held_out} | {limit} |")
    parts = [
        "How much of its training text the model gives away, by `python -m tools.leaks`. Low figures do not prove that"
        " nothing can be extracted.",
        *(["\n".join(rows)] if len(rows) > 1 else []),
        " ".join(list_notes(report)),
    ]
    return "\n\n".join(parts)
