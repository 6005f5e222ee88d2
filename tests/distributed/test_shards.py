"""Shards: together they find what one index of all items finds, and report what was not searched."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finelip_fast.distributed import Shards, ShardSearchResults
from finelip_fast.distributed import shards as shards_module
from finelip_fast.errors import InputError, StoreError
from finelip_fast.index import Index, IndexSpec

SPEC = IndexSpec(checkpoint="abc", tokens=5, width=64, alpha=0.6)
SIZES = (300, 0, 410)
HANG_SECONDS = 300.0  # after which an event that has not happened never will


def random(rows: int, seed: int) -> Tensor:
    values = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


QUERIES = random(3, seed=99)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Index]:
    """Folders of shards, and one index of the same items in the same order; some items are equal."""
    folder = tmp_path_factory.mktemp("shards")
    joint_index, folders = Index(SPEC), []
    for shard, size in enumerate(SIZES):
        items = random(size, seed=shard)
        items[5:20:5] = QUERIES[0]  # ties within a shard, and between shards
        ids = [f"{shard}-{number}" for number in range(size)]
        metadata = [{"number": number} for number in range(size)]
        folders.append(folder / str(shard))
        with closing(Index(SPEC, folders[-1])) as index:
            index.add(ids, items, metadata)
        joint_index.add(ids, items, metadata)
    return folders, joint_index


@pytest.fixture(scope="module", autouse=True)
def patience() -> Iterator[None]:
    """Shards may take long to start on a busy machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "_START_SECONDS", HANG_SECONDS)
        yield


@pytest.fixture(scope="module")
def opened(ray: Any, together: tuple[list[Path], Index], patience: None) -> Iterator[Shards]:
    with Shards(together[0], partial="mark", cpus=0, timeout=HANG_SECONDS) as shards:
        yield shards


@pytest.fixture
def shards(opened: Shards) -> Iterator[Shards]:
    """Shards that are complete before the test and restored afterwards."""
    assert until_whole(opened).covered == 1
    before = opened.partial, opened.timeout
    yield opened
    opened.partial, opened.timeout = before


def until_whole(shards: Shards) -> ShardSearchResults:
    partial, shards.partial = shards.partial, "mark"
    results = search_until(shards, lambda missing: not missing)
    shards.partial = partial
    return results


def search_until(shards: Shards, condition: Callable[[dict[str, str]], bool]) -> ShardSearchResults:
    """Search until the missing shards meet a condition; before each search, wait for the answers of those that start."""
    end = time.monotonic() + HANG_SECONDS
    while not condition((results := shards.search(QUERIES, 10)).missing):
        assert time.monotonic() < end, results.missing
        for shard in shards._shards:
            if shard.waking is not None:
                shards._ray.wait([shard.waking], timeout=HANG_SECONDS)
        time.sleep(0.1)  # a server that is gone answers at once
    return results


def ids(results: Any) -> list[list[str]]:
    return [[item.id for item in items] for items in results.items]


def pid(ray: Any, shards: Shards, number: int) -> int:
    return int(ray.get(shards._shards[number].server.__ray_call__.remote(lambda self: os.getpid())))


@pytest.mark.parametrize("mode", ["auto", "exact", "exact-int8"])
@pytest.mark.parametrize("where", [None, "number < 12", "number = 400", "number < 0"])
@pytest.mark.parametrize(("k", "alpha"), [(1, None), (10, 0.0), (1000, 0.9)])
def test_they_find_what_one_index_finds(
    shards: Shards, together: tuple[list[Path], Index], mode: str, where: str | None, k: int, alpha: float | None
) -> None:
    options: dict[str, Any] = {"mode": mode, "where": where, "alpha": alpha}
    expected = together[1].search(QUERIES, k, **options)
    results = shards.search(QUERIES, k, **options)
    assert ids(results) == ids(expected)
    assert torch.equal(results.scores, expected.scores)
    for name in ("global_scores", "fine_scores"):  # computed again, from as many hits as a shard has
        torch.testing.assert_close(getattr(results, name), getattr(expected, name), rtol=0, atol=1e-6)
    assert results.items == [
        [(str(together[0][int(item.id[0])]), item.id, item.metadata) for item in items] for items in expected.items
    ]
    assert results.covered == 1
    assert results.missing == {}
    assert results.modes.keys() == set(map(str, together[0]))


