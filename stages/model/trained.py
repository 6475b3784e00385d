"""Loading of the models that train writes, with or without a separate adapter (LoRA, through peft)."""

import json
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from stages.core.artifacts import make_damage_error, read_json
from stages.core.errors import printable
from stages.model.schema import ADAPTER_WEIGHTS, BASE_MODEL_CONFIG, Model


def load_trained_model(task: str, directory: str | Path) -> Any:
    """Load the model that train wrote into `directory`, in fp32 on the CPU.

    An adapter is merged into the weights of its base model.

    Raises:
        StageError: if a file is missing or damaged.
    """
    from stages.model.models import check_finite, load_directory, load_pretrained

    base = Path(directory) / BASE_MODEL_CONFIG
    if not base.is_file():
        return load_directory(task, directory)
    from peft import PeftModel

    try:
        source = TypeAdapter(Model).validate_json(json.dumps(read_json(base)))
    except ValueError as error:
        raise make_damage_error(base, f"not the config of a model: {printable(error)}") from None
    if not (Path(directory) / ADAPTER_WEIGHTS).is_file():  # peft would look for a pickle
        raise make_damage_error(directory, f"no {ADAPTER_WEIGHTS}")
    model = load_pretrained(source)
    try:
        merged = PeftModel.from_pretrained(model, directory).merge_and_unload()
    except Exception as error:  # from peft, or invalid content of a file
        raise make_damage_error(
            directory, printable(f"{type(error).__name__}: {' '.join(str(error).split())}")
        ) from None
    check_finite(merged, f"the adapter in {directory}")
    return merged
