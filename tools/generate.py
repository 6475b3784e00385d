"""Let a trained model speak: complete a prompt, or fill a mask in it, whichever the model is for.

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

from stages.core.artifacts import damaged, read_object
from stages.core.errors import StageError, is_error, printable, without_controls
from stages.hub.files import CONVERT, only_pickles, usable_positions
from stages.model.schema import BASE
from stages.shell.app import describe_error
from stages.tokens.prompts import TRAINED_FORM
from stages.tokens.vocabulary import rust_errors, transformers_tokenizer
from tools.pin_model import task_of

TOP_K = {"causal": 50, "mlm": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], prog="python -m tools.generate")
    parser.add_argument("directory", type=Path, help="a model with its tokenizer: models/causal")
    parser.add_argument("prompt", help="a beginning to complete; for a masked model, a sentence with one {mask}")
    parser.add_argument("--max-new-tokens", type=int, default=60, help="(default: 60)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--top-k", type=int, help="sampled from, or shown for a mask (defaults: 50, 5)")
    parser.add_argument("--seed", type=int, default=0, help="another one draws another text (default: 0)")
    parser.add_argument("--num-samples", type=int, default=1, help="texts, with seeds from --seed on (default: 1)")
    parser.add_argument("--past-end", action="store_true", help="go on with another document where one ends")
    arguments = parser.parse_args()
    for name, least in (("max_new_tokens", 1), ("temperature", 0), ("top_k", 1), ("seed", 0), ("num_samples", 1)):
        value = getattr(arguments, name)
        if value is not None and not least <= value < 2**32:
            parser.error(f"--{name.replace('_', '-')} {value}: it must be {least} or above")
    try:
        speak(arguments)
    except KeyboardInterrupt:
        print()
        sys.exit(130)
    except BaseException as error:
        if not is_error(error) or os.environ.get("LM_REPRO_DEBUG") == "1":
            raise
        sys.exit(f"generate: error: {printable(' '.join(describe_error(error).split()), 2000)}")


def speak(arguments: argparse.Namespace) -> None:
    """Print what the model has to say.

    Raises:
        StageError: if there is no model in the directory, or the prompt does not suit it.
    """
    task = task_in(arguments.directory)
    if not arguments.prompt.strip():
        raise StageError("the prompt is empty: give the beginning of a text, or a sentence with one {mask}")

    # Seconds of importing, not before the arguments are known to be good.
    import transformers

    from stages.model.models import check_embeddings
    from stages.model.trained import load_trained

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = load_trained(task, arguments.directory).eval()
    tokenizer = transformers_tokenizer(arguments.directory)
    check_embeddings(model, max(tokenizer.get_vocab().values()) + 1)
    top_k = min(arguments.top_k or TOP_K[task], len(tokenizer))
    if task == "mlm":
        fill(model, tokenizer, arguments.prompt, top_k)
        return
    for number in range(arguments.num_samples):
        if number:
            print("\n---\n")
        transformers.set_seed(arguments.seed + number)
        complete(model, tokenizer, arguments, top_k)


def task_in(directory: Path) -> str:
    """The task of the model in `directory`, or of what additions in it belong to: causal or mlm."""
    if not directory.is_dir():
        raise StageError(
            f"{printable(directory)} is no directory: `dvc repro` or `dvc pull` makes models/causal and models/mlm"
        )
    if (directory / BASE).is_file():
        task = read_object(directory / BASE).get("task")
        if task not in ("causal", "mlm"):
            raise damaged(directory / BASE, "it names no task")
        return str(task)
    if not (directory / "config.json").is_file():
        raise StageError(f"{printable(directory)} holds no model: it has no config.json")
    if not any(directory.glob("*.safetensors")):
        raise StageError(f"{printable(directory)} has no *.safetensors weights{only_pickles(directory)}: {CONVERT}")
    return task_of(read_object(directory / "config.json"), directory)


def complete(model: Any, tokenizer: Any, arguments: argparse.Namespace, top_k: int) -> None:
    """Print the prompt and its continuation, word by word as it comes, up to the end of the document.

    With `past_end`, another document follows behind an empty line, as documents follow each other in training.
    """
    import torch
    from transformers import GenerationConfig, TextStreamer

    end = tokenizer.eos_token_id
    if end is None:
        raise StageError("the tokenizer has no eos_token, with which a document begins and ends")

    class Printer(TextStreamer):  # type: ignore[misc]
        """Prints the text without the control characters with which it would steer the terminal."""

        next_tokens_are_prompt: bool

        def put(self, value: Any) -> None:
            if arguments.past_end and not self.next_tokens_are_prompt and value.tolist() == [end]:
                self.end()
                self.next_tokens_are_prompt = False  # which `end` sets
                print(flush=True)
            else:
                super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            super().on_finalized_text(without_controls(text), stream_end)

    # As in training: an end-of-sequence token before a document, or a prompt in its own form.
    has_form = (tokenizer.chat_template or "").startswith(TRAINED_FORM)
    with rust_errors("the tokenizer cannot encode the prompt"):
        if has_form:
            messages = [{"role": "user", "content": arguments.prompt}]
            given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            given = [end, *tokenizer.encode(arguments.prompt, add_special_tokens=False)]
    ids = torch.tensor([given])
    # The last new token is not read again, so that it needs no position.
    room = check_length(model, ids.shape[1]) + 1 - ids.shape[1]
    temperature = arguments.temperature
    drawn = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature > 0 else {}
    # Not what a checkpoint came with.
    model.generation_config = GenerationConfig(eos_token_id=None if arguments.past_end else end, pad_token_id=end)
    print(without_controls(arguments.prompt), end="\n\n" if has_form else "", flush=True)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=min(arguments.max_new_tokens, room),
        streamer=Printer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **drawn,
    )


def fill(model: Any, tokenizer: Any, prompt: str, top_k: int) -> None:
    """Print the likeliest tokens for the mask in `prompt`, one a line behind its probability."""
    from transformers import pipeline

    if tokenizer.mask_token is None:
        raise StageError("the tokenizer has no mask_token")
    text = prompt.replace("{mask}", tokenizer.mask_token)
    if (masks := text.count(tokenizer.mask_token)) != 1:
        raise StageError(f"the prompt has {masks} masks: this is a masked model, give it a sentence with one {{mask}}")
    with rust_errors("the tokenizer cannot encode the prompt"):
        length = len(tokenizer.encode(text))
    check_length(model, length)
    for found in pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")(text, top_k=top_k):
        print(f"{found['score']:7.2%}  {found['token_str']!r}")


def check_length(model: Any, num_tokens: int) -> int:
    """The model's positions, a very large number where nothing bounds them; an error if the prompt needs more."""
    positions = usable_positions(model.config.to_dict()) or sys.maxsize
    if num_tokens > positions:
        raise StageError(f"the prompt has {num_tokens} tokens, the model positions for {positions}: shorten it")
    return positions


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head -1` ends it without a word
    main()
