"""Evaluation: recall calculated by hand, contexts validated first, and a result that can be written as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import finelip_fast
from finelip_fast.config import FineLIPConfig
from finelip_fast.datasets import Example, Scenes, open_dataset
from finelip_fast.datasets.survey import survey
from finelip_fast.engines import Engine, open_engine
from finelip_fast.errors import ImageError, InputError, WriteError
from finelip_fast.evaluation import Sweep, evaluate, read_evaluation
from finelip_fast.metrics import pair_ranks, recall

CONFIG = FineLIPConfig.preset("scenes", context_length=64)
KS = ("recall@1", "recall@5", "recall@10")
METRICS = [f"{direction}_recall@{k}" for direction in ("i2t", "t2i") for k in (1, 5, 10)]


class Table(Engine):
    """An engine whose pictures and captions are row numbers of two tables; it records the requested contexts."""

    name, config, alpha = "table", CONFIG, 0.8
    source, fingerprint, precision, preprocess, device = "", "a table", "fp32", None, torch.device("cpu")

    def __init__(self, images: Tensor, texts: Tensor) -> None:
        self.images, self.texts, self.context_lengths, self.batches = images, texts, [], []

    def encode_image(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError

    encode_text = encode_image

    def embed_images(self, images: Sequence[Any], *, batch_size: int = 64) -> Tensor:
        self.batches.append(len(images))
        return self.images[list(images)]

    def embed_texts(self, texts: Sequence[str], *, context_length: int | None = None, **_: Any) -> Tensor:
        self.context_lengths.append(context_length)
        return self.texts[[int(text) for text in texts]]


def pairs(count: int) -> list[Example]:
    return [Example(n, str(n), str(n)) for n in range(count)]


def run(images: Tensor, texts: Tensor, **options: Any) -> dict[str, dict[str, float]]:
    """Return the metrics of one context by score."""
    report = evaluate(Table(images, texts), pairs(len(images)), progress=False, **options)
    return {row.score: row.metrics for row in report.rows}


def shares(metrics: dict[str, float]) -> dict[str, float]:
    """Return only the recall metrics."""
    return {name: value for name, value in metrics.items() if "recall" in name}


def test_recall_by_hand() -> None:
    # Captions 0 and 1 both describe picture 0; picture 1 resembles nothing.
    images, texts = torch.eye(3)[:, None], torch.eye(3)[[0, 0, 2], None]
    for metrics in run(images, texts).values():
        # Rows:    picture 0 ties with caption 1 (rank 2), picture 1 ties with all (3), picture 2 is right (1).
        # Columns: caption 0 is right (1), caption 1 is beaten and ties (3), caption 2 is right (1).
        assert metrics == pytest.approx(
            {
                "i2t_recall@1": 1 / 3,
                "i2t_recall@5": 1,
                "i2t_recall@10": 1,
                "i2t_mean_rank": 2,
                "i2t_median_rank": 2,
                "i2t_mrr": (1 / 2 + 1 / 3 + 1) / 3,
                "t2i_recall@1": 2 / 3,
                "t2i_recall@5": 1,
                "t2i_recall@10": 1,
                "t2i_mean_rank": 5 / 3,
                "t2i_median_rank": 1,
                "t2i_mrr": (1 + 1 / 3 + 1) / 3,
            }
        )


def test_each_score_counts_for_itself() -> None:
    """Six pairs with identical global embeddings, distinguished only by their other tokens."""
    shared_rows, own_rows = torch.eye(7)[:1].expand(6, 7), torch.eye(7)[1:]
    items = torch.stack([shared_rows, own_rows], dim=1)
    result = run(items, items)
    assert shares(result["global"]) == pytest.approx(
        dict(zip(METRICS, (0, 0, 1) * 2, strict=True))
    )  # all tie at rank 6
    assert result["fine"] == result["combined"]
    assert shares(result["fine"]) == pytest.approx(dict.fromkeys(METRICS, 1.0))
    assert run(items, items, alpha=1.0)["combined"] == result["global"]

    # Misleading global embeddings: each picture's equals the next caption's.
    misled = torch.stack([own_rows.roll(1, 0), own_rows], dim=1), torch.stack([own_rows, own_rows.roll(2, 0)], dim=1)
    assert run(*misled)["global"]["i2t_recall@1"] == 0


def test_ties_and_nan_count_against() -> None:
    scores = torch.tensor([[2.0, float("nan"), 1.0], [0.0, 1.0, 0.5], [0.0, 0.0, float("nan")]])
    assert pair_ranks(scores)[0].tolist() == [2, 1, 3]
    assert recall(scores, ks=(1, 2)) == pytest.approx(
        {"i2t_recall@1": 1 / 3, "i2t_recall@2": 2 / 3, "t2i_recall@1": 1 / 3, "t2i_recall@2": 2 / 3}
    )


def test_contexts_are_sorted_and_each_once() -> None:
    engine = Table(torch.eye(3)[:, None], torch.eye(3)[:, None])
    report = evaluate(engine, pairs(3), context_lengths=[64, 20, 64], batch_size=2, progress=False)
    assert engine.context_lengths == [20, 64]
    assert engine.batches == [2, 1]
    assert [(row.context_length, row.score) for row in report.rows] == [
        (context, score) for context in (20, 64) for score in ("global", "fine", "combined")
    ]
    evaluate(engine, pairs(3), progress=False)
    assert engine.context_lengths[2:] == [64]


@pytest.mark.parametrize(
    ("options", "count", "message"),
    [
        ({}, 0, "expected at least one pair to evaluate, got none"),
        ({"context_lengths": [20, 65]}, 3, r"expected context_lengths from 3 to the model's 64 tokens, got \[20, 65\]"),
        ({"context_lengths": [0]}, 3, r"expected context_lengths from 3 to the model's 64 tokens, got \[0\]"),
        ({"context_lengths": [-5, 20]}, 3, r"expected context_lengths from 3 .*got \[-5, 20\]"),
        ({"alpha": 1.5}, 3, r"expected alpha in \[0, 1\], got 1.5"),
        ({"alpha": "a"}, 3, r"expected alpha in \[0, 1\], got 'a'"),
        ({"batch_size": "a"}, 3, "expected batch_size to be an integer, got 'a'"),
        ({"context_lengths": 20}, 3, "expected context_lengths to be a list, got 20"),
    ],
    ids=["nothing", "long", "zero", "negative", "alpha", "alpha of text", "batch size", "one length"],
)
def test_arguments_are_checked_before_any_work(options: dict, count: int, message: str) -> None:
    engine = Table(torch.eye(3)[:, None], torch.eye(3)[:, None])
    with pytest.raises(InputError, match=message):
        evaluate(engine, pairs(count), progress=False, **options)
    assert engine.batches == []


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_picture_may_have_several_captions(batch_size: int) -> None:
    """A picture is embedded once, and found if any of its captions is."""
    images = torch.eye(3)[:, None]
    texts = images[[0, 1, 1, 2, 0]]  # captions of pictures 0, 1, 0, 2, 1: the third and the fifth are swapped
    owners = [0, 1, 0, 2, 1]
    engine = Table(images, texts)
    examples = [Example(owner, str(n), str(owner)) for n, owner in enumerate(owners)]
    report = evaluate(engine, examples, batch_size=batch_size, progress=False)
    assert (report.pictures, report.pairs, sum(engine.batches)) == (3, 5, 3)
    # Pictures 0 and 1 tie with the other's swapped caption (rank 2), picture 2 is right; captions 0, 1 and 3 are right.
    for row in report.rows:
        assert row.metrics["i2t_recall@1"] == pytest.approx(1 / 3)
        assert row.metrics["t2i_recall@1"] == pytest.approx(3 / 5)
        assert row.metrics["i2t_recall@5"] == row.metrics["t2i_recall@5"] == 1


def test_the_result_goes_into_json_and_prints_as_a_table() -> None:
    engine = Table(torch.eye(3)[:, None], torch.eye(3)[:, None])
    report = evaluate(engine, pairs(3), context_lengths=[20, 64], progress=False)
    values = json.loads(json.dumps(report.to_dict()))
    assert (values["pictures"], values["pairs"]) == (3, 3)
    assert values["alpha"] == 0.8
    assert values["image_seconds"] >= 0
    assert values["text_seconds"] >= 0
    row = values["rows"][0]
    assert (row["context_length"], row["score"], row["i2t_ranks"], row["t2i_ranks"]) == (20, "global", [1] * 3, [1] * 3)
    assert shares(row) == dict.fromkeys(METRICS, 1.0)
    assert row["intervals"]["i2t_recall@1"] == [1.0, 1.0]
    assert set(row["intervals"]) == {f"{way}_{name}" for way in ("i2t", "t2i") for name in (*KS, "mrr")}
    assert len(values["rows"]) == 6
    lines = str(report).splitlines()
    heads = [[way, "R@1", "[95", "%]", "R@5", "R@10", "MRR", "median"] for way in ("i2t", "t2i")]
    assert lines[0].split() == ["context", "score", *heads[0], *heads[1]]
    assert lines[1].split() == ["20", "global", *["1.000", "[1.000,", "1.000]", "1.000", "1.000", "1.000", "1"] * 2]
    assert max(map(len, lines)) <= 120
    assert len(lines) == 7


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    engine = Table(torch.eye(3)[:, None], torch.eye(3)[[0, 0, 1, 2, 2], None])
    examples = [Example(owner, str(n), f"folder/{owner}.jpg") for n, owner in enumerate((0, 0, 1, 2, 2))]
    report = evaluate(engine, examples, validation=pairs(3), data="three", validation_name="more", progress=False)
    report.save(tmp_path / "result.json")
    assert read_evaluation(tmp_path / "result.json") == report
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
    assert (report.data, report.picture_of, report.checkpoint) == ("three", [0, 0, 1, 2, 2], "bundled")
    assert (report.engine, report.precision, report.device) == ("table", "fp32", "cpu")
    assert report.version == finelip_fast.__version__
    with pytest.raises(WriteError, match="cannot write"):
        report.save(tmp_path / "missing" / "result.json")


def test_the_same_data_in_another_folder_has_the_same_fingerprint() -> None:
    def fingerprint(*named_captions: tuple[str, str]) -> str:
        return survey([Example(None, caption, name) for name, caption in named_captions]).fingerprint

    expected = fingerprint(("here/1.jpg", "one"), ("here/2.jpg", "two"))
    assert fingerprint(("there/1.jpg", "one"), ("there/2.jpg", "two")) == expected
    variants = [
        (("here/1.jpg", "one"), ("here/3.jpg", "two")),
        (("here/1.jpg", "one"), ("here/2.jpg", "too")),
        (("here/1.jpg", "one"), ("here/1.jpg", "two")),
        (("here/2.jpg", "two"), ("here/1.jpg", "one")),
        (("here/1.jpg", "one"),),
    ]
    assert len({expected, *(fingerprint(*variant) for variant in variants)}) == 6


def test_scenes_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing scenes takes longer than iterating over them."""
    scenes, drawn = open_dataset("scenes:val:3", image_size=32), []
    monkeypatch.setattr(type(scenes), "__getitem__", lambda self, index: drawn.append(index))
    known = survey(scenes)
    assert (known.picture_of, known.first, drawn) == ([0, 1, 2], [0, 1, 2], [])
    monkeypatch.undo()
    assert known.captions == [scenes[n].caption for n in range(3)]


