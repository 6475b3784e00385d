"""Tests of tools.generate with toy models, and of the code in docs/sharing.md."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from data_helpers import CAUSAL_TOKENS, MLM_TOKENS, REPOSITORY, write_bpe
from safetensors.torch import load_file, save_file
from toys import ARCHITECTURES
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, GPT2LMHeadModel

from stages.tokens.prompts import build_prompt_template
from stages.tokens.texts import Flatten
from tools import generate

SHARING = (REPOSITORY / "docs/sharing.md").read_text(encoding="utf-8")
PROMPTS = {"causal": "The sky is blue because", "mlm": "The sky is {mask} because"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with models/causal and models/mlm as written by train."""
    root = tmp_path_factory.mktemp("generate")
    for task, model_type, tokens, auto in (
        ("causal", "gpt2", CAUSAL_TOKENS, AutoModelForCausalLM),
        ("mlm", "roberta", MLM_TOKENS, AutoModelForMaskedLM),
    ):
        directory = write_bpe(root / "models" / task, tokens)
        config = AutoConfig.for_model(model_type, **{**ARCHITECTURES[model_type], "vocab_size": 300})
        auto.from_config(config).save_pretrained(directory)
    return root


def run_generate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, directory: Path, *arguments: str
) -> tuple[str, str]:
    """Run the command and return its output and the error with which it exits, empty if none."""
    monkeypatch.setattr(sys, "argv", ["generate", str(directory), *arguments])
    try:
        generate.main()
    except SystemExit as error:
        return capsys.readouterr().out, str(error)
    return capsys.readouterr().out, ""


@pytest.mark.parametrize("more", [[], ["--temperature", "0"], ["--top-k", "1"], ["--seed", "3"]])
def test_generate_with_equal_arguments_repeats_the_completion(
    models: Path, capsys: Any, monkeypatch: Any, more: list[str]
) -> None:
    given = [models / "models/causal", PROMPTS["causal"], "--max-new-tokens", "12", *more]
    first, error = run_generate(capsys, monkeypatch, *given)
    assert error == "" and first.startswith(PROMPTS["causal"]) and len(first) > len(PROMPTS["causal"]) + 1
    assert run_generate(capsys, monkeypatch, *given)[0] == first
    if not more:
        assert run_generate(capsys, monkeypatch, *given, "--seed", "3")[0] != first


def test_generate_at_the_last_position_of_the_model_stops(models: Path, capsys: Any, monkeypatch: Any) -> None:
    """Of 64 positions, one is for the end-of-sequence token before the prompt; the last new token needs none."""
    prompt = "x" * 60
    for most in ("4", "500"):
        output, error = run_generate(capsys, monkeypatch, models / "models/causal", prompt, "--max-new-tokens", most)
        assert error == "" and output.startswith(prompt)
    assert run_generate(capsys, monkeypatch, models / "models/causal", "x" * 63, "--max-new-tokens", "5")[1] == ""


def test_generate_several_samples_equals_one_call_per_seed(models: Path, capsys: Any, monkeypatch: Any) -> None:
    given = [models / "models/causal", PROMPTS["causal"], "--max-new-tokens", "12"]
    separate = [run_generate(capsys, monkeypatch, *given, "--seed", str(seed))[0] for seed in (5, 6, 7)]
    together, error = run_generate(capsys, monkeypatch, *given, "--seed", "5", "--num-samples", "3")
    assert error == "" and together == "\n---\n\n".join(separate)
    assert len(set(separate)) == 3


@pytest.mark.parametrize("past_end", [False, True])
def test_generate_past_end_starts_another_document_after_an_empty_line(
    models: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, past_end: bool
) -> None:
    directory = shutil.copytree(models / "models/causal", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = AutoConfig.from_pretrained(directory, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    set_token_cycle(model, tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "a", "b"]))
    model.save_pretrained(directory)
    more = ["--past-end"] if past_end else []
    output, error = run_generate(
        capsys, monkeypatch, directory, "a", "--max-new-tokens", "7", "--temperature", "0", *more
    )
    assert (output, error) == ("ab\n\nab\n\nab\n" if past_end else "ab\n", "")


