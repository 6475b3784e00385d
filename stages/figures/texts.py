"""Documents to score: those of a split, as tokenize wrote them, or those of a source, which are tokenized here."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stages.core.artifacts import COUNTED, SPLITS, TEMPLATE, Documents, Marks
from stages.core.compose import PARAMS
from stages.core.config import find, read_yaml
from stages.core.errors import StageError, printable
from stages.figures.names import EVALUATED, TEXTS
from stages.figures.schema import Evaluate
from stages.model.objectives import Text
from stages.tokens.encoding import Decoder, choose_engine, join_segments, refuse_control_tokens
from stages.tokens.texts import Flatten, TextFile, open_template, sample_texts
from stages.tokens.vocabulary import Vocabulary, load_tokenizer

log = logging.getLogger(__name__)


def open_texts(config: Evaluate, directory: Path, flatten: Flatten, tokens: Path) -> dict[str, "Texts"]:
    """The documents to score: validation, test, and texts-NAME for each of the sources that are only evaluated.

    Args:
        config: what of them is scored.
        directory: of the sources.
        flatten: what makes a document of a source's record.
        tokens: tokenize's directory.
    """
    vocabulary, prompts = Vocabulary.read(tokens), config.include_prompts
    found: dict[str, Texts] = {split: SplitTexts(Documents(tokens / split), vocabulary, prompts) for split in EVALUATED}
    for name in config.texts:
        found[f"{TEXTS}{name}"] = SourceTexts(name, source_files(directory, name), flatten, tokens, prompts)
    return found


class Texts(Protocol):
    """Documents, by number."""

    def __len__(self) -> int: ...

    def read(self, numbers: npt.NDArray[np.int64]) -> Iterator[Text]:
        """The documents with these numbers, which ascend."""

    def records(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of their records in download's files, which are counted through."""


class SplitTexts:
    """The documents of a split of tokens."""

    def __init__(self, documents: Documents, vocabulary: Vocabulary, include_prompts: bool = False) -> None:
        self._documents, self._vocabulary, self._include_prompts = documents, vocabulary, include_prompts
        self._num_bytes = documents.num_bytes if include_prompts else documents.num_counted_bytes

    def __len__(self) -> int:
        return len(self._documents)

    def read(self, numbers: npt.NDArray[np.int64]) -> Iterator[Text]:
        for number in numbers.tolist():
            ids, marks = self._documents[number], self._documents.marks(number)
            is_text = self._vocabulary.is_text(ids)
            is_predicted = None if marks is None else _is_predicted(marks[is_text], self._include_prompts)
            yield Text(ids[is_text], int(self._num_bytes[number]), is_predicted)

    def records(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._documents.records[numbers]


def _is_predicted(marks: Marks, include_prompts: bool) -> npt.NDArray[np.bool_]:
    """Which tokens of a document with `marks` are predicted: of text, and either all or those that count."""
    is_predicted: npt.NDArray[np.bool_] = (marks & TEMPLATE) == 0
    return is_predicted if include_prompts else is_predicted & ((marks & COUNTED) > 0)


class SourceTexts:
    """The documents of a source, flattened and encoded as tokenize does."""

    def __init__(
        self, name: str, files: list[Path], flatten: Flatten, tokens: Path, include_prompts: bool = False
    ) -> None:
        """
        Args:
            files: download's Parquet files, whose records are counted through.
            tokens: tokenize's directory, with the tokenizer.
        """
        tokenizer = load_tokenizer(tokens / "tokenizer")
        self._vocabulary, self._decoder = Vocabulary.read(tokens), Decoder(tokenizer)
        self._name, self._include_prompts = name, include_prompts
        template = open_template(flatten, tokens / "tokenizer", tokenizer, self._vocabulary.special)
        self._files = [TextFile(file, flatten, template=template) for file in files]
        self._starts = np.cumsum([0, *(file.num_documents for file in self._files)])
        _, self._encode = choose_engine(tokenizer, sample_texts(self._files))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, numbers: npt.NDArray[np.int64]) -> Iterator[Text]:
        num_lossy = 0
        for file, start in zip(self._files, self._starts.tolist(), strict=False):
            rows = numbers[(numbers >= start) & (numbers < start + file.num_documents)] - start
            groups = np.searchsorted(file.group_starts, rows, side="right") - 1  # row group of each row
            chosen = np.unique(groups)
            for group, segments in zip(chosen, file.groups(chosen.tolist()), strict=True):
                own = rows[groups == group]
                segments = segments.take(own - file.group_starts[group])
                encoded = self._encode(segments.texts.to_pylist())
                records = (own + start)[segments.owners()].tolist()
                refuse_control_tokens(encoded, self._vocabulary, f"{self._name} record", records)
                num_lossy += self._decoder.count_lossy(segments, encoded)
                documents = join_segments(encoded, segments, self._vocabulary, file.counts_all)
                num_bytes = documents.num_bytes if self._include_prompts else documents.num_counted_bytes
                ends = documents.offsets[1:-1]
                marks = [None] * len(own) if documents.marks is None else np.split(documents.marks, ends)
                is_predicted = [None if own is None else _is_predicted(own, self._include_prompts) for own in marks]
                yield from map(Text, np.split(documents.ids, ends), num_bytes.tolist(), is_predicted)
        if num_lossy:
            log.warning(
                "%s: %d documents do not survive the tokenizer: compare no bits per byte across tokenizers",
                self._name,
                num_lossy,
            )

    def records(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return numbers


def source_files(sources: Path, name: str) -> list[Path]:
    """The Parquet files of a source, below the directory `sources`.

    Raises:
        StageError: if there is none, with the sources that params.yaml has.
    """
    directory = sources / name
    whole, splits = directory / "all.parquet", [directory / f"{split}.parquet" for split in SPLITS]
    files = [whole] if whole.is_file() else [file for file in splits if file.is_file()]
    if not files:
        named = find(read_yaml(PARAMS), "sources")
        there = ", ".join(map(str, named)) if isinstance(named, dict) else ""
        raise StageError(
            f"evaluate.texts (conf/task) names {name}, but {directory} holds no records; sources of params.yaml:"
            f" {printable(there) or 'none'}: add {name} there, and run `dvc repro`"
        )
    return files
