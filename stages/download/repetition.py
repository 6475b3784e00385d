"""Repetition within a text: the rules of Gopher (Rae et al. 2021, "Scaling language models", table A1)."""

import re
from collections import Counter
from collections.abc import Sequence

from stages.download.cleaning_schema import RepetitionStep


def split_words(text: str) -> list[str]:
    """Split `text` at white space. (datatrove also separates punctuation, with a tokenizer per language.)"""
    return text.split()


def check_repetition(text: str, step: RepetitionStep) -> str | None:
    """Return the reason for the first rule that `text` breaks; None if it breaks none."""
    words = split_words(text)
    if len(words) < step.minimum_words:
        return None
    # Without empty lines, which would repeat between paragraphs.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    for name, parts, largest, largest_characters in (
        ("lines", lines, step.duplicate_lines, step.duplicate_line_characters),
        ("paragraphs", paragraphs, step.duplicate_paragraphs, step.duplicate_paragraph_characters),
    ):
        share, characters = compute_duplicate_shares(parts, len(text))
        if share > largest:
            return f"{share:.2f} of the {name} stood there before, more than {largest:g}"
        if characters > largest_characters:
            return f"{characters:.2f} of the characters are in repeated {name}, more than {largest_characters:g}"
    length = len(" ".join(words))
    for num_words, largest in enumerate(step.top_ngrams, 2):
        ngram, share = find_top_ngram(words, num_words, length)
        if share > largest:
            return f"{share:.2f} of the characters are the {num_words} words {ngram!r}, more than {largest:g}"
    for num_words, largest in enumerate(step.duplicate_ngrams, 5):
        share = compute_duplicate_ngram_share(words, num_words, length)
        if share > largest:
            return f"{share:.2f} of the characters are in repeated runs of {num_words} words, more than {largest:g}"
        if not share:  # longer n-grams do not repeat, either
            break
    return None


def compute_duplicate_shares(parts: Sequence[str], length: int) -> tuple[float, float]:
    """Compute the share of `parts` that repeat an earlier one, and their share of `length` characters."""
    seen: set[str] = set()
    duplicates = [part for part in parts if part in seen or seen.add(part)]  # type: ignore[func-returns-value]
    return len(duplicates) / max(1, len(parts)), sum(map(len, duplicates)) / max(1, length)


def find_top_ngram(words: Sequence[str], num_words: int, length: int) -> tuple[str, float]:
    """Find the most frequent n-gram of `num_words` words, and its share of `length` characters.

    If no n-gram is repeated, return ("", 0.0). (datatrove also counts a single occurrence, so that short texts fail.)
    """
    counts = Counter(" ".join(words[start : start + num_words]) for start in range(len(words) - num_words + 1))
    if not counts:
        return "", 0.0
    ngram, count = counts.most_common(1)[0]
    return (ngram, len(ngram) * count / length) if count > 1 else ("", 0.0)


def compute_duplicate_ngram_share(words: Sequence[str], num_words: int, length: int) -> float:
    """Compute the share of `length` characters in repeated n-grams of `num_words` words, without overlaps."""
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
