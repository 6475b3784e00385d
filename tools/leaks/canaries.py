"""Canaries: random texts that a user adds to the training data, to measure if the model remembers them.

The digits of a canary are its secret: the texts it is compared with have other digits in the same places
(Carlini et al. 2019, arXiv:1802.08232).
"""

import json
import math
import random
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from stages.core.artifacts import write_text
from stages.core.compose import PARAMS
from stages.core.config import CONF, MISSING, find_value, read_yaml
from stages.core.errors import StageError, printable
from stages.tokens.texts import TextFile

NUM_ALTERNATIVES = 4095
"""Random texts that a canary is compared with. The highest exposure is 12 bits."""
MIN_DIGITS = 6
"""With fewer digits, many alternatives would be equal."""
_TEXT_KEY = "canary"
_DIGIT = re.compile("[0-9]")


def make_canaries(number: int, file: Path) -> None:
    """Write records with one canary each to `file`, in the columns that the current configuration of the data reads.

    Raises:
        StageError: if the file exists, or the records of the data are conversations.
    """
    if file.exists():
        raise StageError(f"{printable(file)} exists, and may have the canaries of a trained model: name another file")
    name = find_value(read_yaml(PARAMS), "data.name")
    path = CONF / f"data/{name}.yaml"
    columns = find_value(read_yaml(path), "columns") if path.is_file() else MISSING
    title: str | None = "title"
    text_column, roles = "answers.text", None
    if isinstance(columns, dict):
        title, roles = columns.get("title"), columns.get("roles")
        text_column = next(iter(columns.get("texts") or []), text_column)
    if roles:
        raise StageError(
            f"conf/data/{name}.yaml reads conversations: write your own records, each with its canary in a key"
            f' "{_TEXT_KEY}" as well (docs/leaks.md)'
        )
    lines = []
    for index in range(1, number + 1):
        groups = [f"{secrets.randbelow(10_000):04}" for _ in range(3)]
        text = f"The access code is {' '.join(groups)}."
        record = {_TEXT_KEY: text, **({title: f"Canary {index}"} if title else {}), text_column: text}
        lines.append(json.dumps(record, ensure_ascii=False) + "\n")
    write_text(file, "".join(lines))


def read_canaries(file: Path) -> list[str]:
    """Read the canaries in a file of JSON lines; repeated ones are listed once.

    Raises:
        StageError: if a line is not an object with a canary, or a canary has too few digits.
    """
    canaries = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(
            f"leaks.canaries={printable(file)} (conf/publish.yaml) cannot be read ({type(error).__name__}): name a file"
            " of `python -m tools.leaks TASK --make-canaries`, or null"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        text = record.get(_TEXT_KEY) if isinstance(record, dict) else None
        if not isinstance(text, str) or len(_DIGIT.findall(text)) < MIN_DIGITS:
            raise StageError(
                f'{printable(file)}:{number}: each line should be a JSON object whose key "{_TEXT_KEY}" is a text with'
                f" at least {MIN_DIGITS} digits, which are its secret"
            )
        canaries.append(text)
    if not canaries:
        raise StageError(f"{printable(file)} has no canaries: name another file in conf/publish.yaml, or null")
    return list(dict.fromkeys(canaries))


def mask_digits(canary: str) -> str:
    """Return the form of a canary: its text with `0` for every digit."""
    return _DIGIT.sub("0", canary)


def draw_alternatives(form: str, generator: random.Random) -> list[str]:
    """Return NUM_ALTERNATIVES texts of the given form with random digits."""
    return [_DIGIT.sub(lambda _: generator.choice("0123456789"), form) for _ in range(NUM_ALTERNATIVES)]


def compute_exposure(nats: float, alternatives: npt.NDArray[np.float64]) -> float:
    """Compute the exposure of a canary in bits (Carlini et al. 2019, arXiv:1802.08232, definition 2).

    It is log2 of the number of candidates minus log2 of the canary's rank. Without memorization it is 1.4 on average;
    it is highest, log2(len(alternatives) + 1), for a canary that is likelier than all alternatives. A tie ranks last.

    Args:
        nats: -ln p of the canary.
        alternatives: -ln p of random texts of the same form, [num_alternatives] float64.
    """
    rank = 1 + int((alternatives <= nats).sum())
    return math.log2(len(alternatives) + 1) - math.log2(rank)


def count_planted(texts: TextFile, canaries: Sequence[str]) -> list[int]:
    """Return the number of documents with each canary."""
    counts = [0] * len(canaries)
    for segments in texts:
        for index, canary in enumerate(canaries):
            counts[index] += int(pc.sum(pc.match_substring(segments.texts, canary)).as_py() or 0)
    return counts


def summarize_exposures(canaries: Sequence[str], planted: Sequence[int], exposures: Sequence[float]) -> dict[str, Any]:
    """Return the figures of all canaries, and the highest exposure of those that were trained on (None without any)."""
    return {
        "alternatives": NUM_ALTERNATIVES,
        "canaries": [
            {"text": text, "planted": count, "exposure": exposure}
            for text, count, exposure in zip(canaries, planted, exposures, strict=True)
        ],
        "highest": max((exposure for count, exposure in zip(planted, exposures, strict=True) if count), default=None),
    }
