"""Documents to score: those of a split, as tokenize wrote them, or those of a source, which are tokenized here."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from stages.core.artifacts import SPLITS, Documents, TokenIds, to_arrow, to_numpy
from stages.core.compose import PARAMS
from stages.core.config import find, read_yaml
from stages.core.errors import StageError, printable
from stages.figures.names import EVALUATED, TEXTS
from stages.tokens.encoding import Decoder, choose_engine, refuse_control_tokens
from stages.tokens.texts import Flatten, TextFile, sample_texts
from stages.tokens.vocabulary import Vocabulary, load_tokenizer

log = logging.getLogger(__name__)


def open_texts(sources: list[str], directory: Path, flatten: Flatten, tokens: Path) -> dict[str, "Texts"]:
    """The documents to score: validation, test, and texts-NAME for each of the sources that are only evaluated.

    Args:
        directory: of the sources.
        flatten: what makes a document of a source's record.
        tokens: tokenize's directory.
    """
    vocabulary = Vocabulary.read(tokens)
    found: dict[str, Texts] = {split: SplitTexts(Documents(tokens / split), vocabulary) for split in EVALUATED}
    for name in sources:
        found[f"{TEXTS}{name}"] = SourceTexts(name, source_files(directory, name), flatten, tokens)
    return found


class Text(NamedTuple):
    """The text of a document."""

    ids: TokenIds
    """[num_tokens] without control tokens."""
    num_bytes: int
    """In UTF-8."""


class Texts(Protocol):
    """Documents, by number."""

    def __len__(self) -> int: ...

    def read(self, numbers: npt.NDArray[np.int64]) -> Iterator[Text]:
        """The documents with these numbers, which ascend."""

    def records(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Numbers of their records in download's files, which are counted through."""


class SplitTexts:
    """The documents of a split of tokens."""

    def __init__(self, documents: Documents, vocabulary: Vocabulary) -> None:
        self._documents, self._vocabulary = documents, vocabulary

    def __len__(self) -> int:
        return len(self._documents)

    def read(self, numbers: npt.NDArray[np.int64]) -> Iterator[Text]:
        for number in numbers.tolist():
            ids = self._vocabulary.text_tokens(self._documents[number])
            yield Text(ids, int(self._documents.num_bytes[number]))

    def records(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._documents.records[numbers]


class SourceTexts:
    """The documents of a source, flattened and encoded as tokenize does."""

    def __init__(self, name: str, files: list[Path], flatten: Flatten, tokens: Path) -> None:
        """
        Args:
            files: download's Parquet files, whose records are counted through.
            tokens: tokenize's directory, with the tokenizer.
        """
        self._name, self._files = name, [TextFile(file, flatten) for file in files]
        self._starts = np.cumsum([0, *(file.num_documents for file in self._files)])
        tokenizer = load_tokenizer(tokens / "tokenizer")
        self._vocabulary, self._decoder = Vocabulary.read(tokens), Decoder(tokenizer)
        _, self._encode = choose_engine(tokenizer, sample_texts(self._files))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, numbers: npt.NDArray[np.int64]) -> Iterator[Text]:
        num_lossy = 0
        for file, start in zip(self._files, self._starts.tolist(), strict=False):
            rows = numbers[(numbers >= start) & (numbers < start + file.num_documents)] - start
            groups = np.searchsorted(file.group_starts, rows, side="right") - 1  # row group of each row
            chosen = np.unique(groups)
            for group, texts in zip(chosen, file.groups(chosen.tolist()), strict=True):
                own = rows[groups == group]
                texts = texts.take(to_arrow(own - file.group_starts[group]))
                encoded = self._encode(texts.to_pylist())
                refuse_control_tokens(encoded, self._vocabulary, f"{self._name} record", (own + start).tolist())
                num_lossy += self._decoder.num_lossy(texts, encoded)
                ids = np.split(encoded.ids.astype(self._vocabulary.dtype), encoded.offsets[1:-1])
                yield from map(Text, ids, to_numpy(pc.binary_length(texts)).tolist())
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
