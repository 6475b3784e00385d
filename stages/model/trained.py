"""Reads what train writes: a model, or low-rank additions to one (LoRA, through peft)."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from stages.core.artifacts import damaged, read_json
from stages.core.errors import printable
from stages.model.schema import ADDITIONS, BASE, Model


def load_trained(task: str, directory: str | Path) -> Any:
    """The model that train wrote into `directory`, in fp32 on the CPU; additions are merged into its weights."""
    from stages.model.models import check_finite, load_directory, load_pretrained

    base = Path(directory) / BASE
    if not base.is_file():
        return load_directory(task, directory)
    from peft import PeftModel

    try:
        source = TypeAdapter(Model).validate_json(json.dumps(read_json(base)))
    except ValueError as error:
        raise damaged(base, f"not the config of a model: {printable(error)}") from None
    if not (Path(directory) / ADDITIONS).is_file():  # peft would look for a pickle
        raise damaged(directory, f"no {ADDITIONS}")
    model = load_pretrained(source)
    try:
        merged = PeftModel.from_pretrained(model, directory).merge_and_unload()
    except Exception as error:  # of peft, or of whatever it finds in the files
        raise damaged(directory, printable(f"{type(error).__name__}: {' '.join(str(error).split())}")) from None
    check_finite(merged, f"the additions in {directory}")
    return merged
