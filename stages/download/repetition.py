"""Repetition within a text: the rules of Gopher (Rae et al. 2021, "Scaling language models", table A1)."""

import re
from collections import Counter
from collections.abc import Sequence

from stages.download.cleaning_schema import RepetitionStep


def words_of(text: str) -> list[str]:
    """What stands between white space. (datatrove splits punctuation off, by a tokenizer for each language.)"""
    return text.split()


def why_repetitive(text: str, step: RepetitionStep) -> str | None:
    """The first of the rules that `text` breaks, as a reason; None if it breaks none."""
    words = words_of(text)
    if len(words) < step.minimum_words:
        return None
    # Not empty ones, which are as many as there are paragraphs.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    for name, parts, largest, largest_characters in (
        ("lines", lines, step.duplicate_lines, step.duplicate_line_characters),
        ("paragraphs", paragraphs, step.duplicate_paragraphs, step.duplicate_paragraph_characters),
    ):
        share, characters = duplicate_shares(parts, len(text))
        if share > largest:
            return f"{share:.2f} of the {name} stood there before, more than {largest:g}"
        if characters > largest_characters:
            return f"{characters:.2f} of the characters are in repeated {name}, more than {largest_characters:g}"
    length = len(" ".join(words))
    for num_words, largest in enumerate(step.top_ngrams, 2):
        ngram, share = top_ngram(words, num_words, length)
        if share > largest:
            return f"{share:.2f} of the characters are the {num_words} words {ngram!r}, more than {largest:g}"
    for num_words, largest in enumerate(step.duplicate_ngrams, 5):
        share = duplicate_ngram_share(words, num_words, length)
        if share > largest:
            return f"{share:.2f} of the characters are in repeated runs of {num_words} words, more than {largest:g}"
        if not share:  # then none of longer runs, either
            break
    return None


def duplicate_shares(parts: Sequence[str], length: int) -> tuple[float, float]:
    """The share of `parts` that equal an earlier one, and of `length` characters that these have."""
    seen: set[str] = set()
    duplicates = [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]
    return len(duplicates) / max(1, len(parts)), sum(map(len, duplicates)) / max(1, length)


def top_ngram(words: Sequence[str], num_words: int, length: int) -> tuple[str, float]:
    """The most frequent run of `num_words` words, and the share of `length` characters that it has.

    One that comes once is no repetition: ("", 0.0). (In datatrove it counts, so that short texts fail.)
    """
    counts = Counter(" ".join(words[start : start + num_words]) for start in range(len(words) - num_words + 1))
    if not counts:
        return "", 0.0
    ngram, count = counts.most_common(1)[0]
    return (ngram, len(ngram) * count / length) if count > 1 else ("", 0.0)


def duplicate_ngram_share(words: Sequence[str], num_words: int, length: int) -> float:
    """The share of `length` characters in runs of `num_words` words that stood there before, none counted twice."""
    seen: set[str] = set()
    characters = start = 0
    while start <= len(words) - num_words:
        ngram = " ".join(words[start : start + num_words])
        if ngram in seen:
            characters += len(ngram)
            start += num_words
        else:
            seen.add(ngram)
            start += 1
    return characters / length
