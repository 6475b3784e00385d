"""Tests of the largest changes between two models: documents, groups and aligned pieces of text."""

from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from stages.figures.scores import Scores, TokenBits, write_token_bits
from tools.compare_pairs import BaselineComparison, Evaluation, compare_with_baseline
from tools.moved import (
    DecodedText,
    Excerpt,
    Segment,
    align_texts,
    cut_excerpt,
    find_moved,
    find_moved_groups,
    read_excerpts,
)

TEXTS = ["the sky is blue", "naïve 🙂 sky", "a", "blue blue blue", "why is the sky blue?", "é"]
SPLIT = "validation"


def make_tokenizer(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


FINE, COARSE = make_tokenizer(256), make_tokenizer(300)


class StubOuts:
    """Replacement of Outs with a tokenizer and the bits of each document's tokens per revision."""

    def __init__(self, tmp_path: Any, **revisions: tuple[Tokenizer, list[np.ndarray]]) -> None:
        self._revisions, self._file = revisions, tmp_path / "tokens.parquet"

    def read_out(self, rev: str, path: str) -> bytes | None:
        if rev not in self._revisions:
            return None
        tokenizer, bits = self._revisions[rev]
        if path == "data/tokens/causal/tokenizer/tokenizer.json":
            return tokenizer.to_str().encode()
        assert path == f"reports/evaluate/causal/tokens/{SPLIT}.parquet"
        ids = [np.array(tokenizer.encode(text).ids, np.uint16) for text in TEXTS]
        tokens = [TokenBits(*row) for row in zip(ids, [of.astype(np.float32) for of in bits], strict=True)]
        write_token_bits(self._file, np.arange(len(TEXTS)), tokens)
        return self._file.read_bytes()


def build_bits(tokenizer: Tokenizer, scale: float = 1.0) -> list[np.ndarray]:
    """Return the bits of each document's tokens, all equal to `scale`: `[num_tokens]` per document."""
    return [np.full(len(tokenizer.encode(text).ids), scale) for text in TEXTS]


def build_evaluation(rev: str, bits: list[np.ndarray], seed: str = "1") -> Evaluation:
    num_bytes = np.array([len(text.encode()) for text in TEXTS])
    scores = Scores(num_bytes, np.array(list(map(len, bits))), np.array([of.sum() for of in bits]))
    groups = pa.StructArray.from_arrays([pa.array(["x", "x", None, "y", "y", "y"])], ["kind"])
    table = pa.table(
        {
            "record": np.arange(len(TEXTS)) * 10,
            "source": ["toy"] * len(TEXTS),
            "groups": groups,
            "bytes": num_bytes,
            "tokens": scores.num_tokens,
        }
    )
    return Evaluation(rev, rev, seed, rev.rstrip("0123456789"), table, scores, 128, 0, False)


def build_comparison(*evaluations: Evaluation) -> BaselineComparison:
    (line,) = compare_with_baseline(evaluations[0], list(evaluations))
    return line


def test_moved_documents_have_their_text_and_the_difference_per_token(tmp_path: Any) -> None:
    before, after = build_bits(FINE), build_bits(FINE)
    after[3][0] -= 4.0
    after[3][1] += 1.0
    after[0][-1] += 0.5
    files = StubOuts(tmp_path, main=(FINE, before), other=(FINE, after))
    moved = find_moved(
        build_comparison(build_evaluation("main", before), build_evaluation("other", after)), "causal", SPLIT, files
    )  # type: ignore[arg-type]
    (better,), (worse,) = moved.better, moved.worse
    assert (better.record, better.source, better.num_bytes, better.bits) == (30, "toy", 14, -3.0)
    assert (worse.record, worse.bits) == (0, 0.5)
    assert better.excerpt is not None and worse.excerpt is not None
    assert better.excerpt.segments[:3] == [Segment("b", -4.0), Segment("l", 1.0), Segment("u", 0.0)]
    assert "".join(segment.text for segment in better.excerpt.segments) == TEXTS[3]
    assert worse.excerpt.segments[-1] == Segment("e", 0.5)
    assert not better.excerpt.begins_late and not better.excerpt.ends_early


def test_moved_documents_are_at_most_three_and_all_changed(tmp_path: Any) -> None:
    before = build_bits(FINE)
    after = [bits + change for bits, change in zip(before, (-1, -2, -3, -4, 0, 0), strict=True)]
    files = StubOuts(tmp_path, main=(FINE, before), other=(FINE, after))
    moved = find_moved(
        build_comparison(build_evaluation("main", before), build_evaluation("other", after)), "causal", SPLIT, files
    )  # type: ignore[arg-type]
    assert [document.record for document in moved.better] == [30, 10, 0]
    assert moved.worse == []


def test_excerpts_with_two_tokenizers_split_at_shared_token_ends(tmp_path: Any) -> None:
    fine, coarse = build_bits(FINE), build_bits(COARSE)
    files = StubOuts(tmp_path, main=(FINE, fine), other=(COARSE, coarse))
    line = build_comparison(build_evaluation("main", fine), build_evaluation("other", coarse))
    excerpts = read_excerpts(line, "causal", SPLIT, range(len(TEXTS)), files)  # type: ignore[arg-type]
    assert set(excerpts) == set(range(len(TEXTS)))
    for row, text in enumerate(TEXTS):
        segments = excerpts[row].segments
        assert "".join(segment.text for segment in segments) == text
        assert sum(segment.bits for segment in segments) == pytest.approx(len(coarse[row]) - len(fine[row]))
    assert max(len(segment.text) for segment in excerpts[3].segments) > 1
    assert [segment.text for segment in excerpts[5].segments] == ["é"]  # two tokens share the character


def test_excerpts_average_token_bits_over_seeds(tmp_path: Any) -> None:
    before = build_bits(FINE)
    seeds = {f"other{seed}": [bits * seed for bits in before] for seed in (2, 4)}
    files = StubOuts(tmp_path, main=(FINE, before), **{name: (FINE, bits) for name, bits in seeds.items()})
    evaluations = [build_evaluation(name, bits, seed=name[-1]) for name, bits in seeds.items()]
    moved = find_moved(build_comparison(build_evaluation("main", before), *evaluations), "causal", SPLIT, files)  # type: ignore[arg-type]
    assert moved.worse[0].excerpt is not None
    assert {segment.bits for segment in moved.worse[0].excerpt.segments} == {2.0}


@pytest.mark.parametrize("missing", ["main", "other"])
def test_moved_documents_without_cached_tokens_have_no_excerpt(tmp_path: Any, missing: str) -> None:
    bits = {"main": build_bits(FINE), "other": build_bits(FINE, 2.0)}
    files = StubOuts(tmp_path, **{name: (FINE, of) for name, of in bits.items() if name != missing})
    line = build_comparison(*(build_evaluation(name, of) for name, of in bits.items()))
    moved = find_moved(line, "causal", SPLIT, files)  # type: ignore[arg-type]
    assert len(moved.worse) == 3 and all(document.excerpt is None for document in moved.worse)


def test_excerpts_of_texts_decoded_differently_are_left_out(tmp_path: Any) -> None:
    lossy = Tokenizer.from_str(FINE.to_str())
    lossy.decoder = decoders.Fuse()  # decodes each byte to its placeholder character
    bits = build_bits(FINE)
    files = StubOuts(tmp_path, main=(FINE, bits), other=(lossy, bits))
    line = build_comparison(build_evaluation("main", bits), build_evaluation("other", build_bits(FINE, 2.0)))
    assert set(read_excerpts(line, "causal", SPLIT, [0, 2], files)) == {2}  # type: ignore[arg-type]


def test_moved_groups_have_several_values_and_the_largest_change_first() -> None:
    before, after = build_bits(FINE), build_bits(FINE)
    after[0] -= 0.5
    after[4] += 2.0
    groups = find_moved_groups(build_comparison(build_evaluation("main", before), build_evaluation("other", after)))
    assert [(moved.group, moved.value) for moved in groups] == [("kind", "y"), ("kind", "x"), ("kind", "(none)")]
    assert groups[0].bits == pytest.approx(2.0 * len(after[4]))
    assert groups[0].difference.num_documents == 3
    assert sum(moved.bits for moved in groups) == pytest.approx(2.0 * len(after[4]) - 0.5 * len(after[0]))


PIECES = st.lists(st.tuples(st.text("ab", min_size=1, max_size=3), st.floats(0, 9)), min_size=1, max_size=20)


def build_decoded_text(pieces: list[tuple[str, float]]) -> DecodedText:
    ends = np.cumsum([len(text) for text, _ in pieces])
    return DecodedText("".join(text for text, _ in pieces), ends, np.cumsum([bits for _, bits in pieces]))


@given(PIECES, st.data())
def test_aligned_pieces_add_up_to_text_and_difference(pieces: list[tuple[str, float]], data: st.DataObject) -> None:
    ours = build_decoded_text(pieces)
    ends = sorted(data.draw(st.sets(st.integers(1, len(ours.text)))) | {len(ours.text)})
    others = DecodedText(ours.text, np.array(ends), np.cumsum(np.ones(len(ends))))
    segments = align_texts(ours, others)
    assert segments is not None
    assert "".join(segment.text for segment in segments) == ours.text
    assert np.cumsum([len(segment.text) for segment in segments]).tolist() == sorted({*ours.ends.tolist()} & {*ends})
    assert sum(segment.bits for segment in segments) == pytest.approx(ours.bits[-1] - len(ends), abs=1e-9)


def test_excerpt_is_the_part_with_the_largest_changes() -> None:
    segments = [Segment("word ", 0.0)] * 1000
    segments[700] = Segment("here ", -3.0)
    excerpt = cut_excerpt(segments)
    assert Segment("here ", -3.0) in excerpt.segments
    assert excerpt.begins_late and excerpt.ends_early
    assert len(excerpt.segments) == 160
    assert cut_excerpt(segments[:3]) == Excerpt(segments[:3], False, False)
    assert cut_excerpt([Segment("x" * 5000, 1.0)]) == Excerpt([Segment("x" * 5000, 1.0)], False, False)


def test_token_bits_files_are_deterministic_with_several_row_groups(tmp_path: Any) -> None:
    ids = [np.arange(number % 5, dtype=np.uint16) for number in range(3000)]
    bits = [of.astype(np.float32) for of in ids]
    for name in ("one", "two"):
        write_token_bits(tmp_path / name, np.arange(3000), [TokenBits(*row) for row in zip(ids, bits, strict=True)])
    content = (tmp_path / "one").read_bytes()
    assert content == (tmp_path / "two").read_bytes()
    assert pq.ParquetFile(BytesIO(content)).num_row_groups == 3
    assert pq.read_table(BytesIO(content)).column("bits")[2999].as_py() == [0.0, 1.0, 2.0, 3.0]
