"""What `make compare` shows: metrics, the parameters in which experiments differ, and repeats over seeds."""

import io
from typing import Any

import pytest
from rich.console import Console

from tools.compare import break_heading, differing_params, draw, make_table, read_rows, summarize_seeds, width_of

SAMPLE = {"source": "sample", "split": {"seed": 0, "train": 0.8}, "columns": {"title": "title"}}


def revision(name: str, bits: float | None = 2.0, state: str = "success", **changes: Any) -> dict[str, Any]:
    """A row of `dvc exp show --json`; `changes` are dotted keys (a__b for a.b) of params.yaml."""
    params: dict[str, Any] = {
        "data": {"name": "sample"},
        "hardware": "cpu",
        "block_size": 128,
        "seed": 1,
        "tasks": {
            "causal": {"model": "tiny-gpt2", "adapter": "none", "learning_rate": 0.002, "num_train_epochs": 3},
            "mlm": {"model": "tiny-roberta", "adapter": "none", "learning_rate": 0.002, "num_train_epochs": 2},
        },
    }
    files: dict[str, Any] = {
        "conf/data/sample.yaml": SAMPLE,
        "conf/base/hardware.yaml": {"trainer": {"bf16": False}},
        "conf/hardware/cpu.yaml": {"hardware": {"num_threads": 2}},
        "conf/task/causal.yaml": {"trainer": {"weight_decay": 0.0}},
        "conf/task/mlm.yaml": {"trainer": {"weight_decay": 0.0}},
    }
    for key, value in changes.pop("files", {}).items():
        files[key] = value
    for key, value in changes.items():
        *sections, last = key.split("__")
        node = params
        for section in sections:
            node = node[section]
        node[last] = value
    shown = {"params.yaml": {"data": params}, **{file: {"data": content} for file, content in files.items()}}
    metrics = (
        {}
        if bits is None
        else {
            "metrics/causal.json": {"data": {"causal": {"val": {"bpb": bits}, "test": {"bpb": bits + 1}}}},
            "metrics/mlm.json": {"data": {"mlm": {"val": {"pseudo_bpb": 3.0}, "test": {"pseudo_bpb": 4.0}}}},
        }
    )
    row = {"rev": "workspace" if name == "workspace" else "a" * 40, "name": name}
    return {**row, "data": {"params": shown, "metrics": metrics}, "executor": {"state": state}}


def differing(*revisions: dict[str, Any]) -> list[str]:
    return differing_params(read_rows(revisions, "val"))


def drawn(*revisions: dict[str, Any], width: int = 80, split: str = "val") -> str:
    console = Console(width=width, highlight=False, file=io.StringIO())
    rows = read_rows(revisions, split)
    with pytest.MonkeyPatch.context() as patch:
        text = io.StringIO()
        patch.setattr("sys.stdout", text)
        draw(rows, console)
    return text.getvalue()


def test_compare_of_experiments_alike_has_no_parameter() -> None:
    assert differing(revision("main"), revision("same")) == []


def test_compare_names_each_differing_parameter_once() -> None:
    other = revision("other", seed=2, tasks__mlm__learning_rate=0.1)
    other["data"]["params"]["conf/task/causal.yaml"]["data"] = {"trainer": {"weight_decay": 0.1}}
    assert differing(revision("main"), other) == ["seed", "mlm.learning_rate", "causal: trainer.weight_decay"]


@pytest.mark.parametrize(
    ("chosen", "old", "new", "changes", "expected"),
    [
        (
            "files",
            "conf/data/sample.yaml",
            "conf/data/files.yaml",
            {"data__name": "files"},
            ["data.name", "data: source"],
        ),
        (
            *("gpu", "conf/hardware/cpu.yaml", "conf/hardware/gpu.yaml", {"hardware": "gpu"}),
            ["hardware", "hardware: source"],
        ),
    ],
)
def test_compare_of_another_file_of_a_group_names_the_keys_that_differ(
    chosen: str, old: str, new: str, changes: dict[str, str], expected: list[str]
) -> None:
    main = revision("main")
    main["data"]["params"][old]["data"] = SAMPLE
    other = revision("other", **changes)
    del other["data"]["params"][old]
    other["data"]["params"][new] = {"data": {**SAMPLE, "source": chosen}}
    assert differing(main, other) == expected


def test_compare_of_another_model_of_one_task_names_its_keys_for_that_task() -> None:
    main = revision("main", files={"conf/model/tiny-gpt2.yaml": {"config": {"n_embd": 128, "n_layer": 2}}})
    wide = {"conf/model/wide.yaml": {"config": {"n_embd": 256, "n_layer": 2}}}
    other = revision("other", tasks__causal__model="wide", files=wide)
    assert differing(main, other) == ["causal.model", "causal.model: config.n_embd"]


def test_compare_of_a_key_that_hardware_has_from_its_base_knows_which_wins() -> None:
    same = revision(
        "same", files={"conf/hardware/cpu.yaml": {"hardware": {"num_threads": 2}, "trainer": {"bf16": False}}}
    )
    other = revision(
        "other", files={"conf/hardware/cpu.yaml": {"hardware": {"num_threads": 2}, "trainer": {"bf16": True}}}
    )
    assert differing(revision("main"), same) == []
    assert differing(revision("main"), other) == ["hardware: trainer.bf16"]