def test_ties_come_in_the_order_of_the_shards(shards: Shards) -> None:
    results = shards.search(QUERIES[:1], 6, mode="exact")
    assert len(set(results.scores[0].tolist())) == 1
    assert ids(results) == [[f"{shard}-{number}" for shard in (0, 2) for number in (5, 10, 15)]]


def test_in_two_stages_they_find_no_less(shards: Shards, together: tuple[list[Path], Index]) -> None:
    results = shards.search(QUERIES, 10, mode="two-stage")
    assert set(results.modes.values()) == {"two-stage"}
    assert (results.scores >= together[1].search(QUERIES, 10, mode="two-stage").scores).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_queries_of_any_dtype(shards: Shards, together: tuple[list[Path], Index], dtype: torch.dtype) -> None:
    queries = QUERIES.to(dtype)
    assert torch.equal(shards.search(queries, 5).scores, together[1].search(queries, 5).scores)


def test_no_queries(shards: Shards) -> None:
    results = shards.search(QUERIES[:0], 5)
    assert results.scores.shape[0] == 0
    assert results.items == []


def test_they_know_how_many_items_there_are(shards: Shards) -> None:
    assert len(shards) == sum(SIZES)
    assert shards.spec == SPEC


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "expected k of at least 1, got 0"),
        ({"k": "3"}, "expected k to be an integer"),
        ({"k": 1, "mode": "fast"}, "expected mode to be one of"),
        ({"k": 1, "where": "number <"}, "filter|expected"),
    ],
)
def test_wrong_arguments_are_refused_as_by_an_index(shards: Shards, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        shards.search(QUERIES, **options)
    assert shards.search(QUERIES, 1).missing == {}


def test_a_killed_shard_is_missed_and_comes_back(ray: Any, shards: Shards, together: tuple[list[Path], Index]) -> None:
    full_results = shards.search(QUERIES, 10)
    folder = together[0][0]
    dead, away = str(folder), folder.with_name("away")
    victim = pid(ray, shards, 0)
    folder.rename(away)  # so that it does not come back between the searches
    try:
        os.kill(victim, signal.SIGKILL)
        shards.partial = "refuse"
        with pytest.raises(StoreError, match=rf"1 of 3 shards did not answer \({dead}: .*partial='mark'"):
            shards.search(QUERIES, 10)
        shards.partial = "mark"
        results = shards.search(QUERIES, 10)
        assert list(results.missing) == [dead]
        assert results.covered == pytest.approx(1 - SIZES[0] / sum(SIZES))
        expected = shards.search(QUERIES, 1000).items
        assert {item.shard for items in expected for item in items} == {str(together[0][2])}
    finally:
        away.rename(folder)
    rest = together[1].search(QUERIES, 1000)
    assert ids(results) == [[item for item in row if item[0] != "0"][:10] for row in ids(rest)]
    again = until_whole(shards)
    assert ids(again) == ids(full_results)
    assert torch.equal(again.scores, full_results.scores)


def test_a_shard_that_ray_gave_up_is_made_anew(ray: Any, shards: Shards) -> None:
    full_results = shards.search(QUERIES, 10)
    ray.kill(shards._shards[2].server)
    while not (results := shards.search(QUERIES, 10)).missing:
        time.sleep(0.05)
    assert len(results.missing) == 1
    assert ids(until_whole(shards)) == ids(full_results)


def test_a_shard_that_hangs_is_not_waited_for_again(ray: Any, shards: Shards, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    ray_wait = ray.wait

    def wait(refs: list[Any], *, num_returns: int, timeout: float) -> Any:
        """Wait as long as the healthy shards need, and for the one that hangs as long as the caller would."""
        counts.append(len(refs))
        assert timeout == 1.0
        if len(counts) > 1:
            return ray_wait(refs, num_returns=num_returns)
        ray_wait(refs, num_returns=num_returns - 1)
        return ray_wait(refs, num_returns=num_returns, timeout=timeout)

    process = pid(ray, shards, 2)
    os.kill(process, signal.SIGSTOP)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(shards, "timeout", 1.0)
            patch.setattr(ray, "wait", wait)
            (reason,) = shards.search(QUERIES, 10).missing.values()
            assert reason == "no answer within 1 seconds"
            (reason,) = shards.search(QUERIES, 10).missing.values()
            assert reason == "it is starting or busy, or no core is free"
        assert counts == [3, 2]
    finally:
        os.kill(process, signal.SIGCONT)
    until_whole(shards)


def test_a_folder_that_is_gone_is_named_and_may_come_back(
    ray: Any, shards: Shards, together: tuple[list[Path], Index]
) -> None:
    folder = together[0][2]
    away = folder.with_name("away")
    folder.rename(away)
    os.kill(pid(ray, shards, 2), signal.SIGKILL)
    search_until(shards, lambda missing: "there is no index" in missing.get(str(folder), ""))
    other_index = Index(replace(SPEC, checkpoint="other"), folder)
    other_index.close()
    search_until(shards, lambda missing: "another index" in missing.get(str(folder), ""))
    shutil.rmtree(folder)
    away.rename(folder)
    os.kill(pid(ray, shards, 2), signal.SIGKILL)  # its open files are gone
    until_whole(shards)


@pytest.mark.usefixtures("ray")
def test_shards_of_another_checkpoint_are_refused(together: tuple[list[Path], Index], tmp_path: Path) -> None:
    Index(replace(SPEC, checkpoint="other", dtype="int8"), tmp_path / "other").close()
    with pytest.raises(StoreError, match=r"0 and .*other differ in checkpoint: 'abc' and 'other'"):
        Shards([together[0][0], tmp_path / "other"], cpus=0)


@pytest.mark.usefixtures("ray")
def test_a_folder_without_an_index_is_refused(together: tuple[list[Path], Index], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be opened: there is no index at"):
        Shards([together[0][0], tmp_path], cpus=0)


def test_a_link_to_a_shard_is_the_same_shard(together: tuple[list[Path], Index], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(together[0][0])
    with pytest.raises(InputError, match="expected unique folders of indexes, got"):
        Shards([together[0][0], tmp_path / "link"])


@pytest.mark.parametrize(
    ("folders", "options", "message"),
    [
        ([], {}, "expected unique folders of indexes, got []"),
        (["a", "a"], {}, "expected unique folders of indexes, got ['a', 'a']"),
        (["a", "a/"], {}, "expected unique folders of indexes, got ['a', 'a']"),
        (["a", "b/../a"], {}, "expected unique folders of indexes, got ['a', 'b/../a']"),
        ([5], {}, "expected a folder to be a path, got 5"),
        (["a"], {"timeout": "x"}, "expected timeout in seconds above 0, got 'x'"),
        (["a"], {"timeout": -1}, "expected timeout in seconds above 0, got -1"),
        (["a"], {"cpus": "a"}, "expected cpus to be 0 or a number of at least 0.0001, got 'a'"),
        (["a"], {"cpus": float("nan")}, "expected cpus to be 0 or a number of at least 0.0001, got nan"),
        (["a"], {"gpus": -1}, "expected gpus to be 0 or a number of at least 0.0001, got -1"),
        (["a"], {"gpus": 1.5}, "expected gpus above 1 to be a whole number, got 1.5"),
        (["a"], {"partial": "some"}, "expected partial to be one of refuse, mark, got 'some'"),
        ("folder", {}, "expected folders to be a list"),
    ],
)
def test_wrong_settings_are_refused(folders: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Shards(folders, **options)
    assert message in str(caught.value)
