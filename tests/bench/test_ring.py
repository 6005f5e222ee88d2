"""The ring: how contenders are judged, how their knobs are tuned, and that a failure affects only its own contender."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import record
import report
import ring
import ring_contenders
import torch
from apart import Apart, Failure
from contest import Result
from ring_contenders import BOTH_WAYS, ONE_WAY
from ring_inputs import Inputs, agreement, exact_scores, mixed

from finelip_fast.kernels import clim_scores

TOYS = """
import os, time
import numpy as np

class Toy:
    answers, knob, efforts = "both ways", "", [0]
    def about(self):
        return {"answers": self.answers, "knob": self.knob, "efforts": self.efforts, "package": "toy", "version": "1"}
    def build(self, items, folder, alpha):
        (folder / "items.npy").write_bytes(items.read_bytes())
    def open(self, folder, alpha):
        self.items = np.load(folder / "items.npy").astype(np.float32)
    def search(self, query, k, effort):  # by the cosine of the global rows, which is alpha = 1
        scores = self.items[: effort or len(self.items), 0] @ query[0]
        return np.argsort(-scores)[:k].tolist()

class OneWay(Toy):
    answers = "one way"

class Knob(Toy):
    knob, efforts = "looked at", [10, 40, 60, 80]

class Useless(Toy):
    knob, efforts = "looked at", [5, 10, 11, 12]

class Broken(Toy):
    def build(self, items, folder, alpha):
        raise ValueError("no such\\nluck")

class Slow(Toy):
    def search(self, query, k, effort):
        time.sleep(60)

class Tiring(Toy):
    count = 0
    def search(self, query, k, effort):
        self.count += 1
        if self.count > 35:
            raise RuntimeError("tired")
        return super().search(query, k, effort)

class Dying(Toy):
    def open(self, folder, alpha):
        os._exit(3)

def missing():
    import a_peer_that_nobody_has

KINDS = Toy, OneWay, Knob, Useless, Broken, Slow, Tiring, Dying
CONTENDERS = {kind.__name__: kind for kind in KINDS} | {"Missing": missing}
"""


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Return a function that starts a toy contender by name with a time limit in seconds."""
    (tmp_path / "toys.py").write_text(TOYS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return partial(Apart, "toys")


@pytest.fixture
def inputs(tmp_path):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((100, 2, 8))
    items = (rows / np.linalg.norm(rows, axis=2, keepdims=True)).astype(np.float16)
    np.save(tmp_path / "input.npy", items)
    queries = items[:60].astype(np.float32)
    exact = exact_scores(torch.from_numpy(queries), torch.from_numpy(items), 1.0)
    raced, practice = (
        {question: part[rows] for question, part in exact.items()} for rows in (slice(40), slice(40, 60))
    )
    return Inputs(tmp_path / "input.npy", queries[:40], queries[40:], raced, practice, 1.0)


def race(toys, names, inputs, tmp_path):
    """Race the contenders; only ``Slow`` has too little time, so that the others finish even on a busy machine."""

    def start(name, limit):
        return toys(name, seconds=0.5 if name == "Slow" and limit == 90 else limit)

    (tmp_path / "race").mkdir()
    return ring.race(start, names, inputs, tmp_path / "race", ring.Limits(build=60, search=90))


@pytest.mark.parametrize(
    ("hits", "share"),
    [
        ([0, 1], 1.0),
        ([2, 0], 1.0),  # equal to the other second
        ([0, 0], 0.5),
        ([3, 0], 0.5),
        ([0], 0.5),
        ([], 0.0),
        ([3, 4, 0, 1], 0.0),  # only as many count as were requested
    ],
)
def test_agreement_counts_what_reaches_the_exact_best(hits, share):
    exact = torch.tensor([[0.9, 0.8, 0.8, 0.1, 0.0]], dtype=torch.float64)
    assert agreement([hits], exact, 2) == share


def test_agreement_is_the_mean_of_the_queries_so_far():
    exact = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.1, 0.8], [0.5, 0.4, 0.3]])
    assert agreement([[0, 1], [0, 1]], exact, 2) == 0.75


