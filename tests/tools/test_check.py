"""tools.check: what it refuses of a whole params.yaml, and what it reads from transformers' source."""

import json
from pathlib import Path

import pytest
import yaml
from dvc_project import ALL, edit, run

from tools.architectures import config_keys, model_types


def checked(project: Path, *, wrong: bool = True) -> str:
    """What the check prints; that it fails if something is wrong, and without a traceback, is taken for granted."""
    output = run(project, "sh", "-c", "python -m tools.check && echo FINE", check=False)
    assert ("FINE" in output) != wrong, output
    assert "Traceback" not in output
    return output


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("params.yaml", "tasks__causal__model", "tiny-gtp2", "no conf/model/tiny-gtp2.yaml; did you mean tiny-gpt2?"),
        ("params.yaml", "hardware", "cpuu", "did you mean cpu?"),
        ("params.yaml", "data__name", "sampel", "did you mean sample?"),
        ("params.yaml", "data__name", "eli5", "defunct"),
        ("params.yaml", "data__path", "it's mine.txt", "data.path=it's mine.txt: data.name=sample reads"),
        ("params.yaml", "block_size", 1024, "above the model's positions, 512 (train@causal, train@mlm)"),
        ("params.yaml", "seed", -1, "seed=-1"),
        ("params.yaml", "tasks__mlm__model", "tiny-gpt2", "model.task=causal: this model cannot"),
        ("conf/task/causal.yaml", "evalute", {"context": 3}, "no stage reads the key evalute; did you mean evaluate?"),
        ("conf/task/causal.yaml", "trainer__weight_dekay", 1, "did you mean weight_decay?"),
        ("conf/task/mlm.yaml", "samples__prompts", ["no mask"], "needs exactly one {mask}"),
        ("conf/model/tiny-gpt2.yaml", "config__n_embdd", 64, "config.n_embdd is no key of gpt2; did you mean n_embd?"),
        ("conf/model/tiny-gpt2.yaml", "config__model_type", "gpt22", "config.model_type=gpt22 is no architecture"),
    ],
)  # fmt: skip
def test_check_wrong_value_is_refused_by_name(clean: Path, file: str, key: str, value: object, message: str) -> None:
    edit(clean / file, **{key: value})
    assert message in checked(clean)


TWO = {"first": {"name": "files", "path": "data/sample"}, "second": {"name": "files", "path": "data/sample"}}


def test_check_of_several_sources_is_in_order(clean: Path) -> None:
    edit(clean / "params.yaml", sources=TWO, data={"name": "mix", "path": "data/sources"})
    assert "14 stages is in order" in checked(clean, wrong=False)


@pytest.mark.parametrize(
    ("sources", "data", "message"),
    [
        ({"first": TWO["first"]}, "data/sources", "params.yaml has no sources.second; there are first"),
        (TWO, "data/sample", "data.path=data/sample: data.source=sources (conf/data/mix.yaml) reads data/sources"),
        (TWO | {"third": {"name": "mix", "path": "data/sources"}}, "data/sources", "consists of sources itself"),
        (TWO | {"third": {"name": "nix", "path": "conf"}}, "data/sources", "sources.third.name=nix: there is no conf/"),
        (TWO | {"third": {"name": "files", "path": "x"}}, "data/sources", "data.path=x: no such file or directory"),
        (TWO | {"old/..": dict(TWO["first"])}, "data/sources", "name of a source holds letters, digits"),
    ],
)
def test_check_of_sources_that_do_not_fit_names_the_key(clean: Path, sources: object, data: str, message: str) -> None:
    edit(clean / "params.yaml", sources=sources, data={"name": "mix", "path": data})
    assert message in checked(clean)


ENGLISH = {"name": "english", "path": "data/pairs/english.jsonl"}


