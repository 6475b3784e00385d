"""The model that training begins with: built from a configuration, a pinned checkpoint, or another task's."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from stages.core.errors import StageError
from stages.hub.files import TOKENIZER_FILES, VOCABULARY_FILES, source_files
from stages.model.models import build_model, check_embeddings, check_positions
from stages.model.schema import Model
from stages.model.trained import load_trained
from stages.tokens.vocabulary import Vocabulary, check_same_tokenizer

log = logging.getLogger(__name__)


def build_start(model: Model, start: str | None, tokens: Path, seed: int) -> Any:
    """The model that training begins with, in fp32 on the CPU.

    Args:
        start: directory of the trained model that training goes on from, of the configuration `model`; None: the model
            that `build_model` gives.
        tokens: directory of tokenize.

    Raises:
        StageError: as build_model, or if `start` holds no model or one with another tokenizer.
    """
    vocabulary = Vocabulary.read(tokens)
    if start is None:
        if model.from_ is not None:
            _check_pinned_tokenizer(model, tokens / "tokenizer")
        return build_model(model, vocabulary, seed)
    if not Path(start).is_dir():
        raise StageError(f"start={start}: there is no such directory: run `dvc repro`, which trains that task first")
    check_same_tokenizer(Path(start), start, tokens / "tokenizer")
    # An adapter's base is frozen, also behind its additions.
    loaded = load_trained(model.task, start).requires_grad_(True)
    check_positions(loaded.config, model)
    check_embeddings(loaded, vocabulary.size)
    log.info("goes on from %s: %s", start, type(loaded).__name__)
    return loaded


def _check_pinned_tokenizer(model: Model, tokens: Path) -> None:
    """Raise StageError unless the tokenizer that was trained with a model is the one in the directory `tokens`."""
    assert model.from_ is not None
    files = source_files("model", model, TOKENIZER_FILES, VOCABULARY_FILES)
    with tempfile.TemporaryDirectory() as scratch:
        for name, file in files.items():
            (Path(scratch) / name).symlink_to(file.resolve())
        check_same_tokenizer(Path(scratch), model.from_.place, tokens)