def test_exact_scores_are_the_methods_and_maxsim():
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(205, 3, 16, generator=generator), dim=-1)
    queries, items = rows[:5], rows[5:]
    exact = exact_scores(queries, items, 0.3)
    torch.testing.assert_close(exact[BOTH_WAYS].float(), clim_scores(queries, items, alpha=0.3))
    expected = torch.einsum("qad,nbd->qnab", queries, items).amax(dim=3).sum(dim=2)
    torch.testing.assert_close(exact[ONE_WAY].float(), expected)
    again = [ring_contenders.both_ways(query.numpy(), items.numpy(), 0.3) for query in queries]
    np.testing.assert_allclose(np.stack(again), exact[BOTH_WAYS].numpy(), atol=1e-6)


def test_more_items_are_mixed_of_the_drawn():
    rows = np.random.default_rng(0).standard_normal((4, 2, 8))
    drawn = (rows / np.linalg.norm(rows, axis=2, keepdims=True)).astype(np.float16)
    items = mixed(drawn, 11)
    assert items.shape == (11, 2, 8)
    assert items.dtype == np.float16
    assert np.array_equal(items[:4], drawn)
    np.testing.assert_allclose(np.linalg.norm(items.astype(np.float32), axis=2), 1, atol=1e-3)
    assert len(np.unique(items.reshape(11, -1), axis=0)) == 11


def test_each_is_judged_by_its_question_and_labelled(toys, inputs, tmp_path):
    results = race(toys, ["Toy", "OneWay"], inputs, tmp_path)
    assert results["Toy"].info["agreement"] == 1.0
    assert "agreement_one_way" not in results["Toy"].info
    maxsim = inputs.exact[ONE_WAY]
    expected = agreement(inputs.exact[BOTH_WAYS].topk(10).indices.tolist(), maxsim, 10)
    assert results["OneWay"].info["agreement_one_way"] == pytest.approx(expected)
    assert results["OneWay"].info["answers"] == ONE_WAY
    for result in results.values():
        assert len(result.seconds) == result.info["queries"] == 40
        assert result.info["p50"] <= result.info["p95"]
        assert result.info["disk_mib"] > 0
        assert result.info["build_seconds"] > 0


