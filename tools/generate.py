"""Complete a prompt with a causal model, or fill the mask in a prompt with a masked model.

Command python -m tools.generate models/causal "The sky is blue because" [--max-new-tokens 60] [--temperature 0.8]
                                 [--top-k 50] [--seed 0] [--num-samples 3] [--past-end]
        python -m tools.generate models/mlm "The sky is {mask} because air scatters light." [--top-k 5]
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from stages.core.artifacts import make_damage_error, read_json_object
from stages.core.errors import StageError, escape_controls, is_error, printable
from stages.hub.files import CONVERT_HINT, count_usable_positions, format_only_pickle
from stages.model.schema import BASE_MODEL_CONFIG
from stages.shell.app import format_error
from stages.tokens.prompts import TRAINED_FORM_COMMENT
from stages.tokens.vocabulary import convert_rust_errors, load_transformers_tokenizer
from tools.pin_model import infer_task

DEFAULT_TOP_K = {"causal": 50, "mlm": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.generate")
    parser.add_argument("directory", type=Path, help="a model with its tokenizer: models/causal")
    parser.add_argument("prompt", help="text to complete; for a masked model, a sentence with one {mask}")
    parser.add_argument("--max-new-tokens", type=int, default=60, help="(default: 60)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always chooses the likeliest token (default: 0.8)"
    )
    parser.add_argument(
        "--top-k", type=int, help="tokens to sample from (default: 50), or to show for a mask (default: 5)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the sampling (default: 0)")
    parser.add_argument(
        "--num-samples",
        type=int,
        default=1,
        help="number of texts, with the seeds --seed, --seed + 1, ... (default: 1)",
    )
    parser.add_argument("--past-end", action="store_true", help="start another document after one ends")
    arguments = parser.parse_args()
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 1), ("seed", 0), ("num_samples", 1)):
        value = getattr(arguments, name)
        if value is not None and not least <= value < 2**32:
            parser.error(f"--{name.replace('_', '-')} {value}: it must be {least} or above")
    try:
        generate_text(arguments)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except BaseException as error:
        if not is_error(error) or os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        sys.exit(f"generate: error: {printable(' '.join(format_error(error).split()), 2000)}")


def generate_text(arguments: argparse.Namespace) -> None:
    """Print the model's completion of the prompt, or the tokens for its mask.

    Raises:
        StageError: if the directory has no model, or the prompt does not fit the model.
    """
    task = detect_task(arguments.directory)
    if not arguments.prompt.strip():
        raise StageError("the prompt is empty: give the beginning of a text, or a sentence with one {mask}")

    # Importing these takes seconds, so the arguments are checked first.
    import transformers

    from stages.model.models import check_embeddings
    from stages.model.trained import load_trained_model

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = load_trained_model(task, arguments.directory).eval()
    tokenizer = load_transformers_tokenizer(arguments.directory)
    check_embeddings(model, max(tokenizer.get_vocab().values()) + 1)
    top_k = min(arguments.top_k or DEFAULT_TOP_K[task], len(tokenizer))
    if task == "mlm":
        fill_mask(model, tokenizer, arguments.prompt, top_k)
        return
    for number in range(arguments.num_samples):
        if number:
            print("\n---\n")
        transformers.set_seed(arguments.seed + number)
        complete_prompt(model, tokenizer, arguments, top_k)


def detect_task(directory: Path) -> str:
    """Return the task (causal or mlm) of the model in `directory`, or of the base model of an adapter in it."""
    if not directory.is_dir():
        raise StageError(
            f"{printable(directory)} is not a directory: `dvc repro` or `dvc pull` makes models/causal and models/mlm"
        )
    if (directory / BASE_MODEL_CONFIG).is_file():
        task = read_json_object(directory / BASE_MODEL_CONFIG).get("task")
        if task not in ("causal", "mlm"):
            raise make_damage_error(directory / BASE_MODEL_CONFIG, "its task is neither causal nor mlm")
        return str(task)
    if not (directory / "config.json").is_file():
        raise StageError(f"{printable(directory)} contains no model: it has no config.json")
    if not any(directory.glob("*.safetensors")):
        raise StageError(
            f"{printable(directory)} has no *.safetensors weights{format_only_pickle(directory)}: {CONVERT_HINT}"
        )
    return infer_task(read_json_object(directory / "config.json"), directory)


def complete_prompt(model: Any, tokenizer: Any, arguments: argparse.Namespace, top_k: int) -> None:
    """Print the prompt and its continuation, streamed word by word, up to the end of the document.

    With `past_end`, another document follows after an empty line, as documents follow each other in training.
    """
    import torch
    from transformers import GenerationConfig, TextStreamer

    end = tokenizer.eos_token_id
    if end is None:
        raise StageError("the tokenizer has no eos_token, which marks the start and end of a document")

    class Printer(TextStreamer):  # type: ignore[misc]
        """Prints the text without control characters, which could change the state of the terminal."""

        next_tokens_are_prompt: bool

        def put(self, value: Any) -> None:
            if arguments.past_end and not self.next_tokens_are_prompt and value.tolist() == [end]:
                self.end()
                self.next_tokens_are_prompt = False  # which `end` sets
                print(flush=True)
            else:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(escape_controls(text), stream_end)

    # As in training: an end-of-sequence token before the document, or the prompt in the model's chat template.
    has_form = (tokenizer.chat_template or "").startswith(TRAINED_FORM_COMMENT)
    with convert_rust_errors("the tokenizer cannot encode the prompt"):
        if has_form:
            messages = [{"role": "user", "content": arguments.prompt}]
            given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            given = [end, *tokenizer.encode(arguments.prompt, add_special_tokens=False)]
    ids = torch.tensor([given])
    # The last new token is not fed back to the model, so it needs no position.
    room = check_prompt_length(model, ids.shape[1]) + 1 - ids.shape[1]
    temperature = arguments.temperature
    drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > 0 else {}
    # Replaces the generation settings of the checkpoint.
    model.generation_config = GenerationConfig(eos_token_id=None if arguments.past_end else end, pad_token_id=end)
    print(escape_controls(arguments.prompt), end="\n\n" if has_form else "", flush=True)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(arguments.max_new_tokens, room),
        streamer=Printer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **drawn,
    )


def fill_mask(model: Any, tokenizer: Any, prompt: str, top_k: int) -> None:
    """Print the likeliest tokens for the mask in `prompt`, one per line after its probability."""
    from transformers import pipeline

    if tokenizer.mask_token is None:
        raise StageError("the tokenizer has no mask_token")
    text = prompt.replace("{mask}", tokenizer.mask_token)
    if (masks := text.count(tokenizer.mask_token)) != 1:
        raise StageError(f"the prompt has {masks} masks: this is a masked model, give it a sentence with one {{mask}}")
    with convert_rust_errors("the tokenizer cannot encode the prompt"):
        length = len(tokenizer.encode(text))
    check_prompt_length(model, length)
    for found in pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")(text, top_k=top_k):
        print(f"{found['score']:7.2%}  {found['token_str']!r}")


def check_prompt_length(model: Any, num_tokens: int) -> int:
    """Return the model's number of positions, `sys.maxsize` if it is unbounded.

    Raises:
        StageError: if the prompt needs more positions.
    """
    positions = count_usable_positions(model.config.to_dict()) or sys.maxsize
    if num_tokens > positions:
        raise StageError(
            f"the prompt has {num_tokens} tokens, but the model only has {positions} positions: shorten it"
        )
    return positions


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end silently in `| head -1`
    main()
