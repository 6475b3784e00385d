"""Complete configs of all stages, for tests that change a part of one."""

from typing import Any

from stages.core.compose import compose_config, load_config
from stages.core.source_code import list_stages
from tools.check import get_config_class

STAGES = list_stages()
PATHS = {
    "download": ["data.path=data/sample/askscience.jsonl", "out=o"],
    "tokenize": ["sources=null", "start=null", "raw=r", "out=o"],
    "group_texts": ["block_size=128", "seed=1", "tokens=t", "raw=r", "out=o"],
    "baseline": ["start=null", "seed=1", "tokens=t", "raw=d", "sources=s", "out=o", "report=r"],
    "train": [
        *("seed=1", "block_size=128", "learning_rate=0.1", "num_train_epochs=1", "batch_size=4"),
        *("start=null", "tokens=t", "blocks=b", "out=o", "report=r"),
    ],
    "evaluate": [
        *("trained=m", "tokens=t", "blocks=b", "baseline=b", "sources=s", "out=o", "report=r", "samples_out=s"),
    ],
    "score": ["pairs.path=p", "trained=m", "tokens=t", "out=o"],
}
GROUPS = {
    "download": {"data": "sample"},
    "tokenize": {"data": "sample", "model": "tiny-gpt2", "task": "causal"},
    "group_texts": {"data": "sample"},
    "baseline": {"data": "sample", "model": "tiny-gpt2", "task": "causal", "hardware": "cpu"},
    "train": {"model": "tiny-gpt2", "adapter": "none", "task": "causal", "hardware": "cpu", "framework": "trainer"},
    "evaluate": {"data": "sample", "task": "causal", "hardware": "cpu"},
    "score": {"pairs": "files", "task": "causal", "hardware": "cpu"},
}


def make_config(stage: str, *overrides: str, **groups: str) -> Any:
    """Return the complete config of `stage`, with changes by `overrides` and `groups`."""
    chosen = [f"{group}={name}" for group, name in {**GROUPS[stage], **groups}.items()]
    return load_config(get_config_class(stage), compose_config(stage, [*chosen, *PATHS[stage], *overrides]))