def test_check_of_pairs_is_in_order(clean: Path) -> None:
    edit(clean / "params.yaml", pairs={"causal": {**ENGLISH}, "mlm": ENGLISH})  # a copy: YAML would write an alias
    assert f"{len(ALL) + 2} stages is in order" in checked(clean, wrong=False)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"mlm": ENGLISH | {"path": "x.jsonl"}}, "pairs.mlm.path=x.jsonl: no such file"),
        ({"mlm": ENGLISH | {"path": "data/pairs"}}, "pairs.mlm.path=data/pairs: no such file"),
        ({"mlm": {"name": "blimp", "path": "x.jsonl"}}, "pairs.mlm.path=x.jsonl: no such file"),
        ({"mlm": ENGLISH | {"path": "params.yaml"}}, "params.yaml:1: not a JSON object"),
        ({"mlm": ENGLISH | {"path": "data/sample/askscience.jsonl"}}, "askscience.jsonl:1: neither a minimal pair"),
        ({"mlm": ENGLISH | {"name": "englisch"}}, "pairs.mlm.name=englisch: there is no conf/pairs/englisch.yaml; did"),
        ({"mlm": ENGLISH | {"nmae": 1}}, "no stage reads the key pairs.mlm.nmae"),
        ({"mlm": {"name": "english"}}, "params.yaml and dvc.yaml do not fit together"),
    ],
)
def test_check_of_pairs_that_cannot_be_scored_names_the_key(clean: Path, pairs: object, message: str) -> None:
    edit(clean / "params.yaml", pairs=pairs)
    assert message in checked(clean)


def test_check_of_pairs_of_a_task_that_is_gone_names_it(clean: Path) -> None:
    params = yaml.safe_load((clean / "params.yaml").read_text(encoding="utf-8"))
    edit(clean / "params.yaml", pairs={"mlm": ENGLISH}, tasks={"causal": params["tasks"]["causal"]})
    assert "params.yaml: pairs.mlm: there is no such task; there are causal" in checked(clean)


def test_check_of_pairs_in_windows_above_the_models_positions_names_both(clean: Path) -> None:
    edit(clean / "params.yaml", pairs={"mlm": ENGLISH})
    edit(clean / "conf/pairs/english.yaml", context=1000)
    assert "pairs.context=1000 is above the model's positions, 512 (score@mlm)" in checked(clean)


def test_check_names_records_of_a_source_that_is_gone(clean: Path) -> None:
    edit(clean / "params.yaml", sources=TWO, data={"name": "mix", "path": "data/sources"})
    (clean / "data/sources/my old").mkdir(parents=True)
    assert (
        "data/sources/my old belongs to no source of params.yaml: remove it (rm -r 'data/sources/my old')"
        in checked(clean)
    )


@pytest.mark.slow
def test_check_refuses_what_the_optimizer_or_the_schedule_would_and_remembers_what_passed(clean: Path) -> None:
    edit(clean / "conf/task/causal.yaml", trainer__lr_scheduler_type="warmup_stable_decay")
    assert "trainer.lr_scheduler_type=warmup_stable_decay: " in (said := checked(clean))
    assert "(train@causal)" in said and "train@mlm" not in said
    edit(clean / "conf/task/causal.yaml", trainer__lr_scheduler_kwargs={"num_decay_steps": 10})
    checked(clean, wrong=False)
    # What passed is asked no more: the check does without the imports then.
    code = "import sys, runpy; runpy.run_module('tools.check', run_name='__main__'); print('torch' in sys.modules)"
    assert run(clean, "python", "-c", code).splitlines()[-1] == "False"


@pytest.mark.parametrize(
    ("task", "targets", "message"),
    [
        ("causal", ["lm_head", "c_attn"], "transformer.wte and lm_head share one weight"),
        pytest.param(
            "mlm",
            ["decoder"],
            "roberta.embeddings.word_embeddings and lm_head.decoder share one weight",
            marks=pytest.mark.slow,
        ),
        pytest.param("causal", ["query"], "query", marks=pytest.mark.slow),
    ],
)
def test_check_refuses_an_adapter_that_cannot_be_exported(clean: Path, task: str, targets: list[str], message: str):
    edit(clean / "params.yaml", **{f"tasks__{task}__adapter": "lora"})
    edit(clean / "conf/adapter/lora.yaml", adapter__targets=targets)
    output = checked(clean)
    assert f"adapter.targets={targets}: " in output and message in output and f"(train@{task})" in output