def test_a_knob_is_turned_until_it_is_enough_or_does_no_good(toys, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(ring, "ENOUGH", 0.4)
    results = race(toys, ["Knob", "Useless"], inputs, tmp_path)
    assert results["Knob"].info["setting"] == "looked at 60"
    monkeypatch.setattr(ring, "NEARLY", 0.05)
    assert results["Useless"].info["setting"] == "looked at 12"
    assert "setting" not in race(toys, ["Toy"], inputs, tmp_path / "race")["Toy"].info


def test_what_fails_is_left_out_with_its_reason_and_stops_nobody(toys, inputs, tmp_path):
    names = ["Missing", "Broken", "Dying", "Slow", "Tiring", "Toy"]
    results = race(toys, names, inputs, tmp_path)
    reasons = {name: result.refusal for name, result in results.items()}
    assert reasons.pop("Slow").startswith("took more than 0.5 s")
    assert reasons == {
        "Missing": "a_peer_that_nobody_has is not installed",
        "Broken": "ValueError: no such luck",
        "Dying": "its process ended with exit status 3",
        "Tiring": "",
        "Toy": "",
    }
    # Contenders with enough searches before they stopped are included.
    assert ring.FEWEST <= results["Tiring"].info["queries"] < 40
    assert results["Toy"].info["queries"] == 40


def test_too_few_timed_searches_are_no_result():
    entry = ring.Entry(process=None, result=Result(seconds=[0.1]), hits=[[1]], stopped="took more than 3 s")
    entry.conclude({})
    assert entry.result.refusal == "took more than 3 s, with 1 searches timed"


def test_a_process_that_was_ended_is_gone(toys):
    process = toys("Toy", seconds=30.0)
    assert process.ask("about").value["package"] == "toy"
    assert process.memory() > 1
    process.end()
    with pytest.raises(Failure, match="its process ended"):
        process.ask("about")
    assert process.memory() == 0


def test_threads_and_processors_are_the_same_for_all(toys, tmp_path):
    lines = (
        "import os",
        "class Toy:",
        "    def about(self):",
        "        return os.environ['OMP_NUM_THREADS'], len(os.sched_getaffinity(0))",
        "CONTENDERS = {'Toy': Toy}",
    )
    (tmp_path / "toys.py").write_text("\n".join(lines))
    process = toys("Toy", seconds=30.0, threads=1)
    assert process.ask("about").value == ("1", 1)
    process.end()


def test_a_record_gathers_groups_of_one_commit(tmp_path, monkeypatch):
    monkeypatch.setenv(record.COMMIT, "0123456789")
    path = tmp_path / "machine" / "ring.json"
    fast = Result(info={"p50": 0.001, "package": "toy", "version": "1.2", "answers": ONE_WAY, "disk_mib": 3.0})
    results = {"fast": fast, "broken": Result(refusal="toy is not installed")}
    record.add(path, "20 items", results, baseline="fast", threads=2)
    record.add(path, "200 items", results, baseline="fast", threads=2)
    record.add(path, "20 items", {"fast": fast}, baseline="fast", threads=2)
    run = json.loads(path.read_text())
    assert {group: [row["contender"] for row in rows] for group, rows in report.groups(run).items()} == {
        "200 items": ["fast"],
        "20 items": ["fast"],
    }
    assert run["machine_info"]["toy"] == "1.2"
    assert report.left_out(run, "200 items") == "\nLeft out: broken (toy is not installed).\n"
    assert report.left_out(run, "20 items") == ""
    assert "2 threads; PyTorch" in report.source(run)
    page = report.page(path.parent)
    assert "||finds the best|median|speed relative to fast|on disk|" in page
    assert "Left out: broken" in page
    monkeypatch.setenv(record.COMMIT, "another")
    with pytest.raises(ValueError, match=r"is a record of commit 0123456789: remove it, or name another file"):
        record.add(path, "20 items", results, baseline="fast", threads=2)


def test_contenders_need_nothing_installed_to_be_listed():
    for name, make in ring_contenders.CONTENDERS.items():
        contender = make()
        assert contender.package, name
        assert contender.answers in (BOTH_WAYS, ONE_WAY)
        assert bool(contender.knob) == (len(contender.efforts) > 1), name
    assert ring.BASELINE in ring_contenders.CONTENDERS


@pytest.mark.parametrize(
    "name", [name for name in ring_contenders.CONTENDERS if name.startswith(("finelip_fast", "plain"))]
)
def test_those_without_peers_find_the_best(name, tmp_path):
    """They run in this process; adapters of peers cannot be tested without the peers."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((300, 3, 32)).astype(np.float32)
    items = (rows / np.linalg.norm(rows, axis=2, keepdims=True)).astype(np.float16)
    np.save(tmp_path / "items.npy", items)
    folder = tmp_path / "index"
    folder.mkdir()
    contender = ring_contenders.CONTENDERS[name]()
    contender.build(tmp_path / "items.npy", folder, 0.25)
    contender.open(folder, 0.25)
    query = items[7].astype(np.float32)
    exact = exact_scores(torch.from_numpy(query)[None], torch.from_numpy(items), 0.25)[BOTH_WAYS]
    hits = contender.search(query, 10, contender.efforts[-1])
    assert hits[0] == 7
    assert agreement([hits], exact, 10) == (1.0 if "bfloat16" not in name else pytest.approx(1.0, abs=0.2))
