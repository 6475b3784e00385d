"""Damaged adapters are errors of one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import hash_files
from peft import LoraConfig, get_peft_model
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from toys import make_toy_model

from stages.core.artifacts import write_json
from stages.core.errors import StageError
from stages.model.schema import ADAPTER_WEIGHTS, BASE_MODEL_CONFIG, Model
from stages.model.trained import load_trained_model


@pytest.fixture(scope="module")
def additions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapter of a pinned toy model, as train writes it."""
    root = tmp_path_factory.mktemp("additions")
    make_toy_model("gpt2").save_pretrained(root / "base")
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = get_peft_model(make_toy_model("gpt2"), config)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(root / "additions")
    base = Model(
        task="causal",
        path=str(root / "base"),
        revision=None,
        files=hash_files(root / "base"),
        from_scratch=False,
        max_positions=64,
        config={"model_type": "gpt2"},
    )
    write_json(root / "additions" / BASE_MODEL_CONFIG, TypeAdapter(Model).dump_python(base))
    return root / "additions"


def text(name: str, content: str) -> Any:
    return lambda directory: (directory / name).write_text(content)


def settings(**values: Any) -> Any:
    def change(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def weights(value: Any) -> Any:
    """Return a change that replaces every weight of the adapter by `value(weight)`."""

    def change(directory: Path) -> None:
        loaded = load_file(directory / ADAPTER_WEIGHTS)
        save_file({name: value(weight) for name, weight in loaded.items()}, directory / ADAPTER_WEIGHTS)

    return change


BROKEN: dict[str, Any] = {
    "settings-empty": text("adapter_config.json", ""),
    "settings-of-a-list": text("adapter_config.json", "[]"),
    "settings-nested": text("adapter_config.json", "[" * 200_000),
    "method-unknown": settings(peft_type="OWN"),
    "rank-0": settings(r=0),
    "rank-of-text": settings(r="two"),
    "rank-of-others": settings(r=3),
    "layers-of-none": settings(target_modules=["nothing"]),
    "weights-empty": text(ADAPTER_WEIGHTS, ""),
    "weights-nan": weights(lambda weight: weight * float("nan")),
    "weights-infinite": weights(lambda weight: weight / 0),
    "weights-turned": weights(lambda weight: weight.T.contiguous()),
    "base-nested": text(BASE_MODEL_CONFIG, "[" * 200_000),
    "base-of-a-list": text(BASE_MODEL_CONFIG, "[]"),
    "base-of-digits": text(BASE_MODEL_CONFIG, "9" * 5000),
}


def test_additions_are_merged_into_their_base(additions: Path) -> None:
    merged, base = load_trained_model("causal", additions).state_dict(), make_toy_model("gpt2").state_dict()
    changed = {name for name, weight in base.items() if not torch.equal(weight, merged[name])}
    assert changed == {f"transformer.h.{layer}.attn.c_attn.weight" for layer in (0, 1)}


@pytest.mark.parametrize("name", BROKEN)
def test_additions_that_break_are_an_error_of_a_line(additions: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(additions, tmp_path / "model")
    BROKEN[name](tmp_path / "model")
    with pytest.raises(StageError) as caught:
        load_trained_model("causal", tmp_path / "model")
    said = str(caught.value)
    assert str(tmp_path / "model") in said and said.isprintable() and len(said) < 1000
