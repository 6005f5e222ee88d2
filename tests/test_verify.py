"""The check of the kernels: right results pass, and every possible fault of a result is detected."""

from __future__ import annotations

import json

import pytest
import torch

import finelip_fast.verify as verify_module
from finelip_fast.cli import main
from finelip_fast.errors import InputError
from finelip_fast.kernels import clim_scores, floor
from finelip_fast.verify import KERNELS, verify

FEW = ["clim-float32", "topk", "atrm-float16", "atrm-gradient-float32"]


@pytest.fixture(autouse=True)
def without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def broken(monkeypatch, spoil):
    monkeypatch.setattr(
        verify_module, "clim_scores", lambda *rows, **options: spoil(clim_scores(*rows, **options), *rows)
    )


def test_what_runs_on_this_cpu_is_right_and_said_to_be_no_gpu():
    report = verify(FEW)
    assert [verdict.kernel for verdict in report.verdicts] == FEW
    assert report.wrong == report.speeds == ()
    assert all(0 <= verdict.error <= verdict.allowed for verdict in report.verdicts)
    assert report.device == "CPU"
    assert "need a CUDA device" in report.implementation


@pytest.mark.slow
def test_every_kernel_is_right():
    assert {verdict.kernel for verdict in verify().verdicts if not verdict.wrong} == set(KERNELS)


def half_of_the_item(scores, queries, items):
    return clim_scores(queries, items[:, : items.shape[1] // 2 + 1])


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (half_of_the_item, "off by"),
        (lambda scores, *rows: scores.fill_(torch.nan), "off by nan"),
        (lambda scores, *rows: scores + 1e-6 * torch.rand(()), "not the same bits twice"),
        (lambda scores, *rows: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
    ids=["half of the tokens", "NaN", "other bits", "a failure"],
)
def test_a_wrong_result_is_seen_and_the_next_kernel_still_checked(monkeypatch, spoil, wrong):
    broken(monkeypatch, spoil)
    report = verify(["clim-float16", "atrm-float32"])
    assert [verdict.kernel for verdict in report.wrong] == ["clim-float16"]
    assert wrong in report.wrong[0].wrong
    assert wrong in str(report)


def test_the_command_prints_its_table_and_ends_with_an_error(monkeypatch, capsys):
    assert main(["verify", "--kernels", "clim-float32", "atrm-float32", "--json"]) == 0
    assert [verdict["wrong"] for verdict in json.loads(capsys.readouterr().out)["verdicts"]] == ["", ""]
    broken(monkeypatch, half_of_the_item)
    assert main(["verify", "--kernels", "clim-float32", "atrm-float32"]) == 2
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()[1:]] == ["clim-float32", "atrm-float32"]
    assert "expected the results of float64, got others from clim-float32: FINELIP_KERNELS=reference" in printed.err


def test_speeds_are_shares_of_what_the_machine_itself_was_seen_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 40, 1 << 40))
    monkeypatch.setattr(verify_module, "_TIMED_ITEMS", 100)
    monkeypatch.setattr(verify_module, "_TIMED_PICTURES", 2)
    monkeypatch.setattr(floor, "peaks", lambda: {"bytes/s": 2e9, "flops/s": {"int8": 4e9}})
    monkeypatch.setattr(floor, "timed", lambda run: 0.5)
    speeds = {speed.kernel: speed for speed in verify_module._speeds(torch.device("cpu"))}
    assert list(speeds)[-1] == "atrm 2 x 196 float16"
    int8 = speeds["clim 8 x 100 int8"]
    work = floor.clim(8, 100, 40, 512, torch.int8)
    assert (int8.milliseconds, int8.copy_share, int8.product_share) == (500, work.bytes / 1e9, work.flops / 2e9)
    assert speeds["clim 8 x 100 float16"].product_share == 0  # relative to an unknown rate
    assert "500.000 ms" in str(int8)


def test_an_unknown_kernel_is_refused_by_name():
    with pytest.raises(InputError, match=r"expected kernels to be one of clim-float32, .*, got 'clim'"):
        verify(["clim"])