# On a model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def engine(make_model, tmp_path_factory) -> Engine:
    folder = tmp_path_factory.mktemp("evaluation") / "checkpoint"
    finelip_fast.save(make_model(context_length=64, vision_layers=1, text_width=32), folder)
    return open_engine("torch", folder, "cpu")


def test_a_model_is_measured_as_it_scores(engine: Engine) -> None:
    scenes = open_dataset("scenes:test:8", image_size=32)
    report = evaluate(
        engine, scenes, context_lengths=(12, 64), batch_size=3, progress=False
    )  # truncates captions silently
    model = finelip_fast.load(engine.source)
    examples = [scenes[n] for n in range(8)]
    with torch.no_grad():
        images = model.encode_image(model.preprocess.batch([example.image for example in examples]))
    for row in report.rows:
        with pytest.warns(UserWarning, match=f"exceeded {row.context_length} tokens"):
            ids = finelip_fast.tokenize([example.caption for example in examples], row.context_length)
        with torch.no_grad():
            texts = model.encode_text(ids)
        alpha = {"global": 1.0, "fine": 0.0, "combined": 0.8}[row.score]
        expected = recall(model.score(images, texts, alpha=alpha))
        assert shares(row.metrics) == pytest.approx(expected, abs=1 / 8)  # rounding may change one rank


