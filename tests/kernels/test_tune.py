"""Tuning: which settings are kept, excluded or skipped, and that no result is lost."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from finelip_fast.errors import InputError, KernelError
from finelip_fast.kernels import settings as _settings
from finelip_fast.kernels import tune
from finelip_fast.kernels.clim.formula import clim_reference
from finelip_fast.kernels.clim.launches import ClimSettings
from finelip_fast.kernels.tune import Case, Prepared


@dataclass(frozen=True)
class Cut:
    block: int


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setenv("FINELIP_CACHE", str(tmp_path))
    return tmp_path / "settings.json"


def case(name, *blocks, run=lambda cut: torch.ones(3), tolerance=1e-5):
    """Return a case whose right result is ones, checked at its first place in float64."""
    exact = ((slice(1), torch.ones(1, dtype=torch.float64)),)
    return Case((name,), Cut(1), tuple(map(Cut, blocks)), lambda: Prepared(lambda cut: (run(cut),), exact, tolerance))


def clock(milliseconds):
    """Return a timer with a given time for each block; the settings are the last argument of the timed function."""
    return lambda run: milliseconds[run.args[-1].block]


def test_the_fastest_is_kept_beside_what_was_there(table):
    _settings.save({"other": {"block": 9}})
    (tuned,) = tune.tune([case("one", 2, 4)], measure=clock({1: 6.0, 2: 2.0, 4: 3.0}), progress=False)
    assert (tuned.name, tuned.settings, tuned.speedup, tuned.failed) == ("one", Cut(2), 3.0, 0)
    assert json.loads(table.read_text()) == {"one": {"block": 2}, "other": {"block": 9}}


def test_defaults_that_are_fastest_are_kept_too(table):
    tune.tune([case("one", 2)], measure=clock({1: 1.0, 2: 2.0}), progress=False)
    assert json.loads(table.read_text()) == {"one": {"block": 1}}


def test_what_fails_or_gives_another_result_is_out(table):
    def run(cut):
        if cut.block == 2:
            raise RuntimeError("out of shared memory")
        return torch.full((3,), 1.0 if cut.block in (1, 8) else float("nan"))

    times = clock({1: 5.0, 2: 1.0, 4: 1.0, 8: 4.0})
    (tuned,) = tune.tune([case("one", 2, 4, 8, run=run)], measure=times, progress=False)
    assert (tuned.settings, tuned.failed) == (Cut(8), 2)


def test_a_kernel_that_ignores_half_of_the_tokens_is_out(table, monkeypatch):
    monkeypatch.setattr(tune, "_items_that_fit", lambda device, launch: 300)

    def scores(queries, items, *, alpha, settings, **_):
        n_tokens = items.shape[1] // 2 if settings.block_items == 64 else items.shape[1]
        return clim_reference(queries, items[:, :n_tokens], alpha)

    monkeypatch.setattr(tune.clim, "scores", scores)
    monkeypatch.setattr(tune, "capability_of", lambda device: 80)
    first, *_ = tune._clim_cases(torch.device("cpu"))
    (tuned,) = tune.tune([first], measure=lambda run: run.args[-1].block_items, progress=False)
    wrong = sum(candidate.block_items == 64 for candidate in first.candidates)
    assert (tuned.settings.block_items, tuned.failed) == (128, wrong)


@pytest.mark.parametrize("places", [[0], [2]], ids=["where float64 is known", "elsewhere"])
def test_a_small_error_anywhere_is_out(table, places):
    def run(cut):
        return torch.ones(3).index_fill(0, torch.tensor(places), 1.0 + (3e-5 if cut.block == 2 else 0))

    (tuned,) = tune.tune([case("one", 2, run=run)], measure=clock({1: 5.0, 2: 1.0}), progress=False)
    assert (tuned.settings, tuned.failed) == (Cut(1), 1)


def test_wrong_default_settings_are_told_and_not_saved(table):
    with pytest.raises(
        KernelError, match=r"one: expected results within .* default settings.*FINELIP_KERNELS=reference"
    ):
        tune.tune([case("one", 2, run=lambda cut: torch.zeros(3))], measure=clock({1: 5.0}), progress=False)
    assert not table.exists()


def test_a_gpu_that_stopped_working_saves_nothing_more(table):
    """After an illegal access, for example, every launch of the process fails."""
    broken = []

    def run(cut):
        if cut.block == 4:
            broken.append(cut)
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return torch.ones(3)

    times = clock({1: 5.0, 2: 1.0, 4: 0.5, 8: 0.1})
    cases = [case("first", 2), case("one", 2, 4, 8, run=run), case("later", 2)]
    with pytest.raises(KernelError, match=r"one: .*Cut\(block=4\) failed.*illegal memory.*new process"):
        tune.tune(cases, measure=times, progress=False)
    assert json.loads(table.read_text()) == {"first": {"block": 2}}


def test_what_was_tuned_before_is_skipped_unless_asked(table):
    times = clock({1: 5.0, 2: 1.0})
    assert len(tune.tune([case("one", 2)], measure=times, progress=False)) == 1
    assert tune.tune([case("one", 2)], measure=times, progress=False) == []
    assert len(tune.tune([case("one", 2)], measure=times, again=True, progress=False)) == 1


def test_a_stopped_run_keeps_what_it_found(table):
    def interrupted():
        raise KeyboardInterrupt

    cases = [case("one", 2), Case(("two",), Cut(1), (), interrupted)]
    with pytest.raises(KeyboardInterrupt):
        tune.tune(cases, measure=clock({1: 5.0, 2: 1.0}), progress=False)
    assert json.loads(table.read_text()) == {"one": {"block": 2}}


def test_no_case_starts_after_its_time(table):
    assert tune.tune([case("one", 2)], measure=clock({1: 5.0, 2: 1.0}), seconds=0, progress=False) == []
    assert not table.exists()


def test_another_table_is_written_and_looked_at(table, tmp_path):
    out = tmp_path / "shipped.json"
    for expected in (1, 0):
        results = tune.tune([case("one", 2)], measure=clock({1: 5.0, 2: 1.0}), settings=out, progress=False)
        assert len(results) == expected
    assert json.loads(out.read_text()) == {"one": {"block": 2}}
    assert not table.exists()


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_the_cases_of_a_gpu_have_candidates_that_launch_takes(monkeypatch, capability):
    monkeypatch.setattr(tune, "capability_of", lambda device: capability)
    cases = tune.cases_for()
    names = [name for case in cases for name in case.names]
    assert len(names) == len(set(names))
    assert names[0].startswith(f"clim sm_{capability} bfloat16 D=512 L=40 Q=1")
    for case in cases:
        assert 5 <= len(case.candidates) <= 30
        assert {type(candidate) for candidate in case.candidates} == {type(case.default)}
    assert {name.split()[0] for name in names} == {*tune.OPERATIONS, "clim_winners"}


def test_the_sweep_tries_all_of_a_row_at_once_and_tensor_descriptors(monkeypatch):
    def tried(capability, case):
        monkeypatch.setattr(tune, "capability_of", lambda device: capability)
        (tuning_case,) = (tuning_case for tuning_case in tune.cases_for(["clim"]) if case in tuning_case.names)
        return {tuning_case.default, *tuning_case.candidates}

    on_hopper = tried(90, "clim sm_90 float16 D=512 L=40 Q=1")
    assert {ClimSettings(64, 1, 512, 4, 2), ClimSettings(64, 1, 512, 8, 2), ClimSettings(256, 1, 64, 8, 3)} <= on_hopper
    assert {replace(cut, descriptor=not cut.descriptor) for cut in on_hopper} == on_hopper
    int8 = tried(90, "clim sm_90 int8 D=512 L=40 Q=1")
    assert {ClimSettings(64, 1, 512, 4, 4), ClimSettings(128, 1, 512, 8, 3)} <= int8
    assert ClimSettings(128, 3, 512, 8, 2) in tried(90, "clim sm_90 int8 D=512 L=40 Q=8")
    assert not any(cut.descriptor for cut in tried(80, "clim sm_80 float16 D=512 L=40 Q=1"))
    assert {cut.queries_per_program for cut in tried(80, "clim sm_80 float16 D=512 L=40 Q=8")} == {1, 3}


def test_operations_are_chosen_by_name(monkeypatch):
    monkeypatch.setattr(tune, "capability_of", lambda device: 80)
    assert {case.names[0].split()[0] for case in tune.cases_for(["atrm"])} == {"atrm"}
    with pytest.raises(InputError, match=r"expected operations of clim, .*, got scores"):
        tune.cases_for(["scores"])


@pytest.mark.triton
@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="for TRITON_INTERPRET=1; a GPU tunes at full size"
)
def test_every_case_runs(table, monkeypatch):
    """The sizes suit the interpreter: the defaults and one candidate of each case."""
    monkeypatch.setattr(tune, "SHAPES", ((32, 4, 6),))
    monkeypatch.setattr(tune, "_BATCH", 2)
    monkeypatch.setattr(tune, "_items_that_fit", lambda device, launch: 3)
    aggregation = tune._aggregation
    monkeypatch.setattr(tune, "_aggregation", lambda items, *sizes: aggregation(min(items, 3), *sizes))
    cpu = torch.device("cpu")
    makers = (tune._clim_cases, tune._clim_gradient_cases, tune._atrm_cases, tune._atrm_gradient_cases)
    cases = [Case(case.names, case.default, case.candidates[:1], case.prepare) for make in makers for case in make(cpu)]
    results = tune.tune(cases, measure=lambda run: float(run() is not None), progress=False)
    assert [(result.name, result.failed) for result in results] == [(case.names[0], 0) for case in cases]
