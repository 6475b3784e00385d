"""Compare bits_per_byte with EleutherAI's lm_eval (rolling log-likelihood) for the same model and documents.

Command python -m benchmarks.lm_eval_agreement MODEL_DIRECTORY RECORDS [--records 300] [--context 128]
Needs   uv pip install lm_eval

The two differ only in their windows. Both predict every token once, after an end-of-sequence token. We move a window of
`context` tokens by half its length, so that a token in the middle of a document has at least context / 2 tokens of
context. The windows of lm_eval overlap by one token only, so that tokens at the beginning of a window have almost no
context. The figures must agree for documents that fit into one window; for longer ones, lm_eval's is larger. The last
line printed is one JSON object.
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
from stages.download.records import build_record
from stages.download.schema import Columns
from stages.download.sources import read_file_rows
from stages.figures.groups import compute_ratio_with_error
from stages.figures.metrics import compute_document_nats
from stages.model.objectives import make_objective
from stages.model.trained import load_trained_model
from stages.tokens.encoding import DocumentText, TokenizersEngine
from stages.tokens.vocabulary import build_vocabulary, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("records")
    parser.add_argument("--records", dest="number", type=int, default=300)
    parser.add_argument("--context", type=int, default=128)
    arguments = parser.parse_args()
    texts = list(itertools.islice(read_documents(arguments.records), arguments.number))
    tokenizer = load_tokenizer(arguments.model)
    vocabulary = build_vocabulary(tokenizer, arguments.model, "end_of_sequence", ["eos_token"])
    encoded = TokenizersEngine(tokenizer)(texts)
    ids = np.split(encoded.ids, encoded.offsets[1:-1])  # one array [num_tokens] per document
    model = load_trained_model("causal", arguments.model)
    windows = make_objective("causal", vocabulary).build_windows(
        (DocumentText(own, 0) for own in ids), arguments.context
    )
    ours, _ = compute_document_nats(model, windows, len(ids), batch_tokens=4096)
    theirs = compute_lm_eval_nats(model, arguments, texts, vocabulary.special["eos_token"])
    num_bytes = np.array([len(text.encode()) for text in texts])
    one_window = np.array([len(document) < arguments.context for document in ids])
    result: dict[str, Any] = {"documents": len(texts), "bytes": int(num_bytes.sum()), "context": arguments.context}
    for name, chosen in {"all": np.ones(len(ids), bool), "one_window": one_window, "longer": ~one_window}.items():
        for who, nats in {"ours": ours, "lm_eval": theirs}.items():
            result[f"{who}_{name}"] = compute_ratio_with_error(nats[chosen] / math.log(2), num_bytes[chosen])[0]
        result[f"documents_{name}"] = int(chosen.sum())
    print(json.dumps(result))


def read_documents(path: str) -> Any:
    """Yield the documents of a file of records in ELI5's schema."""
    for file_system, file in find_files(path):
        for row in read_file_rows(file_system, file):
            record, _ = build_record(row.value, Columns(title="title", texts=["answers.text"]))
            if record["answers"]["text"]:
                yield " ".join(record["answers"]["text"])


def compute_lm_eval_nats(model: Any, arguments: argparse.Namespace, texts: list[str], prefix: int) -> np.ndarray:
    """Return -ln p of each text, `[num_texts]`, float64, from lm_eval's rolling log-likelihood."""
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