def test_a_picture_that_cannot_be_read_is_named(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"image": "lost.png", "caption": "a house"}\n')
    with pytest.raises(ImageError, match=r"lost\.png"):
        evaluate(engine, open_dataset(f"jsonl:{tmp_path / 'pairs.jsonl'}"), progress=False)


def test_alpha_is_chosen_on_other_pairs() -> None:
    """If global embeddings mislead and tokens are right, a smaller weight of the former is better."""
    own_rows = torch.eye(7)[1:]
    engine = Table(
        torch.stack([own_rows.roll(1, 0), own_rows, own_rows], dim=1),
        torch.stack([own_rows, own_rows, own_rows], dim=1),
    )
    validation_pairs = [Example(n, str(n), f"other-{n}") for n in reversed(range(6))]
    report = evaluate(engine, pairs(6), validation=validation_pairs, progress=False)
    tried = {trial["alpha"]: trial for trial in report.to_dict()["sweep"]["tried"]}
    assert list(tried) == pytest.approx([step / 20 for step in range(21)])
    assert tried[0.0] == {
        "alpha": 0.0,
        **{f"{way}_{name}": 1.0 for way in ("i2t", "t2i") for name in ("recall@1", "mrr")},
    }
    assert tried[1.0]["i2t_recall@1"] == tried[1.0]["t2i_recall@1"] == 0.0
    assert tried[report.alpha]["i2t_recall@1"] == 1.0
    combined = next(row for row in report.rows if row.score == "combined")
    assert combined.metrics["i2t_recall@1"] == 1.0
    assert f"alpha {report.alpha:g}: best of 21 on 6 validation pairs" in str(report)


