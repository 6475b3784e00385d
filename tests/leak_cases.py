"""Leak reports and limits for tests."""

from typing import Any

from tools.leaks.report import DEFINITIONS, LeakLimits

SECRET = "a sentence of the training text"


def make_limits(**changes: Any) -> LeakLimits:
    values = {"max_verbatim_share": 0.01, "max_membership_auc": 0.95, "max_exposure": 10.0, "canaries": None}
    return LeakLimits(**values | changes)


def make_report(share: float = 0.0, auc: float = 0.5, exposure: float | None = None, **changes: Any) -> dict[str, Any]:
    """Return a report on a causal model with these figures, and an example that quotes SECRET."""
    share_of = {"documents": 100, "too_short": 0, "exact": 0, "near_verbatim": round(100 * share), "share": share}
    piece = {"train": 100, "held_out": 50, "auc": auc, "low": 0.0, "high": 1.0, "tpr": 0.1, "fpr": 1 / 51}
    example = {"record": 3, "edit_distance": 0.0, "prompt": SECRET, "document": SECRET, "model": SECRET}
    canary = {"text": f"{SECRET} 123456", "planted": 1, "exposure": exposure}
    report = {
        "definitions": DEFINITIONS,
        "task": "causal",
        "examined": {},
        "canaries_sha256": None,
        "objective": "causal",
        "documents": 200,
        "seed": 0,
        "continuation": {
            "prompt_tokens": 50,
            "continuation_tokens": 50,
            "train": {**share_of, "low": 0.0, "high": 1.0},
            "held_out": {**share_of, "share": 0.0, "low": 0.0, "high": 1.0},
            "examples": [example],
        },
        "membership": [{"tokens": 32, **piece}, {"tokens": 128, **piece, "auc": 1.0}],
        "exposure": None if exposure is None else {"alternatives": 4095, "canaries": [canary], "highest": exposure},
        "versions": {},
    }
    return report | changes
