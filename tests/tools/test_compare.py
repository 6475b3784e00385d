"""What `make compare` says below the table of `dvc exp show`."""

from typing import Any

from tools.compare import differences, over_seeds


def row(name: str, seed: int = 1, decay: float = 0.0, bits: float = 2.0, **extra: Any) -> dict[str, Any]:
    params = {
        "params.yaml": {"data": {"seed": seed, "causal": {"model": "tiny", **extra}}},
        "conf/task/causal.yaml": {"data": {"trainer": {"weight_decay": decay}}},
    }
    metrics = {"metrics/causal.json": {"data": {"causal": {"validation": {"bits_per_byte": bits, "loss": 9.0}}}}}
    return {"name": name, "params": params, "metrics": metrics}


def test_compare_of_rows_alike_names_no_difference() -> None:
    assert differences([row("main"), row("same")]) == []
    assert differences([]) == []


def test_compare_names_each_differing_param_as_set_param_takes_it() -> None:
    lines = differences([row("main"), row("other", seed=2, decay=0.1)])
    assert lines == [
        "  main   seed=1 conf/task/causal.yaml:trainer.weight_decay=0.0",
        "  other  seed=2 conf/task/causal.yaml:trainer.weight_decay=0.1",
    ]


def test_compare_leaves_a_param_out_of_a_row_that_lacks_it() -> None:
    assert differences([row("main"), row("other", rank=8)]) == ["  main   ", "  other  causal.rank=8"]


def test_compare_sums_up_over_seeds_those_rows_that_differ_in_nothing_else() -> None:
    found = [row("a", 1, bits=2.0), row("b", 2, bits=4.0), row("again", 2, bits=4.0), row("c", 3, decay=0.1, bits=9.0)]
    assert list(over_seeds(found, "validation")) == [
        "  a, again (seeds 1, 2)",
        "    causal.validation.bits_per_byte: 3.0000 +- 1.4142",
    ]