def test_of_equal_recall_the_better_reciprocal_rank_decides() -> None:
    tried = [
        {"alpha": alpha, "i2t_recall@1": recall, "t2i_recall@1": 0.5, "i2t_mrr": mrr, "t2i_mrr": 0.5}
        for alpha, recall, mrr in ((0.0, 0.5, 0.6), (0.5, 0.5, 0.7), (0.6, 0.5, 0.7), (1.0, 0.4, 0.9))
    ]
    assert Sweep("", "", 4, 64, tried).best == 0.5


def test_equal_recall_is_equal_however_it_is_summed() -> None:
    """0.6 + 0.7 is a little less than 0.5 + 0.8 in floating point."""
    tried = [
        {"alpha": alpha, "i2t_recall@1": i2t, "t2i_recall@1": t2i, "i2t_mrr": mrr, "t2i_mrr": mrr}
        for alpha, i2t, t2i, mrr in ((0.0, 0.5, 0.8, 0.7), (0.5, 0.6, 0.7, 0.8))
    ]
    assert Sweep("", "", 10, 64, tried).best == 0.5


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("scenes:test:4", r"expected opened pairs, got the name 'scenes:test:4'; pass open_dataset\('scenes:test:4'\)"),
        (3, "expected a sequence of pairs, got 3"),
        (Scenes("test", 2), r"expected pairs as finelip_fast\.datasets\.Example, got Scene\("),
    ],
)
def test_pairs_are_an_opened_dataset(dataset: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(Table(torch.eye(3)[:, None], torch.eye(3)[:, None]), dataset, progress=False)


def test_what_encodes_is_an_engine() -> None:
    with pytest.raises(InputError, match=r"expected an engine, got 'retriever'; pass retriever\.engine"):
        evaluate("retriever", pairs(3), progress=False)


def test_alpha_is_not_chosen_on_the_measured_pairs() -> None:
    engine = Table(torch.eye(3)[:, None], torch.eye(3)[:, None])
    with pytest.raises(InputError, match="other than the measured ones"):
        evaluate(engine, pairs(3), validation=pairs(3), progress=False)
    with pytest.raises(InputError, match="got both"):
        evaluate(engine, pairs(3), validation=pairs(2), alpha=0.5, progress=False)
    assert engine.batches == []


def test_without_trained_aggregators_the_global_cosine_is_measured_alone() -> None:
    engine = Table(torch.eye(3)[:, None], torch.eye(3)[:, None])
    engine.config, engine.alpha = CONFIG.replace(trained_aggregators=False), 1.0
    report = evaluate(engine, pairs(3), progress=False)
    assert [row.score for row in report.rows] == ["global"]
    assert report.alpha == 1
    for options in ({"alpha": 0.8}, {"validation": pairs(2)}):
        with pytest.raises(InputError, match="trained aggregators"):
            evaluate(engine, pairs(3), progress=False, **options)
