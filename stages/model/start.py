"""Initial model of training: from a configuration, a pinned checkpoint, or the trained model of another task."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from stages.core.errors import StageError
from stages.hub.files import TOKENIZER_FILES, VOCABULARY_FILES, find_source_files
from stages.model.models import build_model, check_embeddings, check_positions
from stages.model.schema import Model
from stages.model.trained import load_trained_model
from stages.tokens.vocabulary import Vocabulary, check_same_tokenizer

log = logging.getLogger(__name__)


def build_start_model(model: Model, start: str | None, tokens: Path, seed: int) -> Any:
    """Build or load the initial model of training, in fp32 on the CPU.

    Args:
        start: directory of a trained model with the configuration `model`, to continue from; None: use `build_model`.
        tokens: output directory of tokenize.
        seed: seed of random weights.

    Raises:
        StageError: as `build_model`, or if `start` has no model or a different tokenizer.
    """
    vocabulary = Vocabulary.read(tokens)
    if start is None:
        if model.from_ is not None:
            _check_pinned_tokenizer(model, tokens / "tokenizer")
        return build_model(model, vocabulary, seed)
    if not Path(start).is_dir():
        raise StageError(f"start={start}: no such directory: run `dvc repro`, which trains that task first")
    check_same_tokenizer(Path(start), start, tokens / "tokenizer")
    # peft freezes the weights of the base model, and they remain frozen after merging.
    loaded = load_trained_model(model.task, start).requires_grad_(True)
    check_positions(loaded.config, model)
    check_embeddings(loaded, vocabulary.size)
    log.info("continuing from %s: %s", start, type(loaded).__name__)
    return loaded


def _check_pinned_tokenizer(model: Model, tokens: Path) -> None:
    """Raise StageError if the pinned checkpoint has a different tokenizer than the directory `tokens`."""
    assert model.from_ is not None
    files = find_source_files("model", model, TOKENIZER_FILES, VOCABULARY_FILES)
    with tempfile.TemporaryDirectory() as scratch:
        for name, file in files.items():
            (Path(scratch) / name).symlink_to(file.resolve())
        check_same_tokenizer(Path(scratch), model.from_.description, tokens)
