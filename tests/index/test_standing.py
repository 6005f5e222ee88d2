"""How far hits stand out: whether the described picture is there, or only the closest one."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from finelip_fast.datasets import Scenes
from finelip_fast.engines import open_engine
from finelip_fast.index import Index, IndexSpec
from finelip_fast.index.standing import FEWEST, SAMPLED, sampled_rows, stands_out

SPEC = IndexSpec(checkpoint="abc", tokens=3, width=16)


def embeddings(rows: int, seed: int = 0) -> Tensor:
    values = torch.randn(rows, SPEC.tokens, SPEC.width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def fill(rows: Tensor, order: list[int]) -> Index:
    index = Index(SPEC)
    index.add([str(number) for number in order], rows[order], [{"odd": bool(number % 2)} for number in order])
    return index


def test_drawn_scenes_stand_out_when_they_are_there() -> None:
    engine = open_engine("torch", None)
    scenes = list(Scenes("test", 128, image_size=engine.config.image_size))
    images = engine.embed_images([scene.draw() for scene in scenes[:96]])
    spec = IndexSpec(engine.fingerprint, engine.config.tokens, engine.config.embed_dim, engine.alpha)
    index = Index(spec)
    index.add([scene.id for scene in scenes[:96]], images, [{}] * 96)
    captions = [scene.caption for scene in scenes]
    for mode, alpha in itertools.product(("exact", "exact-int8", "two-stage"), (engine.alpha, 0.5, 1.0)):
        present = index.search(engine.embed_texts(captions[:32]), 1, mode=mode, alpha=alpha).stands_out
        absent = index.search(engine.embed_texts(captions[96:]), 1, mode=mode, alpha=alpha).stands_out
        assert (present > 0.5).float().mean() > 0.85
        assert (absent < 0.5).float().mean() > 0.85


def test_the_order_of_items_changes_nothing() -> None:
    rows, queries = embeddings(200), embeddings(3, seed=1)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2)).tolist()
    results = [fill(rows, numbers).search(queries, 5, mode="exact") for numbers in (list(range(200)), order)]
    torch.testing.assert_close(results[0].stands_out, results[1].stands_out, atol=1e-4, rtol=1e-3)
    assert [[item.id for item in items] for items in results[0].items] == [
        [item.id for item in items] for items in results[1].items
    ]


def test_of_few_items_nothing_is_said() -> None:
    rows = embeddings(2 * FEWEST - 2)
    index = fill(rows, list(range(len(rows))))
    assert fill(rows, list(range(FEWEST - 1))).search(rows[:1], 3).stands_out is None
    assert index.search(rows[:1], 3).stands_out is not None
    assert index.search(rows[:1], 3, where="odd = true").stands_out is None  # a filter leaves too few
    assert index.search(rows[:0], 3).stands_out is None


def test_a_filter_is_compared_with_what_it_lets_through() -> None:
    rows, query = embeddings(400), embeddings(1, seed=1)
    filtered = fill(rows, list(range(400))).search(query, 3, where="odd = true")
    alone = fill(rows, list(range(1, 400, 2))).search(query, 3)
    torch.testing.assert_close(filtered.stands_out, alone.stands_out, atol=1e-4, rtol=1e-3)


def test_the_global_cosine_alone_is_compared_with_its_like() -> None:
    rows = embeddings(200)
    result = fill(rows, list(range(200))).search(rows[:1], 1, alpha=1.0)
    scores = rows[:1, 0] @ rows[:, 0].T
    expected = stands_out(scores.max(dim=1, keepdim=True).values, scores, 200, alpha=1.0)
    torch.testing.assert_close(result.stands_out, expected, atol=1e-2, rtol=0)


def test_samples_are_spread_and_equal_scores_say_nothing() -> None:
    among = torch.arange(0, 10 * SAMPLED, 5)
    assert sampled_rows(0, among).tolist() == among[::2][:SAMPLED].tolist()
    assert sampled_rows(7, None).tolist() == list(range(7))
    assert stands_out(torch.ones(1, 2), torch.ones(1, 60), 60, alpha=0.5).isnan().all()
