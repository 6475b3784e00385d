"""Documents to score: those of a split, which tokenize wrote, or those of a source, which are tokenized here."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stages.core.artifacts import COUNTED, SPLITS, TEMPLATE, Documents, Marks
from stages.core.compose import PARAMS
from stages.core.config import find_value, read_yaml
from stages.core.errors import StageError, printable
from stages.figures.names import EVALUATED, TEXTS_PREFIX
from stages.figures.schema import Evaluate
from stages.tokens.encoding import Decoder, DocumentText, choose_engine, join_segments, refuse_control_tokens
from stages.tokens.texts import Flatten, TextFile, load_template, sample_texts
from stages.tokens.vocabulary import Vocabulary, load_tokenizer

log = logging.getLogger(__name__)


def open_texts(config: Evaluate, directory: Path, flatten: Flatten, tokens: Path) -> dict[str, "Texts"]:
    """Open the documents to score: validation, test, and texts-NAME for each source that is only evaluated.

    Args:
        directory: directory of the sources.
        flatten: how records of a source are turned into documents.
        tokens: output directory of tokenize.
    """
    vocabulary, prompts = Vocabulary.read(tokens), config.include_prompts
    found: dict[str, Texts] = {split: SplitTexts(Documents(tokens / split), vocabulary, prompts) for split in EVALUATED}
    for name in config.texts:
        found[f"{TEXTS_PREFIX}{name}"] = SourceTexts(name, find_source_files(directory, name), flatten, tokens, prompts)
    return found


class Texts(Protocol):
    """A numbered collection of documents."""

    def __len__(self) -> int: ...

    def read_texts(self, numbers: npt.NDArray[np.int64]) -> Iterator[DocumentText]:
        """Yield the documents with these numbers, which must ascend, [num_documents] int64."""

    def get_records(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the record number of each document; records are numbered consecutively over download's files."""


class SplitTexts:
    """The documents of a split of tokens."""

    def __init__(self, documents: Documents, vocabulary: Vocabulary, include_prompts: bool = False) -> None:
        self._documents, self._vocabulary, self._include_prompts = documents, vocabulary, include_prompts
        self._num_bytes = documents.num_bytes if include_prompts else documents.num_counted_bytes

    def __len__(self) -> int:
        return len(self._documents)

    def read_texts(self, numbers: npt.NDArray[np.int64]) -> Iterator[DocumentText]:
        for number in numbers.tolist():
            ids, marks = self._documents[number], self._documents.get_marks(number)
            is_text = self._vocabulary.is_text(ids)
            is_predicted = None if marks is None else _find_predicted(marks[is_text], self._include_prompts)
            yield DocumentText(ids[is_text], int(self._num_bytes[number]), is_predicted)

    def get_records(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return self._documents.records[numbers]


def _find_predicted(marks: Marks, include_prompts: bool) -> npt.NDArray[np.bool_]:
    """Return True for each token that is predicted, [num_tokens]: tokens of text, and without prompts only those that
    count."""
    is_predicted: npt.NDArray[np.bool_] = (marks & TEMPLATE) == 0
    return is_predicted if include_prompts else is_predicted & ((marks & COUNTED) > 0)


class SourceTexts:
    """The documents of a source, flattened and encoded as by tokenize."""

    def __init__(
        self, name: str, files: list[Path], flatten: Flatten, tokens: Path, include_prompts: bool = False
    ) -> None:
        """
        Args:
            name: name of the source, for messages.
            files: Parquet files of download; records are numbered consecutively over all files.
            tokens: output directory of tokenize, with the tokenizer.
        """
        tokenizer = load_tokenizer(tokens / "tokenizer")
        self._vocabulary, self._decoder = Vocabulary.read(tokens), Decoder(tokenizer)
        self._name, self._include_prompts = name, include_prompts
        template = load_template(flatten, tokens / "tokenizer", tokenizer, self._vocabulary.special)
        self._files = [TextFile(file, flatten, template=template) for file in files]
        self._starts = np.cumsum([0, *(file.num_documents for file in self._files)])
        _, self._encode = choose_engine(tokenizer, sample_texts(self._files))

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read_texts(self, numbers: npt.NDArray[np.int64]) -> Iterator[DocumentText]:
        num_lossy = 0
        for file, start in zip(self._files, self._starts.tolist(), strict=False):
            rows = numbers[(numbers >= start) & (numbers < start + file.num_documents)] - start
            groups = np.searchsorted(file.group_starts, rows, side="right") - 1  # row group of each row
            chosen = np.unique(groups)
            for group, segments in zip(chosen, file.read_groups(chosen.tolist()), strict=True):
                own = rows[groups == group]
                segments = segments.take_documents(own - file.group_starts[group])
                encoded = self._encode(segments.texts.to_pylist())
                records = (own + start)[segments.get_document_numbers()].tolist()
                refuse_control_tokens(encoded, self._vocabulary, f"{self._name} record", records)
                num_lossy += self._decoder.count_lossy_documents(segments, encoded)
                documents = join_segments(encoded, segments, self._vocabulary, file.counts_all)
                num_bytes = documents.num_bytes if self._include_prompts else documents.num_counted_bytes
                ends = documents.offsets[1:-1]
                marks = [None] * len(own) if documents.marks is None else np.split(documents.marks, ends)
                is_predicted = [None if own is None else _find_predicted(own, self._include_prompts) for own in marks]
                yield from map(DocumentText, np.split(documents.ids, ends), num_bytes.tolist(), is_predicted)
        if num_lossy:
            log.warning(
                "%s: the tokenizer cannot reproduce %d documents exactly: do not compare bits per byte across"
                " tokenizers",
                self._name,
                num_lossy,
            )

    def get_records(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return numbers


def find_source_files(sources: Path, name: str) -> list[Path]:
    """Return the Parquet files of the source `name` in the directory `sources`.

    Raises:
        StageError: if there are none; the message lists the sources in params.yaml.
    """
    directory = sources / name
    whole, splits = directory / "all.parquet", [directory / f"{split}.parquet" for split in SPLITS]
    files = [whole] if whole.is_file() else [file for file in splits if file.is_file()]
    if not files:
        section = find_value(read_yaml(PARAMS), "sources")
        known = ", ".join(map(str, section)) if isinstance(section, dict) else ""
        raise StageError(
            f"evaluate.texts (conf/task) names {name}, but {directory} has no records; sources of params.yaml:"
            f" {printable(known) or 'none'}: add {name} there, and run `dvc repro`"
        )
    return files