NAMES = ("plum-cyan", "tawny-bots", "main")


def experiments(number: int) -> list[dict[str, Any]]:
    """Three experiments that differ in `number` parameters of realistic names."""
    changes = [
        "tasks__causal__learning_rate",
        "tasks__mlm__num_train_epochs",
        "block_size",
        "seed",
        "tasks__mlm__learning_rate",
    ]
    return [
        revision(name, 2.0 + index, **dict.fromkeys(changes[:number], (0.00123, 0.00246, 0.00369)[index]))
        for index, name in enumerate(NAMES)
    ]


@pytest.mark.parametrize(("number", "width"), [(2, 80), (5, 120)])
def test_compare_table_fits_with_its_parameters(number: int, width: int) -> None:
    text = drawn(*experiments(number), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "as `dvc exp run -S` takes them" not in text
    assert "0.00123" in text and "…" not in text


def test_compare_table_that_does_not_fit_moves_its_parameters_below() -> None:
    text = drawn(*experiments(5), width=60)
    assert "2.0000*" in text and "…" not in text
    below = text.partition("as `dvc exp run -S` takes them:\n")[2].splitlines()
    assert below[0].startswith("  plum-cyan   block_size=0.00123 ") or below[0].split()[0] == "plum-cyan"
    assert "tasks.causal.learning_rate=0.00123" in below[0] and "tasks.mlm.num_train_epochs=0.00246" in below[1]


def test_compare_long_values_are_listed_whole() -> None:
    path = "/a/very/long/path" * 10
    text = drawn(revision("main"), revision("other", data__path=path), width=80)
    assert f'data.path="{path}"' in text


def test_compare_marks_the_best_of_each_column_and_ties() -> None:
    text = drawn(revision("a", 2.5), revision("b", 2.25), revision("c", 2.25, seed=3))
    assert text.count("2.2500*") == 2 and "2.5000 " in text and "2.5000*" not in text
    assert text.count("3.0000*") == 3
    assert "*" not in drawn(revision("a", 2.5))


def test_compare_shows_the_split_that_is_asked_for() -> None:
    assert "3.5000" in drawn(revision("a", 2.5), split="test")


def test_compare_third_task_has_a_column() -> None:
    row = revision("a")
    row["data"]["metrics"]["metrics/prefix.json"] = {"data": {"prefix": {"val": {"bpb": 1.5}}}}
    text = drawn(row, revision("b"))
    assert "prefix" in text and "1.5000*" in text and "- " in text


def test_compare_row_of_an_earlier_version_has_no_metrics_and_no_error() -> None:
    old = revision("old")
    old["data"]["metrics"] = {"metrics/causal.json": {"data": {"causal": {"validation": {"bits_per_byte": 2.0}}}}}
    old["data"]["params"] = {"params.yaml": {"data": {"causal": {"model": "tiny"}, "data": {"name": "sample"}}}}
    text = drawn(old, revision("new"), width=300)
    assert [line for line in text.splitlines() if " old " in line and " - " in line]


def test_compare_leaves_out_what_has_no_results_of_its_own() -> None:
    found = [
        revision("main"),
        revision("queued", state="queued"),
        revision("none", bits=None),
        {"rev": "x", "data": None},
    ]
    assert [row.name for row in read_rows(found, "val")] == ["main"]


def test_compare_shows_the_workspace_where_it_is_like_no_other_row() -> None:
    assert [row.name for row in read_rows([revision("workspace"), revision("main")], "val")] == ["main"]
    found = [revision("workspace", seed=7), revision("main")]
    assert [row.name for row in read_rows(found, "val")] == ["workspace", "main"]


@pytest.mark.parametrize(
    "heading", ["causal.learning_rate", "mlm.num_train_epochs", "causal: trainer.per_device_train_batch_size", "seed"]
)
def test_compare_heading_over_several_lines_has_all_of_its_letters(heading: str) -> None:
    lines = break_heading(heading).split("\n")
    assert "".join(lines) == heading.replace(": ", ":")
    assert all(0 < len(line) <= 12 for line in lines)


def test_compare_sums_up_over_seeds_those_rows_that_differ_in_nothing_else() -> None:
    found = [revision("a", 2.0, seed=1), revision("b", 4.0, seed=2), revision("again", 4.0, seed=2)]
    found.append(revision("c", 9.0, seed=3, block_size=64))
    assert list(summarize_seeds(read_rows(found, "val"))) == [
        "  a, again (seeds 1, 2)",
        "    causal bpb: 3.0000 +- 1.4142",
        "    mlm pseudo_bpb: 3.0000 +- 0.0000",
    ]


def test_compare_width_counts_the_longest_line() -> None:
    rows = read_rows([revision("main")], "val")
    console = Console(width=20, file=io.StringIO())
    assert width_of(make_table(rows, []), console) > 20
