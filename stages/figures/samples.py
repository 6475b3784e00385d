"""What a model says before and after training: completions of prompts, or the likeliest words for a mask."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.core.artifacts import damaged
from stages.core.errors import without_controls
from stages.figures.schema import Samples
from stages.model.precision import full_precision
from stages.tokens.prompts import PromptEncoder
from stages.tokens.texts import Flatten, open_template
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
    """What `model` says to each of config.prompts, the same for the same model and config.

    Keys: prompt, and for a causal model completion (text), for a masked one tokens: (text, probability) of the
    config.top_k likeliest.

    Args:
        positions: tokens that the model can attend to, where a completion ends at the latest; None: any number.
        flatten: how documents are made, which a prompt of a causal model begins as.
    """
    tokenizer = load_tokenizer(tokenizer_directory)
    begin = None
    if name == "causal":
        template = open_template(flatten, tokenizer_directory, tokenizer, vocabulary.special)
        begin = PromptEncoder(tokenizer, vocabulary.lead, flatten, template)
    else:
        tokenizer.encode_special_tokens = False  # prompts are ours, and hold the mask token
    most = math.inf if positions is None else positions
    with full_precision(model):
        return [
            {"prompt": prompt}
            | (
                _complete(config, model, most, tokenizer, vocabulary, begin, prompt)
                if begin is not None
                else _fill(config, model, tokenizer, vocabulary, prompt)
            )
            for prompt in config.prompts
        ]


def write_page(name: str, before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """A Markdown page of the samples of the task `name`: each prompt, before training and after."""
    show = _show_completions if name == "causal" else _show_tokens
    return f"# Samples: {name}\n\n" + "\n".join(map(show, before, after))


def check_samples(before: Any, after: list[dict[str, Any]], file: Path) -> None:
    """Raise StageError if what baseline wrote to `file` is no answer to the same prompts."""
    known = isinstance(before, list) and all(isinstance(item, dict) for item in before)
    if not known or [(item.get("prompt"), item.keys()) for item in before] != [
        (item["prompt"], item.keys()) for item in after
    ]:
        raise damaged(file, "not the samples of these prompts")


def _complete(
    config: Samples,
    model: Any,
    positions: float,
    tokenizer: Any,
    vocabulary: Vocabulary,
    begin: PromptEncoder,
    prompt: str,
) -> dict[str, Any]:
    """The completion of `prompt`, drawn with config.seed, behind what separates the two."""
    assert config.max_new_tokens is not None and config.temperature is not None
    end, given_ids = vocabulary.special["eos_token"], begin(prompt)
    ids = list(given_ids)
    generator = torch.Generator().manual_seed(config.seed)
    past, given = None, torch.tensor([ids])
    for _ in range(config.max_new_tokens):
        if len(ids) > positions:
            break
        outputs = model(given.to(model.device), past_key_values=past, use_cache=True)
        scores, candidates = (outputs.logits[0, -1].cpu() / config.temperature).topk(min(config.top_k, vocabulary.size))
        token = int(candidates[torch.multinomial(scores.softmax(-1), 1, generator=generator)])
        if token == end:
            break
        ids.append(token)
        past, given = outputs.past_key_values, torch.tensor([[token]])
    # Decoded together, since what a token stands for may depend on the one before it.
    known = tokenizer.decode(given_ids, skip_special_tokens=True)
    completion = tokenizer.decode(ids, skip_special_tokens=True).removeprefix(known)
    return {"completion": begin.separator + completion}


def _fill(config: Samples, model: Any, tokenizer: Any, vocabulary: Vocabulary, prompt: str) -> dict[str, Any]:
    """The likeliest tokens for the {mask} of `prompt`."""
    mask = vocabulary.special["mask_token"]
    text = tokenizer.encode(prompt.replace("{mask}", tokenizer.id_to_token(mask)), add_special_tokens=False).ids
    ids = np.array([*vocabulary.prefix, *text, *vocabulary.suffix])
    logits = model(torch.from_numpy(ids)[None].to(model.device)).logits[0, int(np.argmax(ids == mask))]
    shares, tokens = logits.float().softmax(-1).topk(min(config.top_k, vocabulary.size))
    texts = (tokenizer.decode([token]) for token in tokens.tolist())
    return {"tokens": [[text, share] for text, share in zip(texts, shares.tolist(), strict=True)]}


def _show_completions(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The prompt and a quotation for each model."""
    quotations = []
    for when, sample in (("before", before), ("after", after)):
        text = without_controls(f"{when} training: **{sample['prompt']}**{sample['completion']}")
        quotations.append("> " + text.replace("\n", "\n> ") + "\n")
    return "\n".join(quotations)


def _show_tokens(before: dict[str, Any], after: dict[str, Any]) -> str:
    """The prompt and a table with two columns for each model."""
    rows = [
        "| " + " | ".join(f"{_cell(text)} | {share:.1%}" for text, share in pair) + " |"
        for pair in zip(before["tokens"], after["tokens"], strict=True)
    ]
    blank = without_controls(after["prompt"]).replace("{mask}", r"\_\_\_")
    heading = "| before training | probability | after training | probability |\n|---|---|---|---|"
    return "\n".join([f"**{blank}**\n", heading, *rows, ""])


def _cell(text: str) -> str:
    return "`" + without_controls(text.strip()).replace("|", "\\|").replace("\n", "\\n") + "`"
