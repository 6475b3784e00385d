"""bits_per_byte beside the figure of EleutherAI's lm_eval (rolling log-likelihood) for the same model and documents.

Command python -m benchmarks.lm_eval_agreement MODEL_DIRECTORY RECORDS [--records 300] [--context 128]
Needs   uv pip install lm_eval

The two differ by their window rule alone. Both predict every token once, after an end-of-sequence token. Ours moves a
window of `context` tokens by half its length, so that a token in the middle of a document sees at least context / 2
tokens before it; lm_eval's windows are disjoint but for one token, so that those at a window's beginning see next to
nothing. Documents that fit into one window must agree; for longer ones lm_eval's figure is the larger. The last line
printed is one JSON object.
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from stages.download.files import find_files
from stages.download.records import to_record
from stages.download.schema import Columns
from stages.download.sources import read_rows
from stages.figures.groups import ratio_with_error
from stages.figures.metrics import document_nats
from stages.model.objectives import Text, make_objective
from stages.model.trained import load_trained
from stages.tokens.encoding import Tokenizers
from stages.tokens.vocabulary import load_tokenizer, vocabulary_of


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("records")
    parser.add_argument("--records", dest="number", type=int, default=300)
    parser.add_argument("--context", type=int, default=128)
    arguments = parser.parse_args()
    texts = list(itertools.islice(documents(arguments.records), arguments.number))
    tokenizer = load_tokenizer(arguments.model)
    vocabulary = vocabulary_of(tokenizer, arguments.model, "end_of_sequence", ["eos_token"])
    encoded = Tokenizers(tokenizer)(texts)
    ids = np.split(encoded.ids, encoded.offsets[1:-1])
    model = load_trained("causal", arguments.model)
    windows = make_objective("causal", vocabulary).windows((Text(own, 0) for own in ids), arguments.context)
    ours, _ = document_nats(model, windows, len(ids), batch_tokens=4096)
    theirs = lm_eval_nats(model, arguments, texts, vocabulary.special["eos_token"])
    num_bytes = np.array([len(text.encode()) for text in texts])
    one_window = np.array([len(document) < arguments.context for document in ids])
    result: dict[str, Any] = {"documents": len(texts), "bytes": int(num_bytes.sum()), "context": arguments.context}
    for name, chosen in {"all": np.ones(len(ids), bool), "one_window": one_window, "longer": ~one_window}.items():
        for who, nats in {"ours": ours, "lm_eval": theirs}.items():
            result[f"{who}_{name}"] = ratio_with_error(nats[chosen] / math.log(2), num_bytes[chosen])[0]
        result[f"documents_{name}"] = int(chosen.sum())
    print(json.dumps(result))


def documents(path: str) -> Any:
    """The documents of a file of records in ELI5's schema."""
    for file_system, file in find_files(path):
        for row in read_rows(file_system, file):
            record, _ = to_record(row.value, Columns(title="title", texts=["answers.text"]))
            if record["answers"]["text"]:
                yield " ".join(record["answers"]["text"])


def lm_eval_nats(model: Any, arguments: argparse.Namespace, texts: list[str], prefix: int) -> np.ndarray:
    """-ln p of each text by lm_eval's rolling log-likelihood."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    harness = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        max_length=arguments.context,
        batch_size=16,
        device="cpu",
        add_bos_token=False,
    )
    harness.custom_prefix_token_id = prefix
    requests = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)]
    with torch.inference_mode():
        return -np.array(harness.loglikelihood_rolling(requests, disable_tqdm=True))


if __name__ == "__main__":
    main()
