"""Tests of tools.compare: metrics, differing parameters and summaries over seeds."""

import io
from typing import Any

import pytest
from rich.console import Console

from tools.compare import (
    break_heading,
    find_differing_headings,
    make_metrics_table,
    measure_width,
    print_metrics_table,
    read_rows,
    summarize_seeds,
)

SAMPLE = {"source": "sample", "split": {"seed": 0, "train": 0.8}, "columns": {"title": "title"}}


def make_revision(name: str, bits: float | None = 2.0, state: str = "success", **changes: Any) -> dict[str, Any]:
    """Return a row of `dvc exp show --json`; `changes` are keys of params.yaml, with `__` for each dot."""
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


def find_differences(*revisions: dict[str, Any]) -> list[str]:
    return find_differing_headings(read_rows(revisions, "val"))


def render_metrics_table(*revisions: dict[str, Any], width: int = 80, split: str = "val") -> str:
    console = Console(width=width, highlight=False, file=io.StringIO())
    rows = read_rows(revisions, split)
    with pytest.MonkeyPatch.context() as patch:
        text = io.StringIO()
        patch.setattr("sys.stdout", text)
        print_metrics_table(rows, console)
    return text.getvalue()


def test_compare_equal_experiments_differ_in_no_parameter() -> None:
    assert find_differences(make_revision("main"), make_revision("same")) == []


def test_compare_names_each_differing_parameter_once() -> None:
    other = make_revision("other", seed=2, tasks__mlm__learning_rate=0.1)
    other["data"]["params"]["conf/task/causal.yaml"]["data"] = {"trainer": {"weight_decay": 0.1}}
    assert find_differences(make_revision("main"), other) == [
        "seed",
        "mlm.learning_rate",
        "causal: trainer.weight_decay",
    ]


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
def test_compare_other_file_of_group_lists_differing_keys(
    chosen: str, old: str, new: str, changes: dict[str, str], expected: list[str]
) -> None:
    main = make_revision("main")
    main["data"]["params"][old]["data"] = SAMPLE
    other = make_revision("other", **changes)
    del other["data"]["params"][old]
    other["data"]["params"][new] = {"data": {**SAMPLE, "source": chosen}}
    assert find_differences(main, other) == expected


def test_compare_other_model_of_one_task_lists_keys_of_that_task() -> None:
    main = make_revision("main", files={"conf/model/tiny-gpt2.yaml": {"config": {"n_embd": 128, "n_layer": 2}}})
    wide = {"conf/model/wide.yaml": {"config": {"n_embd": 256, "n_layer": 2}}}
    other = make_revision("other", tasks__causal__model="wide", files=wide)
    assert find_differences(main, other) == ["causal.model", "causal.model: config.n_embd"]


def test_compare_hardware_key_overrides_key_of_base_file() -> None:
    same = make_revision(
        "same", files={"conf/hardware/cpu.yaml": {"hardware": {"num_threads": 2}, "trainer": {"bf16": False}}}
    )
    other = make_revision(
        "other", files={"conf/hardware/cpu.yaml": {"hardware": {"num_threads": 2}, "trainer": {"bf16": True}}}
    )
    assert find_differences(make_revision("main"), same) == []
    assert find_differences(make_revision("main"), other) == ["hardware: trainer.bf16"]


EXPERIMENT_NAMES = ("plum-cyan", "tawny-bots", "main")


def make_experiments(number: int) -> list[dict[str, Any]]:
    """Return three experiments that differ in `number` parameters with realistic names."""
    changes = [
        "tasks__causal__learning_rate",
        "tasks__mlm__num_train_epochs",
        "block_size",
        "seed",
        "tasks__mlm__learning_rate",
    ]
    return [
        make_revision(name, 2.0 + index, **dict.fromkeys(changes[:number], (0.00123, 0.00246, 0.00369)[index]))
        for index, name in enumerate(EXPERIMENT_NAMES)
    ]


