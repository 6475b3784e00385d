"""What a trained model says: completions of prompts, or the likeliest words for a mask, as Markdown."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.core.errors import without_controls
from stages.evaluate.schema import Samples
from stages.hub.files import usable_positions
from stages.model.precision import full_precision
from stages.tokens.vocabulary import Vocabulary, load_tokenizer


def make_samples(config: Samples, name: str, model: Any, tokenizer_directory: Path, vocabulary: Vocabulary) -> str:
    """A Markdown page of samples for the task `name`, the same for the same model and config."""
    tokenizer = load_tokenizer(tokenizer_directory)
    tokenizer.encode_special_tokens = False  # prompts are ours, and hold the mask token
    sample = _complete if name == "causal" else fill
    with full_precision(model):
        parts = [sample(config, model, tokenizer, vocabulary, prompt) for prompt in config.prompts]
    return f"# Samples: {name}\n\n" + "\n".join(parts)


def _complete(config: Samples, model: Any, tokenizer: Any, vocabulary: Vocabulary, prompt: str) -> str:
    """`prompt` and its completion, drawn with config.seed."""
    assert config.max_new_tokens is not None and config.temperature is not None
    end = vocabulary.special["eos_token"]
    ids = [end, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    generator = torch.Generator().manual_seed(config.seed)
    past, given = None, torch.tensor([ids])
    positions = usable_positions(model.config.to_dict()) or math.inf
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
    text = tokenizer.decode(ids[1:], skip_special_tokens=True)
    return without_controls(f"> **{prompt}**{text.removeprefix(prompt)}").replace("\n", "\n> ") + "\n"


def fill(config: Samples, model: Any, tokenizer: Any, vocabulary: Vocabulary, prompt: str) -> str:
    """`prompt`, a sentence with one {mask}, and a table of the config.top_k likeliest tokens for it."""
    mask = vocabulary.special["mask_token"]
    text = tokenizer.encode(prompt.replace("{mask}", tokenizer.id_to_token(mask)), add_special_tokens=False).ids
    ids = np.array([*vocabulary.prefix, *text, *vocabulary.suffix])
    logits = model(torch.from_numpy(ids)[None].to(model.device)).logits[0, int(np.argmax(ids == mask))]
    shares, tokens = logits.float().softmax(-1).topk(min(config.top_k, vocabulary.size))
    rows = [
        f"| {_cell(tokenizer.decode([token]))} | {share:.1%} |"
        for token, share in zip(tokens.tolist(), shares.tolist(), strict=True)
    ]
    blank = without_controls(prompt).replace("{mask}", r"\_\_\_")
    return "\n".join([f"**{blank}**\n", "| token | probability |", "|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return "`" + without_controls(text.strip()).replace("|", "\\|").replace("\n", "\\n") + "`"
