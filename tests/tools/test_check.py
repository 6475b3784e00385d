"""Tests of tools.check: the mistakes that it reports in params.yaml, conf/ and the artifacts."""

import json
from pathlib import Path

import pytest
import yaml
from dvc_project import ALL, edit_yaml, mark_rest_slow, run_command

from tools.architectures import find_config_keys, list_model_types


def run_check(project: Path, *, wrong: bool = True) -> str:
    """Run the check and return its output; assert that it fails if and only if `wrong`, without a traceback."""
    output = run_command(project, "sh", "-c", "python -m tools.check && echo FINE", check=False)
    assert ("FINE" in output) != wrong, output
    assert "Traceback" not in output
    return output


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    mark_rest_slow([
        ("params.yaml", "tasks__causal__model", "tiny-gtp2", "no conf/model/tiny-gtp2.yaml; did you mean tiny-gpt2?"),
        ("params.yaml", "hardware", "cpuu", "did you mean cpu?"),
        ("params.yaml", "data__name", "sampel", "did you mean sample?"),
        ("params.yaml", "data__name", "eli5", "defunct"),
        ("params.yaml", "data__path", "it's mine.txt", "data.path=it's mine.txt: data.name=sample only reads"),
        ("params.yaml", "block_size", 1024, "above the model's positions, 512 (train@causal, train@mlm)"),
        ("params.yaml", "seed", -1, "seed=-1"),
        ("params.yaml", "tasks__mlm__model", "tiny-gpt2", "model.task=causal: this model cannot"),
        ("conf/task/causal.yaml", "evalute", {"context": 3}, "no stage reads the key evalute; did you mean evaluate?"),
        ("conf/task/causal.yaml", "trainer__weight_dekay", 1, "did you mean weight_decay?"),
        ("conf/task/mlm.yaml", "samples__prompts", ["no mask"], "needs exactly one {mask}"),
        ("conf/model/tiny-gpt2.yaml", "config__n_embdd", 64, "n_embdd is not a key of gpt2; did you mean n_embd?"),
        ("conf/model/tiny-gpt2.yaml", "config__model_type", "gpt22", "model_type=gpt22 is not a known architecture"),
    ], num_fast=5),
)  # fmt: skip
def test_check_wrong_value_is_refused_by_name(clean: Path, file: str, key: str, value: object, message: str) -> None:
    edit_yaml(clean / file, **{key: value})
    assert message in run_check(clean)


SOURCES = {"first": {"name": "files", "path": "data/sample"}, "second": {"name": "files", "path": "data/sample"}}


def test_check_several_sources_passes(clean: Path) -> None:
    edit_yaml(clean / "params.yaml", sources=SOURCES, data={"name": "mix", "path": "data/sources"})
    assert "14 stages is in order" in run_check(clean, wrong=False)


@pytest.mark.parametrize(
    ("sources", "data", "message"),
    [
        ({"first": SOURCES["first"]}, "data/sources", "params.yaml has no sources.second; there are first"),
        (SOURCES, "data/sample", "data.path=data/sample: data.source=sources (conf/data/mix.yaml) reads data/sources"),
        (SOURCES | {"third": {"name": "mix", "path": "data/sources"}}, "data/sources", "itself combines sources"),
        (SOURCES | {"third": {"name": "nix", "path": "conf"}}, "data/sources", "third.name=nix: there is no conf/"),
        (SOURCES | {"third": {"name": "files", "path": "x"}}, "data/sources", "data.path=x: no such file or directory"),
        (SOURCES | {"old/..": dict(SOURCES["first"])}, "data/sources", "name of a source has letters, digits"),
    ],
)
def test_check_inconsistent_sources_names_the_key(clean: Path, sources: object, data: str, message: str) -> None:
    edit_yaml(clean / "params.yaml", sources=sources, data={"name": "mix", "path": data})
    assert message in run_check(clean)


PAIRS = {"name": "english", "path": "data/pairs/english.jsonl"}


