"""Schema of `clean` in conf/data: the steps that leave out or change texts, each with its published thresholds."""

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stages.core.config import Fraction, Positive, whole
from stages.core.errors import printable


@whole
class WordsStep:
    """Removes texts of too few or too many words. A word is what stands between white space and has a letter or digit.

    Bounds of Gopher (Rae et al. 2021, A1.1): 50 and 100,000.
    """

    step: Literal["words"]
    minimum: Positive | None = None
    """Fewest words of a text that is kept; null: any number."""
    maximum: Positive | None = None
    """Most words of a text that is kept; null: any number."""

    @model_validator(mode="after")
    def _bounds(self) -> "WordsStep":
        if self.minimum is None and self.maximum is None:
            raise ValueError("data.clean: step words needs minimum or maximum: {step: words, minimum: 50}")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"data.clean: words: minimum={self.minimum} is above maximum={self.maximum}")
        return self


@whole
class RepetitionStep:
    """Removes texts that repeat themselves. Thresholds of Gopher (Rae et al. 2021, table A1), as in datatrove."""

    step: Literal["repetition"]
    minimum_words: Positive = 50
    """Texts of fewer words are not judged: in a sentence or two a name that comes twice is a fifth of the text."""
    duplicate_lines: Fraction = 0.30
    """Largest share of lines that stood there before."""
    duplicate_paragraphs: Fraction = 0.30
    """Largest share of paragraphs that stood there before."""
    duplicate_line_characters: Fraction = 0.20
    """Largest share of characters in such lines."""
    duplicate_paragraph_characters: Fraction = 0.20
    """Largest share of characters in such paragraphs."""
    top_ngrams: Annotated[list[Fraction], Field(min_length=3, max_length=3)] = field(
        default_factory=lambda: [0.20, 0.18, 0.16]
    )
    """Largest share of characters in the most frequent run of 2, 3 and 4 words."""
    duplicate_ngrams: Annotated[list[Fraction], Field(min_length=6, max_length=6)] = field(
        default_factory=lambda: [0.15, 0.14, 0.13, 0.12, 0.11, 0.10]
    )
    """Largest share of characters in runs of 5 to 10 words that stood there before."""


@whole
class NonTextStep:
    """Removes tables, code and lists of numbers. The first two rules are Gopher's (Rae et al. 2021, A1.1)."""

    step: Literal["non_text"]
    words_with_letter: Fraction = 0.8
    """Smallest share of words that have a letter."""
    symbols_per_word: Annotated[float, Field(ge=0.0)] = 0.1
    """Largest number of hash signs, and of ellipses, by number of words."""
    other_characters: Fraction = 0.4
    """Largest share of digits, punctuation and symbols in the characters that are not white space."""


@whole
class LanguageStep:
    """Removes texts in other languages, as fastText's lid.176 tells them (Joulin et al. 2016), offline."""

    step: Literal["language"]
    languages: Annotated[list[Annotated[str, Field(pattern="^[a-z]{2,3}$")]], Field(min_length=1)]
    """ISO 639 codes of the languages that are kept: [en, de]."""
    minimum_score: Fraction = 0.65
    """Smallest probability that the text is in one of them (datatrove's; short texts have smaller ones)."""


@whole
class MaskStep:
    """Replaces personal data by its kind in brackets: [email], [ip] (public addresses only), [phone]."""

    step: Literal["mask"]
    kinds: Annotated[list[Literal["email", "ip", "phone"]], Field(min_length=1)] = field(
        default_factory=lambda: ["email", "ip", "phone"]
    )
    """What is replaced. Phone numbers: international ones (+49 30 ...), and (212) 555-0123 and 212-555-0123."""


@whole
class OverlapStep:
    """Removes texts that share a run of words with files such as test sets, so that figures on these stay honest."""

    step: Literal["overlap"]
    files: Annotated[dict[str, str], Field(min_length=1)]
    """Local file to its SHA-256 (sha256:...): the texts in all its columns. Read as data.path is, by its suffix."""
    words: Annotated[int, Field(ge=2)] = 13
    """Length of the run, case and punctuation aside (13: Brown et al. 2020, appendix C). Shorter texts have none."""


STEPS = {
    "words": WordsStep,
    "repetition": RepetitionStep,
    "non_text": NonTextStep,
    "language": LanguageStep,
    "mask": MaskStep,
    "overlap": OverlapStep,
}


def _known(value: Any) -> Any:
    """`value`, if it names a step.

    Raises:
        ValueError: if not; pydantic's own words are about tags and discriminators.
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
    BeforeValidator(_known),
]
