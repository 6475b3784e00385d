"""Models: built from a seed, loaded from a pinned directory, or refused with a reason."""

import dataclasses
import json
import logging
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import ARCHITECTURES, CAUSAL, MASKED, MODEL_TASKS, PAD, VOCAB_SIZE, VOCABULARIES, make_toy_model

from stages.core.artifacts import compute_sha256
from stages.core.errors import StageError
from stages.model.hardware import Hardware
from stages.model.models import build_model, check_embeddings, load_directory, prepare_torch
from stages.model.schema import Model
from stages.tokens.vocabulary import Vocabulary


def scratch(model_type, task=None, max_positions=64, **config):
    """Config of a toy model from scratch."""
    return Model(
        task=task or MODEL_TASKS.get(model_type, "causal"),
        path=None,
        revision=None,
        files=None,
        from_scratch=True,
        max_positions=max_positions,
        config={"model_type": model_type, **ARCHITECTURES.get(model_type, {}), **config},
    )


def pinned(directory, model_type="gpt2", from_scratch=False, max_positions=64, files=None, **config):
    """Config of the model in `directory`, pinned as by tools/pin_model."""
    names = sorted(file.name for file in directory.iterdir()) if files is None else files
    return Model(
        task=MODEL_TASKS[model_type],
        path=str(directory),
        revision=None,
        files={name: compute_sha256(directory / name) for name in names},
        from_scratch=from_scratch,
        max_positions=max_positions,
        config=config,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Model type to the directory of a toy model, written by save_pretrained."""
    directories = {model_type: tmp_path_factory.mktemp(model_type) for model_type in ("gpt2", "roberta", "bert")}
    for model_type, directory in directories.items():
        make_toy_model(model_type, seed=5).save_pretrained(directory)
    return directories


def same_weights(one, other):
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


# -- from scratch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "roberta", "bert"])
def test_build_model_from_scratch_draws_its_weights_from_the_seed_alone(model_type):
    vocabulary = VOCABULARIES[MODEL_TASKS[model_type]]
    first = build_model(scratch(model_type), vocabulary, 7)
    torch.rand(5)
    assert same_weights(build_model(scratch(model_type), vocabulary, 7), first)
    assert not same_weights(build_model(scratch(model_type), vocabulary, 8), first)


@pytest.mark.parametrize(("model_type", "vocabulary"), [("gpt2", CAUSAL), ("roberta", MASKED)])
def test_build_model_from_scratch_takes_size_and_special_tokens_from_the_vocabulary(model_type, vocabulary):
    model = build_model(scratch(model_type), vocabulary, 0)
    assert model.get_output_embeddings().out_features == VOCAB_SIZE
    assert model.config.eos_token_id == vocabulary.special.get("eos_token")
    assert model.config.pad_token_id == vocabulary.special.get("pad_token")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_build_model_with_config_values_overrides_the_architectures():
    assert build_model(scratch("gpt2", n_layer=1, activation_function="relu"), CAUSAL, 0).config.n_layer == 1


def test_build_model_of_an_unknown_architecture_names_the_nearest():
    with pytest.raises(StageError, match=r"model_type=gtp2 is unknown; did you mean gpt2\?"):
        build_model(scratch("gtp2"), CAUSAL, 0)


def test_build_model_with_an_unknown_config_key_names_the_nearest():
    with pytest.raises(StageError, match=r"model\.config\.n_layers: gpt2 has no such setting; did you mean n_layer\?"):
        build_model(scratch("gpt2", n_layers=1), CAUSAL, 0)


@pytest.mark.parametrize(("model_type", "task"), [("gpt2", "mlm"), ("vit", "causal"), ("t5", "causal")])
def test_build_model_of_an_architecture_for_another_task_is_an_error_that_names_both(model_type, task):
    with pytest.raises(StageError, match=f"model_type={model_type}: transformers has no such model for task={task}"):
        build_model(scratch(model_type, task), VOCABULARIES[task], 0)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "roberta", "bert"])
def test_build_model_with_as_many_positions_as_it_has_attends_to_them_all(model_type):
    # RoBERTa's embeddings for 64 positions are 66: it numbers them from pad_token_id + 1.
    model = build_model(scratch(model_type, max_positions=64), VOCABULARIES[MODEL_TASKS[model_type]], 0)
    with torch.no_grad():
        assert model(torch.full((1, 64), 9)).logits.shape == (1, 64, VOCAB_SIZE)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "roberta", "bert"])
def test_build_model_with_more_positions_than_it_has_is_an_error(model_type):
    with pytest.raises(StageError, match="max_positions=65: the model only has 64 positions"):
        build_model(scratch(model_type, max_positions=65), VOCABULARIES[MODEL_TASKS[model_type]], 0)


# -- from a pinned directory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "roberta", "bert"])
def test_build_model_of_a_pinned_directory_has_its_weights_whatever_the_seed(saved, model_type):
    model = build_model(pinned(saved[model_type], model_type), VOCABULARIES[MODEL_TASKS[model_type]], 11)
    assert same_weights(model, make_toy_model(model_type, seed=5))


def test_build_model_of_a_pinned_directory_in_half_precision_is_fp32(tmp_path):
    make_toy_model("gpt2", seed=5).half().save_pretrained(tmp_path)
    model = build_model(pinned(tmp_path), CAUSAL, 0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_build_model_from_scratch_of_a_pinned_directory_takes_its_shape_and_fresh_weights(saved):
    model = build_model(pinned(saved["gpt2"], from_scratch=True, files=["config.json"]), CAUSAL, 11)
    assert model.config.n_embd == 16
    assert not same_weights(model, make_toy_model("gpt2", seed=5))


def test_build_model_of_a_smaller_vocabulary_than_its_embeddings_keeps_the_embeddings(saved):
    vocabulary = Vocabulary(size=VOCAB_SIZE - 3, special=CAUSAL.special, prefix=[], suffix=[0], lead=[0])
    assert build_model(pinned(saved["gpt2"]), vocabulary, 0).get_input_embeddings().num_embeddings == VOCAB_SIZE


def test_build_model_of_a_larger_vocabulary_than_its_embeddings_is_an_error_with_both_numbers(saved):
    vocabulary = Vocabulary(size=VOCAB_SIZE + 1, special=CAUSAL.special, prefix=[], suffix=[0], lead=[0])
    with pytest.raises(StageError, match="the tokenizer has 51 tokens, but the model only has 50 embeddings"):
        build_model(pinned(saved["gpt2"]), vocabulary, 0)


def test_build_model_of_a_directory_with_pickled_weights_alone_is_refused(tmp_path):
    model = make_toy_model("gpt2")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(StageError, match=r"none of model\.safetensors"):
        build_model(pinned(tmp_path), CAUSAL, 0)


def test_build_model_of_a_directory_with_other_weights_than_pinned_is_an_error_that_says_how_to_pin(tmp_path):
    make_toy_model("gpt2", seed=5).save_pretrained(tmp_path)
    config = pinned(tmp_path)
    make_toy_model("gpt2", seed=6).save_pretrained(tmp_path)
    with pytest.raises(StageError, match=r"model\.safetensors is not the pinned file.*tools\.pin_model"):
        build_model(config, CAUSAL, 0)


def test_build_model_of_truncated_weights_is_an_error_that_names_the_directory(tmp_path):
    make_toy_model("gpt2", seed=5).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StageError, match="cannot be loaded") as caught:
        build_model(pinned(tmp_path), CAUSAL, 0)
    assert str(tmp_path) in str(caught.value)


def test_build_model_of_weights_that_do_not_fit_the_config_is_an_error(tmp_path, saved):
    with pytest.raises(StageError, match="cannot be loaded"):
        build_model(pinned(saved["gpt2"], n_embd=32), CAUSAL, 0)


def test_build_model_of_a_checkpoint_without_its_head_warns_and_draws_it_from_the_seed(tmp_path, caplog):
    make_toy_model("bert", seed=5).bert.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="stages.model.models"):
        models = [build_model(pinned(tmp_path, "bert"), MASKED, seed) for seed in (1, 1, 2)]
    assert "not in the checkpoint" in caplog.text
    assert same_weights(models[0], models[1])
    assert not same_weights(models[0], models[2])
    encoder = make_toy_model("bert", seed=5).bert.embeddings.word_embeddings.weight
    assert torch.equal(models[2].bert.embeddings.word_embeddings.weight, encoder)


def test_load_directory_gives_the_saved_weights_in_fp32(saved):
    model = load_directory("mlm", saved["roberta"])
    assert same_weights(model, make_toy_model("roberta", seed=5))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.pad_token_id == PAD


# -- what no model is made of ------------------------------------------------------------------------------------------


def changed(**values):
    """Return a change that sets values in a model's config.json."""

    def change(directory):
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def text(name, content):
    return lambda directory: (directory / name).write_bytes(content.encode("latin-1"))


def with_weight(value):
    """Return a change that replaces a weight by `value(weight)`."""

    def change(directory):
        weights = load_file(directory / "model.safetensors")
        weights["transformer.h.1.mlp.c_fc.weight"] = value(weights["transformer.h.1.mlp.c_fc.weight"].clone())
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    return change


def one(value):
    def change(weight):
        weight[3, 2] = value
        return weight

    return with_weight(change)


def sharded(content):
    """Return a change that moves the weights to a shard with the index `content`."""

    def change(directory):
        names = list(load_file(directory / "model.safetensors"))
        (directory / "model.safetensors").rename(directory / "a.safetensors")
        index = content if isinstance(content, str) else json.dumps({"metadata": {}, **content(names)})
        (directory / "model.safetensors.index.json").write_text(index)

    return change


def elsewhere(name):
    return sharded(lambda names: {"weight_map": dict.fromkeys(names, "a.safetensors") | {names[0]: name}})


MEANT, MAKES_NONE, UNUSABLE = "is out of range", "cannot build a gpt2 from", "its config.json cannot be used"
HOSTILE = {
    "heads-0": (changed(n_head=0), MAKES_NONE),
    "heads-that-do-not-divide": (changed(n_head=3), MAKES_NONE),
    "heads-below-0": (changed(n_head=-1), MEANT),
    "heads-of-text": (changed(n_head="two"), UNUSABLE),
    "width-0": (changed(n_embd=0), MAKES_NONE),
    "width-below-0": (changed(n_embd=-16), MAKES_NONE),
    "activation-unknown": (changed(activation_function="sine"), MAKES_NONE),
    "layers-10^4-and-1": (changed(n_layer=10_001), MEANT),
    "layers-10^9": (changed(n_layer=10**9), MEANT),
    "layers-nested": (changed(text_config={"num_hidden_layers": 10**9}), MEANT),
    "labels-10^9": (changed(num_labels=10**9), MEANT),
    "vocabulary-2^40": (changed(vocab_size=2**40), "limit is 1 TiB"),
    "positions-2^40": (changed(n_positions=2**40), "limit is 1 TiB"),
    "inner-2^50": (changed(n_inner=2**50), "limit is 1 TiB"),
    "vocabulary-10^23": (changed(vocab_size=10**23), MEANT),
    "any-10^23": (changed(n_ctx_of_others=-(10**23)), MEANT),
    "nan-in-config": (changed(layer_norm_epsilon=float("nan")), MEANT),
    "quantized-without-library": (changed(quantization_config={"quant_method": "bitsandbytes"}), "quantization_config"),
    "quantized-by-an-unknown-method": (changed(quantization_config={"quant_method": "own"}), "quantization_config"),
    "code-of-the-hub": (changed(_attn_implementation="owner/kernels"), "never run"),
    "dtype-unknown": (changed(dtype="float99"), UNUSABLE),
    "type-of-a-list": (changed(model_type=["gpt2"]), UNUSABLE),
    "labels-of-a-list": (changed(id2label=[]), UNUSABLE),
    "config-empty": (text("config.json", ""), "config.json is not JSON"),
    "config-of-a-list": (text("config.json", "[]"), "config.json is not a JSON object"),
    "config-nested": (text("config.json", '{"a":' * 200_000), "config.json is not JSON"),
    "config-of-bytes": (text("config.json", "\xff\xfe\0"), "config.json is not JSON"),
    "config-of-digits": (text("config.json", '{"n_layer": ' + "9" * 5000 + "}"), "config.json is not JSON"),
    "generation-of-a-list": (text("generation_config.json", "[]"), "generation_config.json is not a JSON object"),
    "generation-nested": (text("generation_config.json", "[" * 200_000), "generation_config.json is not JSON"),
    "weights-nan": (one(float("nan")), r"cannot be used: transformer\.h\.1\.mlp\.c_fc\.weight has values that are NaN"),
    "weights-infinite": (one(float("-inf")), r"cannot be used: transformer\.h\.1\.mlp\.c_fc\.weight has values"),
    "weights-of-one-number": (with_weight(lambda weight: weight.sum()), r"c_fc\.weight: \[\], not \[16, 64\]"),
    "weights-turned": (with_weight(lambda weight: weight.T.contiguous()), r"c_fc\.weight: \[64, 16\], not \[16, 64\]"),
    "weights-empty": (text("model.safetensors", ""), "cannot be loaded"),
    "weights-of-a-long-header": (text("model.safetensors", "\xff" * 64), "cannot be loaded"),
    "index-of-a-list": (sharded("[]"), "is not a JSON object"),
    "index-nested": (sharded("[" * 200_000), "is not JSON"),
    "index-of-nothing": (sharded(lambda names: {}), "is not an index of weights"),
    "index-outside": (elsewhere("../outside.safetensors"), "only read from"),
    "index-of-a-pickle": (elsewhere("pytorch_model.bin"), "only read from"),
    "index-of-a-file-that-is-not-there": (elsewhere("b.safetensors"), "b.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("how", ["pinned", "directory"])
@pytest.mark.parametrize("name", HOSTILE)
def test_checkpoint_that_makes_no_model_is_an_error_of_a_line(tmp_path, saved, name, how):
    directory = tmp_path / "model"
    shutil.copytree(saved["gpt2"], directory)
    torch.save({}, directory / "pytorch_model.bin")
    shutil.copy(directory / "model.safetensors", tmp_path / "outside.safetensors")
    change, message = HOSTILE[name]
    change(directory)
    with pytest.raises(StageError, match=message) as caught:
        build_model(pinned(directory), CAUSAL, 0) if how == "pinned" else load_directory("causal", directory)
    said = str(caught.value)
    assert said.isprintable() and len(said) < 1000 and str(directory) in said


def test_load_directory_reads_nothing_but_config_and_safetensors(tmp_path, saved):
    shutil.copytree(saved["gpt2"], tmp_path / "model")
    (tmp_path / "model/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "other"}')
    torch.save({}, tmp_path / "model/adapter_model.bin")
    assert same_weights(load_directory("causal", tmp_path / "model"), make_toy_model("gpt2", seed=5))


def test_checkpoint_in_shards_is_loaded_as_in_one_file(tmp_path, saved):
    shutil.copytree(saved["gpt2"], tmp_path / "model")
    sharded(lambda names: {"weight_map": dict.fromkeys(names, "a.safetensors")})(tmp_path / "model")
    for loaded in (build_model(pinned(tmp_path / "model"), CAUSAL, 0), load_directory("causal", tmp_path / "model")):
        assert same_weights(loaded, make_toy_model("gpt2", seed=5))


@pytest.mark.parametrize(
    ("model_type", "config", "message"),
    [
        ("gpt2", {"n_head": 0}, "cannot build a gpt2 from model.config: .*ero"),
        ("bert", {"num_attention_heads": 3}, "model.config"),
        ("llama", {"num_attention_heads": 0}, "model.config"),
        ("gpt2", {"activation_function": "sine"}, "cannot build a gpt2 from model.config: .*sine"),
        ("bert", {"hidden_act": "sine"}, "cannot build a bert from model.config: .*sine"),
        ("gpt2", {"n_layer": 10**9}, r"n_layer=1000000000 is out of range: set a value from 0 to 10,000"),
        ("llama", {"num_hidden_layers": 10**23}, r"model\.config\.num_hidden_layers=1\d+ is out of range"),
        ("gpt_neo", {"attention_types": [[["global"], 10**9]]}, r"\.attention_types=1000000000 is out of range"),
        ("gpt2", {"n_positions": 2**40}, "the gpt2 of model.config takes .* TiB: the limit is 1 TiB"),
        ("bert", {"type_vocab_size": 2**45}, "the bert of model.config takes .* TiB"),
        ("llama", {"intermediate_size": 10**23}, r"model\.config\.intermediate_size=1\d+ is out of range"),
        ("gpt2", {"_attn_implementation": "owner/kernels"}, "never run"),
        ("gpt2", {"initializer_range": float("inf")}, "model.config.* NaN or infinite"),
        ("gpt2", {"initializer_range": -1.0}, "cannot build a gpt2 from model.config: .*std"),
        ("gpt2", {"initializer_range": float("nan")}, r"model\.config\.initializer_range=nan is out of range"),
    ],
)  # fmt: skip
def test_build_model_from_scratch_of_values_that_make_none_names_them(model_type, config, message):
    with pytest.raises(StageError, match=message) as caught:
        build_model(scratch(model_type, **config), VOCABULARIES[MODEL_TASKS[model_type]], 0)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("model_type", [5, ["gpt2"], {}, None, "", "x" * 10_000, "\x1b[2J"])
def test_build_model_of_what_is_no_architecture_is_an_error_of_a_line(model_type):
    with pytest.raises(StageError, match="is unknown") as caught:
        build_model(dataclasses.replace(scratch("gpt2"), config={"model_type": model_type}), CAUSAL, 0)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_check_embeddings_of_more_tokens_than_embeddings_names_both():
    model = make_toy_model("gpt2")
    check_embeddings(model, VOCAB_SIZE)
    with pytest.raises(StageError, match="the tokenizer has 51 tokens, but the model only has 50 embeddings"):
        check_embeddings(model, VOCAB_SIZE + 1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory as they do")
def test_prepare_torch_has_freed_memory_used_again_without_new_pages():
    code = """
import resource
import torch
from stages.model.hardware import Hardware
from stages.model.models import prepare_torch

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def new_pages():
    before = pages()
    torch.ones(2**24)
    return pages() - before

torch.set_num_threads(1)
given_back = [new_pages() for _ in range(3)]
prepare_torch(Hardware(device="cpu", num_threads=1, per_device_batch_size=None, evaluate_batch_tokens=64))
kept = [new_pages() for _ in range(20)]
assert min(given_back) > 2**24 * 4 // resource.getpagesize() // 2, given_back
assert max(kept[10:]) < 100, kept
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prepare_torch_on_a_device_that_is_not_there_is_an_error_that_names_a_way_out():
    absent = "mps" if not torch.backends.mps.is_available() else "cuda"
    hardware = Hardware(device=absent, num_threads=1, per_device_batch_size=None, evaluate_batch_tokens=64)
    with pytest.raises(StageError, match=f"hardware.device={absent}.*hardware=cpu"):
        prepare_torch(hardware)