def test_check_pairs_passes(clean: Path) -> None:
    edit_yaml(clean / "params.yaml", pairs={"causal": {**PAIRS}, "mlm": PAIRS})  # a copy: YAML would write an alias
    assert f"{len(ALL) + 2} stages is in order" in run_check(clean, wrong=False)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"mlm": PAIRS | {"path": "x.jsonl"}}, "pairs.mlm.path=x.jsonl: no such file"),
        ({"mlm": PAIRS | {"path": "data/pairs"}}, "pairs.mlm.path=data/pairs: no such file"),
        ({"mlm": {"name": "blimp", "path": "x.jsonl"}}, "pairs.mlm.path=x.jsonl: no such file"),
        ({"mlm": PAIRS | {"path": "params.yaml"}}, "params.yaml:1: not a JSON object"),
        ({"mlm": PAIRS | {"path": "data/sample/askscience.jsonl"}}, "askscience.jsonl:1: neither a minimal pair"),
        ({"mlm": PAIRS | {"name": "englisch"}}, "pairs.mlm.name=englisch: there is no conf/pairs/englisch.yaml; did"),
        ({"mlm": PAIRS | {"nmae": 1}}, "no stage reads the key pairs.mlm.nmae"),
        ({"mlm": {"name": "english"}}, "params.yaml and dvc.yaml do not fit together"),
    ],
)
def test_check_pairs_that_cannot_be_scored_names_the_key(clean: Path, pairs: object, message: str) -> None:
    edit_yaml(clean / "params.yaml", pairs=pairs)
    assert message in run_check(clean)


def test_check_pairs_of_removed_task_names_it(clean: Path) -> None:
    params = yaml.safe_load((clean / "params.yaml").read_text(encoding="utf-8"))
    edit_yaml(clean / "params.yaml", pairs={"mlm": PAIRS}, tasks={"causal": params["tasks"]["causal"]})
    assert "params.yaml: pairs.mlm: there is no such task; there are causal" in run_check(clean)


def test_check_pairs_context_above_model_positions_names_both(clean: Path) -> None:
    edit_yaml(clean / "params.yaml", pairs={"mlm": PAIRS})
    edit_yaml(clean / "conf/pairs/english.yaml", context=1000)
    assert "pairs.context=1000 is above the model's positions, 512 (score@mlm)" in run_check(clean)


def test_check_records_of_removed_source_names_their_directory(clean: Path) -> None:
    edit_yaml(clean / "params.yaml", sources=SOURCES, data={"name": "mix", "path": "data/sources"})
    (clean / "data/sources/my old").mkdir(parents=True)
    assert (
        "data/sources/my old belongs to no source of params.yaml: remove it (rm -r 'data/sources/my old')"
        in run_check(clean)
    )


@pytest.mark.slow
def test_check_invalid_schedule_is_refused_and_passed_values_are_cached(clean: Path) -> None:
    edit_yaml(clean / "conf/task/causal.yaml", trainer__lr_scheduler_type="warmup_stable_decay")
    assert "trainer.lr_scheduler_type=warmup_stable_decay: " in (output := run_check(clean))
    assert "(train@causal)" in output and "train@mlm" not in output
    edit_yaml(clean / "conf/task/causal.yaml", trainer__lr_scheduler_kwargs={"num_decay_steps": 10})
    run_check(clean, wrong=False)
    # Values that passed are not tried again, so the check does not import torch.
    code = "import sys, runpy; runpy.run_module('tools.check', run_name='__main__'); print('torch' in sys.modules)"
    assert run_command(clean, "python", "-c", code).splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("task", "targets", "message"),
    [
        ("causal", ["lm_head", "c_attn"], "transformer.wte and lm_head share one weight"),
        pytest.param(
            "mlm",
            ["decoder"],
            "model.embeddings.tok_embeddings and decoder share one weight",
            marks=pytest.mark.slow,
        ),
        pytest.param("causal", ["query"], "query", marks=pytest.mark.slow),
    ],
)
def test_check_adapter_that_cannot_be_exported_is_refused(clean: Path, task: str, targets: list[str], message: str):
    edit_yaml(clean / "params.yaml", **{f"tasks__{task}__adapter": "lora"})
    edit_yaml(clean / "conf/adapter/lora.yaml", adapter__targets=targets)
    output = run_check(clean)
    assert f"adapter.targets={targets}: " in output and message in output and f"(train@{task})" in output