def test_check_of_an_extra_that_is_not_installed_says_what_installs_it(clean: Path) -> None:
    hidden = clean / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "import importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name in ('keras_hub', 'ray') else found(name, *more)\n"
    )
    edit(clean / "params.yaml", framework="keras", tasks__mlm__model="tiny-roberta")
    output = run(clean, "sh", "-c", "PYTHONPATH=hidden python -m tools.check", check=False)
    assert "framework=keras: KerasHub is not installed: run `make keras` (train@causal, train@mlm)" in output
    edit(clean / "params.yaml", framework="trainer", hardware="ray")
    output = run(clean, "sh", "-c", "PYTHONPATH=hidden python -m tools.check", check=False)
    assert "hardware.ray: Ray is not installed: run `make ray`" in output


def test_check_several_mistakes_are_reported_at_once(clean: Path) -> None:
    unknown = {"tasks__causal__model": "none", "hardware": "none"}
    edit(clean / "params.yaml", seed=-1, block_size=9999, tasks__mlm__batch_size=0, **unknown)
    output = checked(clean)
    for part in ("seed=-1", "block_size=9999", "tasks.causal.model=none", "hardware=none", "batch_size=0"):
        assert part in output


def test_check_pinned_file_that_changed_is_named(clean: Path, tmp_path: Path) -> None:
    model = tmp_path / "mine"
    model.mkdir()
    for file in (clean / "models/causal").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    run(clean, "python", "-m", "tools.pin_model", str(model))
    edit(clean / "params.yaml", tasks__causal__model="mine")
    checked(clean, wrong=False)
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert f"{model}/config.json changed since its pin" in checked(clean)


def test_check_artifacts_of_another_library_version_are_said(clean: Path) -> None:
    ledger = clean / "data/raw/stats.json"
    stats = json.loads(ledger.read_text())
    stats["versions"]["pyarrow"] = "1.0"
    ledger.unlink()  # DVC links it to its cache
    ledger.write_text(json.dumps(stats))
    assert "data/raw was made with pyarrow 1.0" in checked(clean, wrong=False)


@pytest.mark.parametrize("size", [0, 8, 500, 1500])
def test_check_of_a_lock_cut_short_says_how_to_mend_it(clean: Path, size: int) -> None:
    lock = clean / "dvc.lock"
    raw = lock.read_bytes()
    lock.write_bytes(raw[: raw.index(b"md5:", size) + 2] if size > 8 else raw[:size])  # in a key: in a value it is YAML
    assert "`git checkout HEAD -- dvc.lock`" in checked(clean)
    run(clean, "git", "checkout", "HEAD", "--", "dvc.lock")
    checked(clean, wrong=False)


@pytest.mark.parametrize("left", ["", '{"data/raw": {"wr'])
def test_check_of_dvcs_own_lock_file_cut_short_says_how_to_mend_it(clean: Path, left: str) -> None:
    """A kill of DVC while it writes the file leaves the next command without a word that helps."""
    (clean / ".dvc/tmp/rwlock").write_text(left, encoding="utf-8")
    assert "Unable to read RWLock-file" in run(clean, "dvc", "repro", check=False)
    assert "rm .dvc/tmp/rwlock" in checked(clean)
    (clean / ".dvc/tmp/rwlock").unlink()
    checked(clean, wrong=False)


@pytest.mark.parametrize("model_type", ["gpt2", "roberta", "bert", "llama", "gpt_neo", "gptj", "modernbert"])
def test_config_keys_are_those_that_the_architecture_has(model_type: str) -> None:
    from transformers import AutoConfig

    known = config_keys(model_type)
    assert known is not None
    assert all(hasattr(AutoConfig.for_model(model_type), key) for key in known if not key.startswith("sub_configs"))
    assert {"vocab_size", "hidden_size"} <= known
    assert model_type in model_types()
