"""Precision: bf16 only if the processor supports it, and figures always in fp32."""

import logging

import pytest
import torch
from toys import make_toy_model

from stages.core.errors import StageError
from stages.model.precision import NATIVE_BF16, check_bf16, full_precision


def processor(monkeypatch, *features):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Z80", **dict.fromkeys(features, True)})


@pytest.mark.parametrize("feature", NATIVE_BF16)
def test_check_bf16_of_a_processor_that_has_it_passes_and_says_nothing(monkeypatch, caplog, feature):
    processor(monkeypatch, feature)
    with caplog.at_level(logging.INFO, "stages"):
        check_bf16("cpu", True)
    assert caplog.text == ""


def test_check_bf16_of_a_processor_without_it_is_an_error_that_names_a_way_out(monkeypatch):
    processor(monkeypatch, "avx2")
    with pytest.raises(StageError, match=r"trainer.bf16=true: this processor \(Z80\) has no bf16 .* hardware: cpu "):
        check_bf16("cpu", True)


def test_check_bf16_of_an_fp32_run_recommends_it_where_the_processor_has_it(monkeypatch, caplog):
    processor(monkeypatch, "avx512_bf16")
    with caplog.at_level(logging.INFO, "stages"):
        check_bf16("cpu", False)
    assert "hardware=cpu_bf16" in caplog.text


@pytest.mark.parametrize(("device", "bf16"), [("cpu", False), ("cuda", True), ("cuda", False), ("mps", True)])
def test_check_bf16_elsewhere_says_nothing(monkeypatch, caplog, device, bf16):
    processor(monkeypatch, "avx2")
    with caplog.at_level(logging.INFO, "stages"):
        check_bf16(device, bf16)
    assert caplog.text == ""


@pytest.mark.parametrize("before", ["none", "tf32"])
def test_full_precision_switches_tf32_off_and_leaves_it_as_it_was(monkeypatch, before):
    monkeypatch.setattr(torch.backends, "fp32_precision", before)
    with full_precision(make_toy_model("gpt2")):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert torch.backends.fp32_precision == before
