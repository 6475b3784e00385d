"""tools.generate on toy models, and the code that README.md shows for a trained model."""

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

from stages.tokens.prompts import prompt_template
from stages.tokens.texts import Flatten
from tools import generate

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROMPTS = {"causal": "The sky is blue because", "mlm": "The sky is {mask} because"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with models/causal and models/mlm as train writes them."""
    root = tmp_path_factory.mktemp("generate")
    for task, model_type, tokens, auto in (
        ("causal", "gpt2", CAUSAL_TOKENS, AutoModelForCausalLM),
        ("mlm", "roberta", MLM_TOKENS, AutoModelForMaskedLM),
    ):
        directory = write_bpe(root / "models" / task, tokens)
        config = AutoConfig.for_model(model_type, **{**ARCHITECTURES[model_type], "vocab_size": 300})
        auto.from_config(config).save_pretrained(directory)
    return root


def say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, directory: Path, *arguments: str
) -> tuple[str, str]:
    """What the command prints, and the error that it ends with, if any."""
    monkeypatch.setattr(sys, "argv", ["generate", str(directory), *arguments])
    try:
        generate.main()
    except SystemExit as error:
        return capsys.readouterr().out, str(error)
    return capsys.readouterr().out, ""


@pytest.mark.parametrize("more", [[], ["--temperature", "0"], ["--top-k", "1"], ["--seed", "3"]])
def test_generate_completes_a_prompt_the_same_for_the_same_arguments(
    models: Path, capsys: Any, monkeypatch: Any, more: list[str]
) -> None:
    given = [models / "models/causal", PROMPTS["causal"], "--max-new-tokens", "12", *more]
    first, error = say(capsys, monkeypatch, *given)
    assert error == "" and first.startswith(PROMPTS["causal"]) and len(first) > len(PROMPTS["causal"]) + 1
    assert say(capsys, monkeypatch, *given)[0] == first
    if not more:
        assert say(capsys, monkeypatch, *given, "--seed", "3")[0] != first


def test_generate_stops_where_the_model_has_no_positions(models: Path, capsys: Any, monkeypatch: Any) -> None:
    """Of 64: one for the end-of-sequence token before the prompt; the last new token is read by nobody."""
    prompt = "x" * 60
    for most in ("4", "500"):
        said, error = say(capsys, monkeypatch, models / "models/causal", prompt, "--max-new-tokens", most)
        assert error == "" and said.startswith(prompt)
    assert say(capsys, monkeypatch, models / "models/causal", "x" * 63, "--max-new-tokens", "5")[1] == ""


def test_generate_draws_several_texts_each_as_its_seed_alone_does(models: Path, capsys: Any, monkeypatch: Any) -> None:
    given = [models / "models/causal", PROMPTS["causal"], "--max-new-tokens", "12"]
    alone = [say(capsys, monkeypatch, *given, "--seed", str(seed))[0] for seed in (5, 6, 7)]
    together, error = say(capsys, monkeypatch, *given, "--seed", "5", "--num-samples", "3")
    assert error == "" and together == "\n---\n\n".join(alone)
    assert len(set(alone)) == 3


@pytest.mark.parametrize("past_end", [False, True])
def test_generate_past_the_end_of_a_document_begins_another_behind_an_empty_line(
    models: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, past_end: bool
) -> None:
    directory = shutil.copytree(models / "models/causal", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    config = AutoConfig.from_pretrained(directory, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    make_follow(model, tokenizer.convert_tokens_to_ids([tokenizer.eos_token, "a", "b"]))
    model.save_pretrained(directory)
    more = ["--past-end"] if past_end else []
    said, error = say(capsys, monkeypatch, directory, "a", "--max-new-tokens", "7", "--temperature", "0", *more)
    assert (said, error) == ("ab\n\nab\n\nab\n" if past_end else "ab\n", "")


def make_follow(model: Any, cycle: list[int]) -> None:
    """Set the weights of a GPT-2 so that each token of `cycle` is followed by the next, and the last by the first."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # so that the layers add nothing to what they are given
        model.transformer.ln_f.weight.fill_(1.0)
        for number, token in enumerate(cycle):
            vector = torch.zeros(model.config.n_embd)
            vector[2 * number], vector[2 * number + 1] = 1.0, -1.0  # of mean 0, which the last LayerNorm keeps
            model.transformer.wte.weight[token] = vector
            model.lm_head.weight[cycle[(number + 1) % len(cycle)]] = vector


@pytest.mark.parametrize("top_k", [1, 5])
def test_generate_fills_a_mask_with_the_likeliest_tokens(
    models: Path, capsys: Any, monkeypatch: Any, top_k: int
) -> None:
    said, error = say(capsys, monkeypatch, models / "models/mlm", PROMPTS["mlm"], "--top-k", str(top_k))
    shares = [float(line.split("%")[0]) for line in said.splitlines()]
    assert error == "" and len(shares) == top_k and shares == sorted(shares, reverse=True) and 0 < shares[0] <= 100


@pytest.mark.parametrize(
    ("task", "prompt", "message"),
    [
        ("none", "a", "is no directory: `dvc repro`"),
        ("..", "a", "holds no model: it has no config.json"),
        ("causal", " ", "the prompt is empty"),
        ("causal", "x" * 64, "the prompt has 65 tokens, the model positions for 64"),
        ("mlm", "The sky", "the prompt has 0 masks"),
        ("mlm", "{mask} is {mask}", "the prompt has 2 masks"),
        ("mlm", "{mask} is <mask>", "the prompt has 2 masks"),
        ("mlm", "{mask}" + "x" * 70, "the prompt has 73 tokens, the model positions for 64"),
    ],
)
def test_generate_wrong_argument_is_said_in_a_line(
    models: Path, capsys: Any, monkeypatch: Any, task: str, prompt: str, message: str
) -> None:
    said, error = say(capsys, monkeypatch, models / "models" / task, prompt)
    assert said == "" and error.startswith("generate: error: ") and message in error and "\n" not in error


def test_generate_reads_no_pickled_weights(models: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    (tmp_path / "config.json").write_bytes((models / "models/causal/config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    said, error = say(capsys, monkeypatch, tmp_path, "a")
    assert said == "" and "only " in error and "pytorch_model.bin: pickled weights can run code" in error


def changed(**values: Any) -> Callable[[Path], Any]:
    """Sets values of config.json."""

    def change(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda directory: (directory / name).write_text(content)


def nan(directory: Path) -> None:
    weights = load_file(directory / "model.safetensors")
    weights["transformer.wpe.weight"][0] = float("nan")
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def tokenizer(**changes: Any) -> Callable[[Path], Any]:
    """Sets values of tokenizer.json."""

    def change(directory: Path) -> None:
        file = directory / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config-empty": (text("config.json", ""), "config.json is not JSON"),
    "config-of-a-list": (text("config.json", "[]"), "config.json is not a JSON object"),
    "config-nested": (text("config.json", "[" * 200_000), "config.json is not JSON"),
    "architectures-of-a-number": (changed(architectures=5, model_type="t5"), "transformers has no such model"),
    "architectures-of-numbers": (changed(architectures=[5], n_head=0), "makes no gpt2"),
    "heads-0": (changed(n_head=0), "makes no gpt2"),
    "layers-10^9": (changed(n_layer=10**9), "cannot be meant"),
    "vocabulary-2^40": (changed(vocab_size=2**40), "cannot be meant"),
    "vocabulary-below-the-tokenizers": (changed(vocab_size=299), "another shape"),
    "activation-unknown": (changed(activation_function="sine"), "makes no gpt2"),
    "another-type": (changed(model_type="bert", architectures=["BertForMaskedLM"]), "are missing"),
    "quantized": (changed(quantization_config={"quant_method": "gptq"}), "quantized weights are not trained"),
    "weights-nan": (nan, "transformer.wpe.weight has values that are NaN"),
    "weights-empty": (text("model.safetensors", ""), "cannot be loaded"),
    "base-of-no-task": (text("base.json", "{}"), "base.json is damaged"),
    "base-of-a-list": (text("base.json", "[]"), "base.json is not a JSON object"),
    "base-of-another-shape": (text("base.json", '{"task": "causal"}'), "base.json is damaged"),
    "tokenizer-empty": (text("tokenizer.json", ""), "holds no tokenizer"),
    "tokenizer-nested": (text("tokenizer.json", "[" * 200_000), "holds no tokenizer"),
    "tokenizer-missing": (lambda directory: (directory / "tokenizer.json").unlink(), "holds no tokenizer"),
    "settings-nested": (text("tokenizer_config.json", '{"a":' * 200_000), "holds no tokenizer"),
    "tokenizer-panics": (tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}), "holds no"),
    "tokenizer-panics-over-the-prompt": (tokenizer(pre_tokenizer={"type": "FixedLength", "length": 0}), "the prompt"),
    "more-tokens": (text("added_tokens.json", '{"zebra": 300}'), "the tokenizer has 301 tokens, the model"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_generate_of_a_broken_directory_ends_in_a_line(
    models: Path, tmp_path: Path, capsys: Any, monkeypatch: Any, name: str
) -> None:
    shutil.copytree(models / "models/causal", tmp_path / "model")
    change, message = BROKEN[name]
    change(tmp_path / "model")
    _, error = say(capsys, monkeypatch, tmp_path / "model", PROMPTS["causal"], "--max-new-tokens", "2")
    assert error.startswith("generate: error: ") and message in error
    assert error.isprintable() and len(error) < 1000


@pytest.mark.parametrize("option", [["--top-k", "0"], ["--temperature", "-1"], ["--max-new-tokens", "0"]])
def test_generate_option_out_of_range_is_refused(
    models: Path, capsys: Any, monkeypatch: Any, option: list[str]
) -> None:
    assert say(capsys, monkeypatch, models / "models/causal", "a", *option)[1] == "2"


def test_generate_ends_quietly_on_ctrl_c(models: Path, capsys: Any, monkeypatch: Any) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "speak", interrupted)
    assert say(capsys, monkeypatch, models / "models/causal", "a") == ("\n", "130")
    assert capsys.readouterr().err == ""


def test_generate_as_a_command_streams_and_is_quiet_beside(models: Path) -> None:
    command = [sys.executable, "-m", "tools.generate", str(models / "models/causal"), PROMPTS["causal"]]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(PROMPTS["causal"])


def test_generate_readme_code_loads_both_models_as_they_are(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None and "models/causal" in code[1] and "models/mlm" in code[1]
    monkeypatch.chdir(models)
    exec(code[1], {})
    said = capsys.readouterr().out
    assert said.startswith(PROMPTS["causal"]) and len(said.splitlines()) >= 2


def test_generate_gives_a_model_of_answers_its_prompt_as_in_training(
    models: Path, capsys: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    directory = tmp_path / "answers"
    shutil.copytree(models / "models/causal", directory)
    form = prompt_template(Flatten(prompt=["title"], completion=["answers.text"], separator="\nA: "), None)
    assert form is not None
    (directory / "chat_template.jinja").write_text(form, encoding="utf-8")
    seen: list[list[int]] = []
    original = GPT2LMHeadModel.generate

    def record(self: Any, ids: Any, **named: Any) -> Any:
        seen.append(ids[0].tolist())
        return original(self, ids, **named)

    monkeypatch.setattr(GPT2LMHeadModel, "generate", record)
    said, error = say(capsys, monkeypatch, directory, "Why?", "--max-new-tokens", "3")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (error, tokenizer.decode(seen[0])) == ("", f"{tokenizer.eos_token}Why?\nA: ")
    assert said.startswith("Why?\n\n")