def set_token_cycle(model: Any, cycle: list[int]) -> None:
    """Set the weights of a GPT-2 so that it predicts the tokens of `cycle` over and over."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # so the layers add nothing to the residual stream
        model.transformer.ln_f.weight.fill_(1.0)
        for number, token in enumerate(cycle):
            vector = torch.zeros(model.config.n_embd)
            vector[2 * number], vector[2 * number + 1] = 1.0, -1.0  # mean 0, preserved by the last LayerNorm
            model.transformer.wte.weight[token] = vector
            model.lm_head.weight[cycle[(number + 1) % len(cycle)]] = vector


@pytest.mark.parametrize("top_k", [1, 5])
def test_generate_fills_a_mask_with_the_likeliest_tokens(
    models: Path, capsys: Any, monkeypatch: Any, top_k: int
) -> None:
    output, error = run_generate(capsys, monkeypatch, models / "models/mlm", PROMPTS["mlm"], "--top-k", str(top_k))
    shares = [float(line.split("%")[0]) for line in output.splitlines()]
    assert error == "" and len(shares) == top_k and shares == sorted(shares, reverse=True) and 0 < shares[0] <= 100


@pytest.mark.parametrize(
    ("task", "prompt", "message"),
    [
        ("none", "a", "is not a directory: `dvc repro`"),
        ("..", "a", "contains no model: it has no config.json"),
        ("causal", " ", "the prompt is empty"),
        ("causal", "x" * 64, "the prompt has 65 tokens, but the model only has 64 positions"),
        ("mlm", "The sky", "the prompt has 0 masks"),
        ("mlm", "{mask} is {mask}", "the prompt has 2 masks"),
        ("mlm", "{mask} is <mask>", "the prompt has 2 masks"),
        ("mlm", "{mask}" + "x" * 70, "the prompt has 73 tokens, but the model only has 64 positions"),
    ],
)
def test_generate_invalid_argument_exits_with_one_line(
    models: Path, capsys: Any, monkeypatch: Any, task: str, prompt: str, message: str
) -> None:
    output, error = run_generate(capsys, monkeypatch, models / "models" / task, prompt)
    assert output == "" and error.startswith("generate: error: ") and message in error and "\n" not in error


def test_generate_pickled_weights_are_refused(models: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "config.json").write_bytes((models / "models/causal/config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    output, error = run_generate(capsys, monkeypatch, tmp_path, "a")
    assert output == "" and "only " in error and "pytorch_model.bin: pickled weights can run code" in error


def edit_config(**values: Any) -> Callable[[Path], Any]:
    """Return a function that sets values of config.json."""

    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def write_file(name: str, content: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(content)


def set_nan_weight(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["transformer.wpe.weight"][0] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def edit_tokenizer(**changes: Any) -> Callable[[Path], Any]:
    """Return a function that sets values of tokenizer.json."""

    def change(directory: Path) -> None:
        file = directory / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config-empty": (write_file("config.json", ""), "config.json is not JSON"),
    "config-of-a-list": (write_file("config.json", "[]"), "config.json is not a JSON object"),
    "config-nested": (write_file("config.json", "[" * 200_000), "config.json is not JSON"),
    "architectures-of-a-number": (edit_config(architectures=5, model_type="t5"), "transformers has no such model"),
    "architectures-of-numbers": (edit_config(architectures=[5], n_head=0), "cannot build a gpt2"),
    "heads-0": (edit_config(n_head=0), "cannot build a gpt2"),
    "layers-10^9": (edit_config(n_layer=10**9), "is out of range"),
    "vocabulary-2^40": (edit_config(vocab_size=2**40), "the limit is 1 TiB"),
    "vocabulary-below-the-tokenizers": (edit_config(vocab_size=299), "do not match"),
    "activation-unknown": (edit_config(activation_function="sine"), "cannot build a gpt2"),
    "another-type": (edit_config(model_type="bert", architectures=["BertForMaskedLM"]), "are missing"),
    "quantized": (edit_config(quantization_config={"quant_method": "gptq"}), "quantized weights cannot be trained"),
    "weights-nan": (set_nan_weight, "transformer.wpe.weight has values that are NaN"),
    "weights-empty": (write_file("model.safetensors", ""), "cannot be loaded"),
    "base-of-no-task": (write_file("base.json", "{}"), "base.json is damaged"),
    "base-of-a-list": (write_file("base.json", "[]"), "base.json is not a JSON object"),
    "base-of-another-shape": (write_file("base.json", '{"task": "causal"}'), "base.json is damaged"),
    "tokenizer-empty": (write_file("tokenizer.json", ""), "cannot load a tokenizer"),
    "tokenizer-nested": (write_file("tokenizer.json", "[" * 200_000), "cannot load a tokenizer"),
    "tokenizer-missing": (lambda directory: (directory / "tokenizer.json").unlink(), "cannot load a tokenizer"),
    "settings-nested": (write_file("tokenizer_config.json", '{"a":' * 200_000), "cannot load a tokenizer"),
    "tokenizer-panics": (
        edit_tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "cannot load a tokenizer"
    ),
    "tokenizer-panics-on-prompt": (edit_tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}), "the prompt"),
    "more-tokens": (write_file("added_tokens.json", '{"zebra": 300}'), "the tokenizer has 301 tokens, but the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_generate_broken_directory_exits_with_one_line(
    models: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, name: str
) -> None:
    shutil.copytree(models / "models/causal", tmp_path / "model")
    change, message = BROKEN[name]
    change(tmp_path / "model")
    _, error = run_generate(capsys, monkeypatch, tmp_path / "model", PROMPTS["causal"], "--max-new-tokens", "2")
    assert error.startswith("generate: error: ") and message in error
    assert error.isprintable() and len(error) < 1000


@pytest.mark.parametrize("option", [["--top-k", "0"], ["--temperature", "-1"], ["--max-new-tokens", "0"]])
def test_generate_option_out_of_range_is_refused(
    models: Path, capsys: Any, monkeypatch: Any, option: list[str]
) -> None:
    assert run_generate(capsys, monkeypatch, models / "models/causal", "a", *option)[1] == "2"


def test_generate_interrupted_exits_without_message(models: Path, capsys: Any, monkeypatch: Any) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "generate_text", interrupted)
    assert run_generate(capsys, monkeypatch, models / "models/causal", "a") == ("\n", "130")
    assert capsys.readouterr().err == ""


def test_generate_command_prints_only_the_text(models: Path) -> None:
    command = [sys.executable, "-m", "tools.generate", str(models / "models/causal"), PROMPTS["causal"]]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(PROMPTS["causal"])


def test_generate_documented_code_loads_both_models(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.search(r"```python\n(.*?)```", SHARING, flags=re.DOTALL)
    assert code is not None and "models/causal" in code[1] and "models/mlm" in code[1]
    monkeypatch.chdir(models)
    exec(code[1], {})
    output = capsys.readouterr().out
    assert output.startswith(PROMPTS["causal"]) and len(output.splitlines()) >= 2


def test_generate_with_chat_template_formats_the_prompt_as_in_training(
    models: Path, capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "answers"
    shutil.copytree(models / "models/causal", directory)
    form = build_prompt_template(Flatten(prompt=["title"], completion=["answers.text"], separator="\nA: "), None)
    assert form is not None
    (directory / "chat_template.jinja").write_text(form, encoding="utf-8")
    seen: list[list[int]] = []
    original = GPT2LMHeadModel.generate

    def record(self: Any, ids: Any, **named: Any) -> Any:
        seen.append(ids[0].tolist())
        return original(self, ids, **named)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", record)
    output, error = run_generate(capsys, monkeypatch, directory, "Why?", "--max-new-tokens", "3")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (error, tokenizer.decode(seen[0])) == ("", f"{tokenizer.eos_token}Why?\nA: ")
    assert output.startswith("Why?\n\n")