@pytest.mark.parametrize(("number", "width"), [(2, 80), (5, 120)])
def test_compare_table_with_parameters_fits_into_width(number: int, width: int) -> None:
    text = render_metrics_table(*make_experiments(number), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "as arguments of `dvc exp run -S`" not in text
    assert "0.00123" in text and "…" not in text


def test_compare_table_too_wide_lists_parameters_below() -> None:
    text = render_metrics_table(*make_experiments(5), width=60)
    assert "2.0000*" in text and "…" not in text
    below = text.partition("as arguments of `dvc exp run -S`:\n")[2].splitlines()
    assert below[0].startswith("  plum-cyan   block_size=0.00123 ") or below[0].split()[0] == "plum-cyan"
    assert "tasks.causal.learning_rate=0.00123" in below[0] and "tasks.mlm.num_train_epochs=0.00246" in below[1]


def test_compare_long_values_are_not_cut() -> None:
    path = "/a/very/long/path" * 10
    text = render_metrics_table(make_revision("main"), make_revision("other", data__path=path), width=80)
    assert f'data.path="{path}"' in text


def test_compare_marks_the_best_of_each_column_and_ties() -> None:
    text = render_metrics_table(make_revision("a", 2.5), make_revision("b", 2.25), make_revision("c", 2.25, seed=3))
    assert text.count("2.2500*") == 2 and "2.5000 " in text and "2.5000*" not in text
    assert text.count("3.0000*") == 3
    assert "*" not in render_metrics_table(make_revision("a", 2.5))


def test_compare_split_test_shows_metrics_of_test() -> None:
    assert "3.5000" in render_metrics_table(make_revision("a", 2.5), split="test")


def test_compare_third_task_has_a_column() -> None:
    row = make_revision("a")
    row["data"]["metrics"]["metrics/prefix.json"] = {"data": {"prefix": {"val": {"bpb": 1.5}}}}
    text = render_metrics_table(row, make_revision("b"))
    assert "prefix" in text and "1.5000*" in text and "- " in text


def test_compare_row_in_earlier_format_has_no_metrics() -> None:
    old = make_revision("old")
    old["data"]["metrics"] = {"metrics/causal.json": {"data": {"causal": {"validation": {"bits_per_byte": 2.0}}}}}
    old["data"]["params"] = {"params.yaml": {"data": {"causal": {"model": "tiny"}, "data": {"name": "sample"}}}}
    text = render_metrics_table(old, make_revision("new"), width=300)
    assert [line for line in text.splitlines() if " old " in line and " - " in line]


def test_compare_experiments_without_results_are_left_out() -> None:
    found = [
        make_revision("main"),
        make_revision("queued", state="queued"),
        make_revision("none", bits=None),
        {"rev": "x", "data": None},
    ]
    assert [row.name for row in read_rows(found, "val")] == ["main"]


def test_compare_workspace_is_shown_only_if_it_differs_from_all_rows() -> None:
    assert [row.name for row in read_rows([make_revision("workspace"), make_revision("main")], "val")] == ["main"]
    found = [make_revision("workspace", seed=7), make_revision("main")]
    assert [row.name for row in read_rows(found, "val")] == ["workspace", "main"]


@pytest.mark.parametrize(
    "heading", ["causal.learning_rate", "mlm.num_train_epochs", "causal: trainer.per_device_train_batch_size", "seed"]
)
def test_break_heading_keeps_all_letters_in_lines_of_limited_width(heading: str) -> None:
    lines = break_heading(heading).split("\n")
    assert "".join(lines) == heading.replace(": ", ":")
    assert all(0 < len(line) <= 12 for line in lines)


def test_summarize_seeds_groups_rows_that_differ_only_in_seed() -> None:
    found = [make_revision("a", 2.0, seed=1), make_revision("b", 4.0, seed=2), make_revision("again", 4.0, seed=2)]
    found.append(make_revision("c", 9.0, seed=3, block_size=64))
    assert list(summarize_seeds(read_rows(found, "val"))) == [
        "  a, again (seeds 1, 2)",
        "    causal bpb: 3.0000 +- 1.4142",
        "    mlm pseudo_bpb: 3.0000 +- 0.0000",
    ]


def test_measure_width_is_width_of_longest_line() -> None:
    rows = read_rows([make_revision("main")], "val")
    console = Console(width=20, file=io.StringIO())
    assert measure_width(make_metrics_table(rows, []), console) > 20