def test_check_missing_extra_names_the_make_target(clean: Path) -> None:
    hidden = clean / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name in ('keras_hub', 'ray') else found(name, *more)\n"
    )
    edit_yaml(clean / "params.yaml", framework="keras", tasks__mlm__model="tiny-roberta")
    output = run_command(clean, "sh", "-c", "PYTHONPATH=hidden python -m tools.check", check=False)
    assert "framework=keras: KerasHub is not installed: run `make keras` (train@causal, train@mlm)" in output
    edit_yaml(clean / "params.yaml", framework="trainer", hardware="ray")
    output = run_command(clean, "sh", "-c", "PYTHONPATH=hidden python -m tools.check", check=False)
    assert "hardware.ray: Ray is not installed: run `make ray`" in output


def test_check_several_mistakes_are_reported_together(clean: Path) -> None:
    unknown = {"tasks__causal__model": "none", "hardware": "none"}
    edit_yaml(clean / "params.yaml", seed=-1, block_size=9999, tasks__mlm__batch_size=0, **unknown)
    output = run_check(clean)
    for part in ("seed=-1", "block_size=9999", "tasks.causal.model=none", "hardware=none", "batch_size=0"):
        assert part in output


def test_check_changed_pinned_file_is_named(clean: Path, tmp_path: Path) -> None:
    model = tmp_path / "mine"
    model.mkdir()
    for file in (clean / "models/causal").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    run_command(clean, "python", "-m", "tools.pin_model", str(model))
    edit_yaml(clean / "params.yaml", tasks__causal__model="mine")
    run_check(clean, wrong=False)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert f"{model}/config.json changed since it was pinned" in run_check(clean)


def test_check_artifacts_of_another_library_version_print_warning(clean: Path) -> None:
    ledger = clean / "data/raw/stats.json"
    stats = json.loads(ledger.read_text())
    stats["versions"]["pyarrow"] = "1.0"
    ledger.unlink()  # a link to DVC's cache
    ledger.write_text(json.dumps(stats))
    assert "data/raw was made with pyarrow 1.0" in run_check(clean, wrong=False)


@pytest.mark.parametrize("size", mark_rest_slow([500, 0, 8, 1500], num_fast=1))
def test_check_truncated_dvc_lock_names_the_fix(clean: Path, size: int) -> None:
    lock = clean / "dvc.lock"
    raw = lock.read_bytes()
    # Cut within a key, because a cut value is still valid YAML.
    lock.write_bytes(raw[: raw.index(b"md5:", size) + 2] if size > 8 else raw[:size])
    assert "`git checkout HEAD -- dvc.lock`" in run_check(clean)
    run_command(clean, "git", "checkout", "HEAD", "--", "dvc.lock")
    run_check(clean, wrong=False)


@pytest.mark.parametrize("left", mark_rest_slow(['{"data/raw": {"wr', ""], num_fast=1))
def test_check_truncated_rwlock_names_the_fix(clean: Path, left: str) -> None:
    """If DVC is killed while writing the file, the error message of the next command does not name a fix."""
    (clean / ".dvc/tmp/rwlock").write_text(left, encoding="utf-8")
    assert "Unable to read RWLock-file" in run_command(clean, "dvc", "repro", check=False)
    assert "rm .dvc/tmp/rwlock" in run_check(clean)
    (clean / ".dvc/tmp/rwlock").unlink()
    run_check(clean, wrong=False)


@pytest.mark.parametrize("model_type", ["gpt2", "roberta", "bert", "llama", "gpt_neo", "gptj", "modernbert"])
def test_config_keys_match_the_architecture(model_type: str) -> None:
    from transformers import AutoConfig

    known = find_config_keys(model_type)
    assert known is not None
    assert all(hasattr(AutoConfig.for_model(model_type), key) for key in known if not key.startswith("sub_configs"))
    assert {"vocab_size", "hidden_size"} <= known
    assert model_type in list_model_types()
