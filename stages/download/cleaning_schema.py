"""Schema of `clean` in conf/data: steps that remove or change texts, with published thresholds as defaults."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stages.core.config import Fraction, Positive, config_section
from stages.core.errors import printable


@config_section
class WordsStep:
    """Removes texts with too few or too many words. A word is separated by white space and has a letter or digit.

    Gopher uses 50 and 100,000 (Rae et al. 2021, A1.1).
    """

    step: Literal["words"]
    minimum: Positive | None = None
    """Minimum number of words in a text; null: no minimum."""
    maximum: Positive | None = None
    """Maximum number of words in a text; null: no maximum."""

    @model_validator(mode="after")
    def _check_bounds(self) -> "WordsStep":
        if self.minimum is None and self.maximum is None:
            raise ValueError("data.clean: step words needs minimum or maximum: {step: words, minimum: 50}")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"data.clean: words: minimum={self.minimum} is above maximum={self.maximum}")
        return self


@config_section
class RepetitionStep:
    """Removes texts that repeat themselves. Thresholds of Gopher (Rae et al. 2021, table A1), as in datatrove."""

    step: Literal["repetition"]
    minimum_words: Positive = 50
    """Skip shorter texts: in one or two sentences, a repeated name can be a fifth of the text."""
    duplicate_lines: Fraction = 0.30
    """Maximum share of lines that repeat an earlier line."""
    duplicate_paragraphs: Fraction = 0.30
    """Maximum share of paragraphs that repeat an earlier paragraph."""
    duplicate_line_characters: Fraction = 0.20
    """Maximum share of characters in repeated lines."""
    duplicate_paragraph_characters: Fraction = 0.20
    """Maximum share of characters in repeated paragraphs."""
    top_ngrams: Annotated[list[Fraction], Field(min_length=3, max_length=3)] = field(
        default_factory=lambda: [0.20, 0.18, 0.16]
    )
    """Maximum share of characters in the most frequent n-gram of 2, 3 and 4 words."""
    duplicate_ngrams: Annotated[list[Fraction], Field(min_length=6, max_length=6)] = field(
        default_factory=lambda: [0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    )
    """Maximum share of characters in repeated n-grams of 5 to 10 words."""


@config_section
class NonTextStep:
    """Removes tables, code and lists of numbers. The first two rules are Gopher's (Rae et al. 2021, A1.1)."""

    step: Literal["non_text"]
    words_with_letter: Fraction = 0.8
    """Minimum share of words with a letter."""
    symbols_per_word: Annotated[float, Field(ge=0.0)] = 0.1
    """Maximum number of hash signs per word, and of ellipses per word."""
    other_characters: Fraction = 0.4
    """Maximum share of digits, punctuation and symbols among the characters other than white space."""


@config_section
class LanguageStep:
    """Removes texts in other languages, identified offline by fastText's lid.176 (Joulin et al. 2016)."""

    step: Literal["language"]
    languages: Annotated[list[Annotated[str, Field(pattern="^[a-z]{2,3}$")]], Field(min_length=1)]
    """ISO 639 codes of the languages to keep: [en, de]."""
    minimum_score: Fraction = 0.65
    """Minimum probability of the text's language (default of datatrove; short texts have lower probabilities)."""


@config_section
class MaskStep:
    """Replaces personal data by a placeholder: [email], [ip] (public addresses only), [phone]."""

    step: Literal["mask"]
    kinds: Annotated[list[Literal["email", "ip", "phone"]], Field(min_length=1)] = field(
        default_factory=lambda: ["email", "ip", "phone"]
    )
    """Kinds of data to replace. Phone numbers: international (+49 30 ...), (212) 555-0123 and 212-555-0123."""


@config_section
class OverlapStep:
    """Removes texts that share a sequence of words with given files, for example test sets, to avoid contamination."""

    step: Literal["overlap"]
    files: Annotated[dict[str, str], Field(min_length=1)]
    """Local file to its SHA-256 (sha256:...). The suffix gives the format, as for data.path; all columns are read."""
    words: Annotated[int, Field(ge=2)] = 13
    """Length of the sequence, ignoring case and punctuation (13: Brown et al. 2020, appendix C)."""


STEPS = {
    "words": WordsStep,
    "repetition": RepetitionStep,
    "non_text": NonTextStep,
    "language": LanguageStep,
    "mask": MaskStep,
    "overlap": OverlapStep,
}


def _check_step_name(value: Any) -> Any:
    """Return `value` if it names a step.

    Raises:
        ValueError: if it does not. Pydantic's own message would be about tags and discriminators.
    """
    name = value.get("step") if isinstance(value, dict) else getattr(value, "step", None)
    steps = f"each step is a mapping such as {{step: words, minimum: 50}}; steps: {', '.join(STEPS)}"
    if name is None:
        raise ValueError(f"data.clean: {steps}")
    if not isinstance(name, str) or name not in STEPS:
        raise ValueError(f"data.clean: there is no step {printable(repr(name))}: {steps}")
    return value


Step = Annotated[
    Annotated[
        WordsStep | RepetitionStep | NonTextStep | LanguageStep | MaskStep | OverlapStep, Field(discriminator="step")
    ],
    BeforeValidator(_check_step_name),
]
