"""Samples of a model before and after training: completions of prompts, or the most likely tokens for a mask."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from stages.core.artifacts import make_damage_error
from stages.core.errors import escape_controls
from stages.figures.schema import Samples
from stages.model.precision import full_precision
from stages.tokens.prompts import PromptEncoder
from stages.tokens.texts import Flatten, load_template
from stages.tokens.vocabulary import Vocabulary, load_tokenizer


def make_samples(
    config: Samples,
    name: str,
    model: Any,
    positions: int | None,
    tokenizer_directory: Path,
    vocabulary: Vocabulary,
    flatten: Flatten,
) -> list[dict[str, Any]]:
    """Generate the sample of each prompt in config.prompts. The same model and config give the same samples.

    Keys: prompt, and completion (text) for a causal model, or tokens for a masked model: (text, probability) of the
    config.top_k most likely ones.

    Args:
        name: name of the objective.
        positions: maximum number of tokens that the model accepts, at which a completion ends; None: no limit.
        flatten: how records are turned into documents. A prompt of a causal model is encoded as their beginning.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    encode_prompt = None
    if name == "causal":
        template = load_template(flatten, tokenizer_directory, tokenizer, vocabulary.special)
        encode_prompt = PromptEncoder(tokenizer, vocabulary.lead, flatten, template)
    else:
        tokenizer.encode_special_tokens = False  # the prompts come from conf/ and contain the mask token
    max_positions = math.inf if positions is None else positions
    with full_precision(model):
        return [
            {"prompt": prompt}
            | (
                _complete_prompt(config, model, max_positions, tokenizer, vocabulary, encode_prompt, prompt)
                if encode_prompt is not None
                else _fill_mask(config, model, tokenizer, vocabulary, prompt)
            )
            for prompt in config.prompts
        ]


def format_page(name: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """Return a Markdown page of samples, with each prompt before and after training.

    Args:
        name: name of the objective.
    """
    format_sample = _format_completions if name == "causal" else _format_token_table
    return f"# Samples: {name}\n\n" + "\n".join(map(format_sample, before, after))


def check_samples(before: Any, after: list[dict[str, Any]], file: Path) -> None:
    """Check that the samples that baseline wrote to `file` have the same prompts as `after`.

    Raises:
        StageError: if they do not.
    """
    is_valid = isinstance(before, list) and all(isinstance(item, dict) for item in before)
    if not is_valid or [(item.get("prompt"), item.keys()) for item in before] != [
        (item["prompt"], item.keys()) for item in after
    ]:
        raise make_damage_error(file, "not the samples of these prompts")


def _complete_prompt(
    config: Samples,
    model: Any,
    positions: float,
    tokenizer: Any,
    vocabulary: Vocabulary,
    encode_prompt: PromptEncoder,
    prompt: str,
) -> dict[str, Any]:
    """Return the completion of `prompt`, sampled with config.seed, after the separator of the two."""
    assert config.max_new_tokens is not None and config.temperature is not None
    end, prompt_ids = vocabulary.special["eos_token"], encode_prompt(prompt)
    ids = prompt_ids
    # The last new token is not fed back to the model, so it needs no position.
    max_new_tokens = int(min(config.max_new_tokens, positions + 1 - len(prompt_ids)))
    if max_new_tokens > 0:
        # Replaces the generation settings of the checkpoint.
        model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
        inputs = torch.tensor([prompt_ids], device=model.device)  # [1, prompt_length]
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(config.seed)
            outputs = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=config.temperature,
                top_k=min(config.top_k, vocabulary.size),
            )
        ids = outputs[0].tolist()
    # Decode prompt and completion together: the text of a token may depend on the token before it.
    prompt_text = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    completion = tokenizer.decode(ids, skip_special_tokens=True).removeprefix(prompt_text)
    return {"completion": encode_prompt.separator + completion}


def _fill_mask(config: Samples, model: Any, tokenizer: Any, vocabulary: Vocabulary, prompt: str) -> dict[str, Any]:
    """Return the most likely tokens for the {mask} in `prompt`, with their probabilities."""
    mask = vocabulary.special["mask_token"]
    text = tokenizer.encode(prompt.replace("{mask}", tokenizer.id_to_token(mask)), add_special_tokens=False).ids
    ids = np.array([*vocabulary.prefix, *text, *vocabulary.suffix])
    # [vocab_size] at the position of the mask
    logits = model(torch.from_numpy(ids)[None].to(model.device)).logits[0, int(np.argmax(ids == mask))]
    shares, tokens = logits.float().softmax(-1).topk(min(config.top_k, vocabulary.size))
    texts = (tokenizer.decode([token]) for token in tokens.tolist())
    return {"tokens": [[text, share] for text, share in zip(texts, shares.tolist(), strict=True)]}


def _format_completions(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Format the prompt and its completions, before and after training, as Markdown quotations."""
    quotations = []
    for when, sample in (("before", before), ("after", after)):
        text = escape_controls(f"{when} training: **{sample['prompt']}**{sample['completion']}")
        quotations.append("> " + text.replace("\n", "\n> ") + "\n")
    return "\n".join(quotations)


def _format_token_table(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Format the prompt and a Markdown table of its most likely tokens, before and after training."""
    rows = [
        "| " + " | ".join(f"{_format_cell(text)} | {share:.1%}" for text, share in pair) + " |"
        for pair in zip(before["tokens"], after["tokens"], strict=True)
    ]
    blank = escape_controls(after["prompt"]).replace("{mask}", r"\_\_\_")
    heading = "| before training | probability | after training | probability |\n|---|---|---|---|"
    return "\n".join([f"**{blank}**\n", heading, *rows, ""])


def _format_cell(text: str) -> str:
    return "`" + escape_controls(text.strip()).replace("|", "\\|").replace("\n", "\\n") + "`"
