"""The retriever: added items are found, in every direction, from every odd file, and after every reopening."""

from __future__ import annotations

import copy
import os
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

import finelip_fast
from finelip_fast import AddReport, Hit, Retriever
from finelip_fast.checkpoint import UntrainedAggregatorsWarning, convert
from finelip_fast.engines import why_not
from finelip_fast.errors import EngineError, ImageError, InputError, StoreError
from finelip_fast.hits import Hits
from finelip_fast.index import Index, IndexSpec
from finelip_fast.index.catalogue import Catalogue
from finelip_fast.tokenizer import TruncationWarning

CONTEXT = 40
TEXTS = [
    "a red house with a flat roof",
    "a blue bus waits beside the tall tree",
    "two people with umbrellas",
    "night",
    "a yellow tram in front of a bakery, and a dog",
]
LONG = "a house with a door and a window, " * 20


@pytest.fixture(scope="session")
def checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("retriever") / "checkpoint"
    finelip_fast.save(make_model(context_length=CONTEXT, vision_layers=1, text_width=32), folder)
    return folder


@pytest.fixture(scope="session")
def other_checkpoint(make_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("retriever") / "other"
    finelip_fast.save(make_model(seed=1, context_length=CONTEXT, vision_layers=1, text_width=32), folder)
    return folder


@pytest.fixture
def build(checkpoint: Path) -> Iterator[Callable[..., Retriever]]:
    """Return a function that opens retrievers on the CPU, in float32; their indexes are closed at the end."""
    opened: list[Retriever] = []

    def open_one(**options: object) -> Retriever:
        opened.append(Retriever(**({"checkpoint": checkpoint, "device": "cpu"} | options)))
        return opened[-1]

    yield open_one
    for retriever in opened:
        retriever.index.close()


@pytest.fixture
def retriever(build: Callable[..., Retriever]) -> Retriever:
    return build()


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """Return a smooth unique picture: four random colours, blended."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


PICTURES = [picture(seed) for seed in range(6)]


def ids_of(hits: list[Hit]) -> list[str]:
    return [hit.id for hit in hits]


def add_all(retriever: Retriever) -> list[str]:
    names = [f"picture {n}" for n in range(len(PICTURES))]
    retriever.add_images(PICTURES, ids=names, progress=False)
    return names


# Searching ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of_texts", [False, True], ids=["pictures", "texts"])
@pytest.mark.parametrize("by_text", [False, True], ids=["by picture", "by text"])
@pytest.mark.parametrize("alpha", [None, 0.0, 1.0])
def test_search_agrees_with_scoring_everything(
    build: Callable[..., Retriever], of_texts: bool, by_text: bool, alpha: float | None
) -> None:
    retriever = build(alpha=alpha)
    items, queries = (TEXTS if of_texts else PICTURES), (TEXTS[::-1] if by_text else PICTURES[::-1])
    add = retriever.add_texts if of_texts else retriever.add_images
    add(items, ids=[str(n) for n in range(len(items))], batch_size=4, progress=False)
    search = retriever.search if by_text else lambda image, **rest: retriever.search(image=image, **rest)

    embed = {True: retriever.engine.embed_texts, False: retriever.engine.embed_images}
    model = finelip_fast.load(retriever.engine.source)
    scores = model.score(embed[by_text](queries), embed[of_texts](items), alpha=retriever.alpha)

    results = search(queries, k=len(items))
    assert len(results) == len(queries)
    for hits, row in zip(results, scores, strict=True):
        assert sorted(ids_of(hits)) == [str(n) for n in range(len(items))]
        got = torch.tensor([hit.score for hit in hits])
        assert got.tolist() == sorted(got.tolist(), reverse=True)
        # The index stores float16.
        torch.testing.assert_close(got, row[[int(hit.id) for hit in hits]], atol=2e-3, rtol=0)
        torch.testing.assert_close(got, row.sort(descending=True).values, atol=2e-3, rtol=0)
    for query, hits in zip(queries, results, strict=True):
        alone = search(query, k=3)
        assert ids_of(alone) == ids_of(hits[:3])
        assert [hit.score for hit in alone] == pytest.approx([hit.score for hit in hits[:3]], abs=1e-3)
    assert search(tuple(queries), k=1) == search(queries, k=1)


def test_embeddings_are_queries_like_what_they_are_of(retriever: Retriever) -> None:
    add_all(retriever)
    embedded = retriever.encode_texts(TEXTS)
    assert retriever.search_embeddings(embedded, k=3) == retriever.search(TEXTS, k=3)
    assert retriever.search_embeddings(embedded.cpu().numpy(), k=3) == retriever.search(TEXTS, k=3)
    doubles = retriever.search_embeddings(embedded.cpu().double().numpy(), k=1, mode="exact", where="x is null")
    assert doubles == retriever.search(TEXTS, k=1)
    assert retriever.search_embeddings(embedded[:0]) == []
    for wrong, message in (
        (embedded[0], r"expected queries \[Q, L, 48\], got"),
        (embedded[..., :5], r"expected queries \[Q, L, 48\], got"),
        (embedded.long(), "expected queries of floating-point numbers, got torch.int64"),
        (embedded * float("nan"), "expected finite queries, got NaN"),
        ([1.0], "expected queries as a tensor or an array"),
    ):
        with pytest.raises(InputError, match=message):
            retriever.search_embeddings(wrong)


def test_a_search_may_weigh_by_an_alpha_of_its_own(build: Callable[..., Retriever]) -> None:
    retriever = build(alpha=0.3)
    add_all(retriever)
    for alpha in (None, 0, 0.5, 1):
        weight = 0.3 if alpha is None else alpha
        searched = retriever.search(TEXTS, alpha=alpha) + retriever.search(image=PICTURES[:2], alpha=alpha)
        for hit in (hit for hits in searched for hit in hits):
            assert hit.score == pytest.approx(weight * hit.global_score + (1 - weight) * hit.fine_score, abs=1e-5)
    for wrong in (-0.1, 1.5, float("nan"), "1", True):
        with pytest.raises(InputError, match=r"expected alpha in \[0, 1\]"):
            retriever.search("night", alpha=wrong)


def test_every_item_finds_itself(retriever: Retriever) -> None:
    names = add_all(retriever)
    assert [ids_of(hits) for hits in retriever.search(image=PICTURES, k=1)] == [[name] for name in names]
    texts = retriever.add_texts(TEXTS, progress=False).added
    assert [ids_of(hits) for hits in retriever.search(TEXTS, k=1)] == [[name] for name in texts]


def test_a_hit_says_how_its_score_came_about(build: Callable[..., Retriever]) -> None:
    retriever = build(alpha=0.3)
    metadata = [{"n": n, "tags": ["x", None]} for n in range(len(PICTURES))]
    retriever.add_images(PICTURES, metadata=metadata, progress=False)
    hits = retriever.search(TEXTS[0], k=4)
    assert len(hits) == 4
    embeddings = retriever.engine.embed_texts(TEXTS[:1])[0], retriever.engine.embed_images(PICTURES)
    for hit in hits:
        assert hit.score == pytest.approx(0.3 * hit.global_score + 0.7 * hit.fine_score, abs=1e-5)
        n = int(hit.id.removeprefix("image-"))
        assert hit.metadata == metadata[n]
        assert hit.global_score == pytest.approx(float(embeddings[0][0] @ embeddings[1][n, 0]), abs=2e-3)


def test_equal_scores_come_in_order_of_insertion(retriever: Retriever) -> None:
    retriever.add_images([PICTURES[0]], ids=["z"], progress=False)
    retriever.add_images([PICTURES[1]], ids=["other"], progress=False)
    retriever.add_images([PICTURES[0]] * 2, ids=["b", "a"], batch_size=1, progress=False)
    hits = retriever.search(image=PICTURES[0], k=3)
    assert ids_of(hits) == ["z", "b", "a"]
    assert len({hit.score for hit in hits}) == 1


@pytest.mark.parametrize("k", [1, 6, 7, 1000])
def test_there_are_no_more_hits_than_items(retriever: Retriever, k: int) -> None:
    add_all(retriever)
    assert len(retriever.search("a house", k=k)) == min(k, 6)
    assert [len(hits) for hits in retriever.search(["a house", "a bus"], k=k)] == [min(k, 6)] * 2


def test_an_empty_index_gives_no_hits(retriever: Retriever) -> None:
    assert retriever.search("a house") == []
    assert retriever.search(["a house", "a bus"]) == [[], []]
    assert retriever.search(image=PICTURES[0]) == []


def test_no_queries_give_no_answers(retriever: Retriever) -> None:
    assert retriever.search([]) == []
    assert retriever.search(image=[]) == []
    add_all(retriever)
    assert retriever.search([]) == []
    assert retriever.search(image=()) == []


def test_an_empty_text_is_a_query_like_any_other(retriever: Retriever) -> None:
    add_all(retriever)
    hits = retriever.search("")
    assert len(hits) == 6
    assert all(np.isfinite([hit.score, hit.global_score, hit.fine_score]).all() for hit in hits)
    assert ids_of(retriever.search(["", "a house"])[0]) == ids_of(hits)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "expected either a text or image=..., got neither"),
        ({"text": "a", "image": PICTURES[0]}, "expected either a text or image=..., got both"),
        ({"text": 5}, "expected each text to be a str, got int at position 0"),
        ({"text": b"bytes"}, "expected each text to be a str, got bytes at position 0"),
        ({"text": ["fine", None]}, "expected each text to be a str, got NoneType at position 1"),
        ({"text": "a", "k": 0}, "expected k of at least 1, got 0"),
        ({"text": [], "k": -3}, "expected k of at least 1, got -3"),
        ({"text": "a", "k": True}, "expected k to be an integer, got True"),
        ({"text": "a", "k": 2.5}, "expected k to be an integer, got 2.5"),
        ({"text": "a", "k": "3"}, "expected k to be an integer, got '3'"),
        ({"text": "a", "mode": 5}, "expected mode to be one of"),
        ({"text": "a", "where": 5}, "expected where as an expression in a str, got 5"),
    ],
    ids=lambda value: None if isinstance(value, str) else ",".join(value) or "nothing",
)
def test_a_query_that_is_none_is_refused(retriever: Retriever, query: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        retriever.search(**query)


def test_a_query_picture_that_cannot_be_read_is_refused(retriever: Retriever, tmp_path: Path) -> None:
    add_all(retriever)
    with pytest.raises(ImageError, match=r"no such file: .*lost\.png"):
        retriever.search(image=tmp_path / "lost.png")
    with pytest.raises(ImageError, match=r"no such file: .*lost\.png"):
        retriever.search(image=[PICTURES[0], tmp_path / "lost.png"])


# Scoring --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "texts"), [(1, 1), (3, 2), (0, 2), (3, 0), (0, 0)])
def test_the_score_matrix_has_a_row_for_each_picture(retriever: Retriever, images: int, texts: int) -> None:
    scores = retriever.score(PICTURES[:images], TEXTS[:texts])
    assert scores.shape == (images, texts)
    assert scores.dtype == torch.float32
    for n in range(images):
        torch.testing.assert_close(scores[n : n + 1], retriever.score([PICTURES[n]], TEXTS[:texts]), atol=1e-5, rtol=0)


def test_one_picture_and_one_text_score_without_lists(retriever: Retriever, tmp_path: Path) -> None:
    PICTURES[0].save(tmp_path / "one.png")
    expected = retriever.score([PICTURES[0]], [TEXTS[0]])
    for single in (PICTURES[0], tmp_path / "one.png", (tmp_path / "one.png").read_bytes(), np.asarray(PICTURES[0])):
        assert torch.equal(retriever.score(single, TEXTS[0]), expected)
    generated = retriever.score((picture for picture in PICTURES[:1]), (text for text in TEXTS[:1]))
    assert torch.equal(generated, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -0.1}, r"expected alpha in \[0, 1\], got -0.1"),
        ({"alpha": float("nan")}, r"expected alpha in \[0, 1\], got nan"),
        ({"alpha": True}, r"expected alpha in \[0, 1\], got True"),
        ({"alpha": "x"}, r"expected alpha in \[0, 1\], got 'x'"),
        ({"threads": 0}, "expected threads of at least 1, got 0"),
        ({"threads": "2"}, "expected threads to be an integer, got '2'"),
        ({"threads": 2.5}, "expected threads to be an integer, got 2.5"),
        ({"overflow": "cut"}, "expected overflow to be one of"),
        ({"overflow": None}, "expected overflow to be one of"),
        ({"engine": 5}, "expected engine to be one of"),
        ({"precision": 16}, "expected precision to be one of"),
        ({"checkpoint": 5}, "expected checkpoint to be a path or a name, got 5"),
        ({"index": 5}, "expected index to be a path, got 5"),
        ({"dtype": "int4"}, "expected dtype to be one of float16, int8, got 'int4'"),
        ({"device": [0]}, r"expected device to be 'cpu', .*, a GPU's number or a torch\.device, got \[0\]"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_arguments_are_checked_before_a_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, options: dict, message: str
) -> None:
    monkeypatch.setattr("finelip_fast.checkpoint.load", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match=message):
        Retriever(**options)


def test_an_index_follows_its_checkpoints_alpha(build: Callable[..., Retriever], tmp_path: Path) -> None:
    """The embeddings stay the same when a checkpoint gets another weight, and so does the index."""
    checkpoint = tmp_path / "checkpoint"
    finelip_fast.save(build().engine.load_model(), checkpoint)
    with build(checkpoint=checkpoint, index=tmp_path / "index") as retriever:
        retriever.add_images(PICTURES, progress=False)
        expected = retriever.search("a house", alpha=0.3)
    convert(checkpoint, tmp_path / "other", alpha=0.3)
    with build(checkpoint=tmp_path / "other", index=tmp_path / "index") as retriever:
        assert (retriever.alpha, retriever.index.spec.alpha) == (0.3, 0.3)
        assert [hit.score for hit in retriever.search("a house")] == [hit.score for hit in expected]


def test_alpha_is_the_checkpoints_own(build: Callable[..., Retriever], make_model, tmp_path: Path) -> None:
    assert build().alpha == 0.8
    assert build(alpha=0).alpha == 0
    untrained = tmp_path / "untrained"
    finelip_fast.save(make_model(context_length=CONTEXT, trained_aggregators=False), untrained)
    with pytest.warns(UntrainedAggregatorsWarning, match="alpha=1"):
        retriever = build(checkpoint=untrained)
    assert retriever.alpha == 1
    retriever.add_images(PICTURES, progress=False)
    hits = retriever.search("a house")
    assert all(hit.score == pytest.approx(hit.global_score, abs=1e-6) for hit in hits)
    assert {hit.fine_score for hit in hits} == {None}
    assert retriever.index.embeddings.shape == retriever.encode_images(PICTURES).shape == (len(PICTURES), 1, 48)
    with pytest.raises(InputError, match=r"expected alpha=1, got 0\.5"):
        retriever.search("a house", alpha=0.5)
    with (
        pytest.warns(UntrainedAggregatorsWarning),
        pytest.raises(InputError, match=r"expected alpha=1, got 0\.5: without trained aggregators"),
    ):
        build(checkpoint=untrained, alpha=0.5)


@pytest.mark.filterwarnings("ignore::finelip_fast.UntrainedAggregatorsWarning")
def test_a_folder_with_rows_of_untrained_aggregators_is_still_used(
    build: Callable[..., Retriever], make_model, tmp_path: Path
) -> None:
    """Earlier versions created such folders; they keep their number of rows, and find the same items."""
    model = make_model(context_length=CONTEXT, trained_aggregators=False)
    finelip_fast.save(model, tmp_path / "untrained")
    fresh = build(checkpoint=tmp_path / "untrained")
    names = add_all(fresh)
    with torch.no_grad():
        rows = model(model.preprocess.batch(PICTURES[:4]), finelip_fast.tokenize(TEXTS[:4], CONTEXT)).images
    spec = IndexSpec(fresh.engine.fingerprint, rows.shape[1], rows.shape[2], 1.0)
    with closing(Index(spec, tmp_path / "index")) as index:
        index.add(names[:4], rows, [{}] * 4)
    retriever = build(checkpoint=tmp_path / "untrained", index=tmp_path / "index")
    retriever.add_images(PICTURES[4:], ids=names[4:], progress=False)
    assert retriever.index.embeddings.shape == (len(PICTURES), *rows.shape[1:])
    for text in TEXTS:
        assert ids_of(retriever.search(text)) == ids_of(fresh.search(text))


def test_longer_texts_go_as_the_retriever_was_told(build: Callable[..., Retriever]) -> None:
    with pytest.warns(TruncationWarning, match=f"exceeded {CONTEXT} tokens"):
        build().search(LONG)
    with pytest.raises(InputError, match=f"expected texts of at most {CONTEXT} tokens"):
        build(overflow="error").search(LONG)
    windowed = build(overflow="window")
    windowed.add_texts([LONG, "a house"], progress=False)
    assert ids_of(windowed.search(LONG, k=1)) == ["text-0"]
    assert windowed.score(PICTURES, [LONG]).shape == (6, 1)


# The engine -----------------------------------------------------------------------------------------------------------


def test_the_engine_prints_its_name_and_reason(build: Callable[..., Retriever]) -> None:
    retriever = build(engine="torch")
    assert str(retriever.engine) == "torch: cpu, float32 (asked for)"
    automatic = build().engine
    assert str(automatic).startswith(f"{automatic.name}: ")
    assert f"({automatic.reason})" in str(automatic)


@pytest.mark.parametrize("name", ["onnx", "trt"])
def test_a_named_engine_that_cannot_run_is_an_error(checkpoint: Path, name: str) -> None:
    if why_not(name) is None:
        pytest.skip(f"{name} runs here")
    with pytest.raises(EngineError, match=f"engine='{name}' cannot run: .*use engine='torch' or engine='auto'"):
        Retriever(checkpoint, engine=name)


def test_an_unknown_engine_is_refused(checkpoint: Path) -> None:
    with pytest.raises(InputError, match=r"expected engine to be one of .*, got 'fastest'"):
        Retriever(checkpoint, engine="fastest")


def test_threads_share_a_retriever(retriever: Retriever) -> None:
    retriever.add_texts([f"{number} red houses" for number in range(8)], progress=False)
    queries = [f"{number} red houses" for number in range(8)] * 5
    expected = [[(hit.id, hit.score) for hit in retriever.search(query, k=3)] for query in queries]
    with ThreadPoolExecutor(4) as pool:
        for hits, alone in zip(pool.map(lambda query: retriever.search(query, k=3), queries), expected, strict=True):
            assert [hit.id for hit in hits] == [item for item, _ in alone]
            assert [hit.score for hit in hits] == pytest.approx([score for _, score in alone], abs=1e-6)


# Adding ---------------------------------------------------------------------------------------------------------------


def test_ids_are_paths_or_numbers(retriever: Retriever, tmp_path: Path) -> None:
    PICTURES[0].save(tmp_path / "a.png")
    PICTURES[1].save(tmp_path / "b.png")
    report = retriever.add_images([tmp_path / "a.png", PICTURES[2], str(tmp_path / "b.png")], progress=False)
    assert report.added == [str(tmp_path / "a.png"), "image-0", str(tmp_path / "b.png")]
    assert retriever.add_texts(["a", "b"], progress=False).added == ["text-3", "text-4"]
    assert len(retriever) == 5
    assert [set(metadata) >= {"sha256", "width"} for metadata in retriever.index.metadata] == [
        True,
        False,
        True,
        False,
        False,
    ]


def test_a_number_that_is_taken_is_passed_over(retriever: Retriever) -> None:
    retriever.add_images([b"broken", *PICTURES[:2]], progress=False)  # the two pictures are added as 1 and 2
    retriever.add_images(PICTURES[2:3], ids=["image-4"], progress=False)
    assert retriever.add_images(PICTURES[3:], progress=False).added == ["image-3", "image-5", "image-6"]


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_generators_are_read_batch_by_batch(
    retriever: Retriever, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers, encoded = [], []
    encode = retriever.engine.encode_image

    def counted(pixels: Tensor) -> Tensor:
        encoded.extend(pixels)
        return encode(pixels)

    def generated() -> Iterator[Image.Image]:
        for n, picture in enumerate(PICTURES):
            numbers.append(n)
            assert len(numbers) - len(encoded) <= 2 * batch_size  # one batch is decoded while another is encoded
            yield picture

    monkeypatch.setattr(retriever.engine, "encode_image", counted)

    assert len(retriever.add_images(generated(), batch_size=batch_size, progress=False).added) == 6
    assert len(retriever.add_texts((text for text in TEXTS), batch_size=batch_size, progress=False).added) == 5
    assert ids_of(retriever.search(image=PICTURES[4], k=1)) == ["image-4"]


@pytest.mark.parametrize(
    "convert",
    [
        lambda image, path: image,
        lambda image, path: path,
        lambda image, path: str(path),
        lambda image, path: path.read_bytes(),
        lambda image, path: np.array(image),
        lambda image, path: torch.from_numpy(np.array(image)).permute(2, 0, 1),
    ],
    ids=["PIL", "path", "str", "bytes", "array", "tensor"],
)
def test_one_picture_of_any_kind_is_one_picture(retriever: Retriever, tmp_path: Path, convert: Callable) -> None:
    PICTURES[0].save(tmp_path / "one.png")
    picture = convert(PICTURES[0], tmp_path / "one.png")
    report = retriever.add_images(picture, progress=False)
    assert (len(report.added), report.skipped) == (1, [])
    assert retriever.search(image=picture)[0].score == pytest.approx(1.2, abs=5e-3)  # matches itself: 0.8 * 1 + 0.2 * 2


def test_a_stack_of_pictures_is_as_many(retriever: Retriever) -> None:
    stack = np.stack([np.asarray(picture) for picture in PICTURES])
    with pytest.raises(InputError, match="expected as many ids as images, got 1 for 6"):
        retriever.add_images(stack, ids=["a"], progress=False)
    assert len(retriever.add_images(stack, progress=False).added) == 6
    assert len(retriever.add_images(torch.from_numpy(stack).permute(0, 3, 1, 2), progress=False).added) == 6


def test_one_text_is_one_text(retriever: Retriever) -> None:
    assert retriever.add_texts("a house", progress=False).added == ["text-0"]


def test_a_text_that_is_none_is_refused(retriever: Retriever) -> None:
    with pytest.raises(InputError, match="expected each text to be a str, got int at position 1"):
        retriever.add_texts(["a", 5], progress=False)
    assert len(retriever) == 0


@pytest.mark.parametrize("add", ["add_images", "add_texts"])
def test_nothing_to_add_is_no_error(retriever: Retriever, add: str) -> None:
    for nothing in ([], (), iter(())):
        report = getattr(retriever, add)(nothing, progress=False)
        assert str(report) == "0 added, 0 skipped"


def test_ids_must_be_new_and_differ(retriever: Retriever) -> None:
    retriever.add_texts(["a"], ids=["old"], progress=False)
    for ids, message in ((["new", "old"], "already has 'old'"), (["new", "new"], "unique ids, got 'new' twice")):
        with pytest.raises(InputError, match=message):
            retriever.add_texts(["b", "c"], ids=ids, batch_size=1, progress=False)
    with pytest.raises(InputError, match="expected ids of type str, got 7"):
        retriever.add_texts(["b"], ids=[7], progress=False)
    assert retriever.index.ids == ["old"]  # refused before any work


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_what_came_before_an_error_is_kept(retriever: Retriever, kind: str) -> None:
    add, items = (retriever.add_images, PICTURES[:5]) if kind == "images" else (retriever.add_texts, TEXTS)

    def generated() -> Iterator[object]:
        yield from items[:4]
        raise RuntimeError("the source is gone")

    with pytest.raises(RuntimeError, match="the source is gone"):
        add(generated(), batch_size=2, progress=False)
    assert len(retriever) == 4
    with pytest.raises(InputError, match="expected unique ids, got 'b' twice"):
        add((item for item in items), ids=list("abcdb"), batch_size=2, existing="replace", progress=False)


def test_the_same_path_twice_is_refused(retriever: Retriever, tmp_path: Path) -> None:
    PICTURES[0].save(tmp_path / "one.png")
    with pytest.raises(InputError, match=r"expected unique ids, got '.*one\.png' twice"):
        retriever.add_images([tmp_path / "one.png"] * 2, progress=False)
    assert len(retriever) == 0


@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_repeated_picture_is_skipped_in_any_batch(retriever: Retriever, tmp_path: Path, batch_size: int) -> None:
    PICTURES[0].save(tmp_path / "one.png")
    report = retriever.add_images([tmp_path / "one.png"] * 3, existing="skip", batch_size=batch_size, progress=False)
    assert report.added == [str(tmp_path / "one.png")]


@pytest.mark.parametrize("name", ["ids", "metadata"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("generated", [False, True], ids=["list", "generator"])
def test_lists_of_other_lengths_are_refused(retriever: Retriever, name: str, count: int, generated: bool) -> None:
    values = {"ids": [str(n) for n in range(count)], "metadata": [{}] * count}[name]
    texts = (text for text in TEXTS[:2]) if generated else TEXTS[:2]
    with pytest.raises(InputError, match=f"expected as many {name} as texts, got {count} for 2"):
        retriever.add_texts(texts, **{name: values}, progress=False)
    assert len(retriever) == 0


CIRCLE: list[object] = []
CIRCLE.append(CIRCLE)
DEEP: list[object] = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fine": 1, "where": Path("a")}, r"PosixPath\('a'\) .*where"),
        ({"when": datetime(2024, 1, 2)}, r"datetime.datetime\(2024, 1, 2, 0, 0\) .*when"),
        ({"score": float("nan")}, "finite numbers, got nan .*score"),
        ({1: "x", "1": "y"}, "expected metadata with str keys, got the key 1"),
        ({"a": {1: "x", "1": "y"}}, "expected metadata with str keys, got the key 1"),
        ({"a": CIRCLE}, "nested at most 64 deep, got deeper nesting"),
        ({"a": DEEP}, "nested at most 64 deep, got deeper nesting"),
        ({"a": b"x" * 5_000_000}, "got b'xxx"),
        (b"x" * 5_000_000, "got b'xxx"),
        (["a"], r"got \['a'\]"),
        (None, "got None"),
    ],
    ids=lambda value: value[-30:] if isinstance(value, str) else "",
)
def test_metadata_that_json_cannot_hold_is_refused_before_any_work(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch, values: object, message: str
) -> None:
    monkeypatch.setattr(retriever.engine, "encode_text", lambda _: pytest.fail("work was begun"))
    metadata = [{}] * 60
    metadata[45] = values
    with pytest.raises(InputError, match="expected metadata ") as caught:
        retriever.add_texts((str(n) for n in range(60)), metadata=metadata, batch_size=8, progress=False)
    assert re.search(rf"{message}.* \(item 'text 45'\)", str(caught.value))
    assert len(str(caught.value)) < 300
    assert len(retriever) == 0


def test_metadata_is_refused_by_the_id_where_there_is_one(retriever: Retriever) -> None:
    with pytest.raises(InputError, match=r"got nan .*score.* \(item 'second'\)"):
        retriever.add_texts(["a", "b"], ids=["first", "second"], metadata=[{}, {"score": float("nan")}], progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": "ab"}, r"expected ids to be a list, got the str 'ab'; pass \['ab'\]"),
        ({"ids": 5}, "expected ids to be a list, got 5"),
        ({"ids": ["a", b"b" * 5_000_000]}, "expected ids of type str, got b'bbb"),
        ({"ids": ["a", None]}, "expected ids of type str, got None"),
        ({"ids": ["a" * 60_000] * 2}, "expected unique ids, got 'aaa"),
        ({"metadata": {"a": 1, "b": 2}}, "expected metadata to be a list, got {'a': 1, 'b': 2}"),
        ({"existing": "x" * 5_000_000}, "expected existing to be one of error, skip, replace, got 'xxx"),
        ({"existing": None}, "expected existing to be one of error, skip, replace, got None"),
        ({"existing": ["skip"]}, r"expected existing to be one of error, skip, replace, got \['skip'\]"),
        ({"batch_size": 2.0}, "expected batch_size to be an integer, got 2.0"),
        ({"batch_size": True}, "expected batch_size to be an integer, got True"),
        ({"batch_size": "8"}, "expected batch_size to be an integer, got '8'"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("kind", ["images", "texts"])
def test_arguments_of_another_kind_are_refused_before_any_work(
    retriever: Retriever, monkeypatch: pytest.MonkeyPatch, kind: str, arguments: dict, message: str
) -> None:
    monkeypatch.setattr(retriever.engine, "encode_text", lambda _: pytest.fail("work was begun"))
    monkeypatch.setattr(retriever.engine, "encode_image", lambda _: pytest.fail("work was begun"))
    add, items = (retriever.add_images, PICTURES[:2]) if kind == "images" else (retriever.add_texts, TEXTS[:2])
    with pytest.raises(InputError, match=message) as caught:
        add(items, **arguments, progress=False)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("value", [5, None, torch.tensor(5)])
def test_nothing_that_can_be_added_is_refused(retriever: Retriever, value: object) -> None:
    for add in (retriever.add_images, retriever.add_texts):
        with pytest.raises(InputError, match="in a list or another iterable, got"):
            add(value, progress=False)


def test_ids_and_metadata_may_be_generated(retriever: Retriever) -> None:
    report = retriever.add_texts(
        TEXTS[:2], ids=(name for name in "ab"), metadata=({"n": n} for n in range(2)), progress=False
    )
    assert report.added == ["a", "b"]
    assert retriever.index.metadata == [{"n": 0}, {"n": 1}]


def test_what_is_no_picture_among_pictures_is_skipped(retriever: Retriever) -> None:
    report = retriever.add_images([PICTURES[0], None, 5, PICTURES[1]], progress=False)
    assert report.added == ["image-0", "image-3"]
    assert [item for item, _ in report.skipped] == ["image-1", "image-2"]


def test_texts_that_are_none_are_found_before_any_work_or_leave_what_came_before(retriever: Retriever) -> None:
    texts = ["a", "b", "c", 5]
    with pytest.raises(InputError, match="expected each text to be a str, got int at position 3"):
        retriever.add_texts(texts, batch_size=2, progress=False)
    assert len(retriever) == 0
    with pytest.raises(InputError, match="expected each text to be a str, got int at position 3"):
        retriever.add_texts(iter(texts), batch_size=2, progress=False)
    assert retriever.index.ids == ["text-0", "text-1"]


def test_names_of_skipped_files_are_shown_and_not_obeyed() -> None:
    report = AddReport(["a"], [("b\n7 added, 0 skipped\x1b[A", "no\rpicture")])
    assert str(report) == "1 added, 1 skipped\n  b\\n7 added, 0 skipped\\x1b[A: no\\rpicture"


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_holds_something(retriever: Retriever, batch_size: int) -> None:
    with pytest.raises(InputError, match=f"expected batch_size of at least 1, got {batch_size}"):
        retriever.add_images(PICTURES, batch_size=batch_size, progress=False)


# A folder of odd files ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory) -> dict[str, Path]:
    """Paths of all files in one folder, by kind of file."""
    folder = tmp_path_factory.mktemp("odd") / "my photos"
    (folder / "below" / "deeper").mkdir(parents=True)
    (folder / ".thumbnails").mkdir()
    paths = {
        "upright": folder / "upright.jpg",
        "rotated": folder / "rotated.jpg",
        "palette": folder / "palette.png",
        "rgba": folder / "rgba.png",
        "cmyk": folder / "cmyk.jpeg",
        "deep": folder / "sixteen bits.png",
        "animated": folder / "animated.gif",
        "webp": folder / "modern.webp",
        "loud": folder / "LOUD.JPG",
        "named": folder / "ein schönes 猫 bild's.png",
        "below": folder / "below" / "deeper" / "one.bmp",
        "truncated": folder / "truncated.jpg",
        "empty": folder / "empty.jpg",
        "lying": folder / "text.png",
        "text": folder / "notes.txt",
        "hidden": folder / ".hidden.png",
        "thumbnail": folder / ".thumbnails" / "one.png",
    }
    lossless = {"quality": 100, "subsampling": 0}
    image = picture(20, (64, 48))
    image.save(paths["upright"], **lossless)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # rotate 90 degrees clockwise to display
    image.transpose(Image.Transpose.ROTATE_90).save(paths["rotated"], exif=exif, **lossless)

    palette = picture(21).quantize(16)
    palette.save(paths["palette"], transparency=3)
    rgba = picture(22).convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    rgba.save(paths["rgba"])
    picture(23).convert("CMYK").save(paths["cmyk"])
    ramp = np.linspace(0, 65535, 48 * 40).reshape(40, 48).astype(np.uint16)
    Image.fromarray(ramp).save(paths["deep"])
    picture(24).save(paths["animated"], save_all=True, append_images=[picture(25), picture(26)])
    picture(27).save(paths["webp"])
    picture(28).save(paths["loud"], format="jpeg")
    picture(29).save(paths["named"])
    picture(30).save(paths["below"])
    picture(31, (200, 200)).save(paths["truncated"], quality=95)
    data = paths["truncated"].read_bytes()
    paths["truncated"].write_bytes(data[: len(data) // 2])
    paths["empty"].touch()
    paths["lying"].write_text("This is no picture.")
    paths["text"].write_text("This is no picture either.")
    picture(32).save(paths["hidden"])
    picture(33).save(paths["thumbnail"])
    return paths


BROKEN = {
    "truncated": "truncated",
    "empty": "is empty",
    "lying": "not an image",
    "text": "not a picture by its name",
}
UNSEEN = ("hidden", "thumbnail")


def test_a_folder_of_odd_files(build: Callable[..., Retriever], odd_folder: dict[str, Path], tmp_path: Path) -> None:
    retriever = build(index=tmp_path / "index")
    report = retriever.add_images(odd_folder["upright"].parent, batch_size=3, progress=False)
    readable = {kind: path for kind, path in odd_folder.items() if kind not in BROKEN and kind not in UNSEEN}
    folder = odd_folder["upright"].parent
    assert sorted(report.added) == sorted(path.relative_to(folder).as_posix() for path in readable.values())
    assert sorted(retriever.index.ids) == sorted(report.added)

    reasons = dict(report.skipped)
    assert sorted(reasons) == sorted(str(odd_folder[kind]) for kind in BROKEN)
    for kind, reason in BROKEN.items():
        assert reason in reasons[str(odd_folder[kind])]
    lines = str(report).splitlines()
    assert lines[0] == f"{len(readable)} added, {len(BROKEN)} skipped"
    assert lines[1:] == [f"  {path}: {reason}" for path, reason in report.skipped]

    for kind, path in readable.items():
        best = retriever.search(image=path, k=1)[0]
        assert best.score == pytest.approx(1.2, abs=5e-3), kind  # 0.8 * 1 + 0.2 * 2
        if kind not in ("upright", "rotated"):  # those two show the same picture
            assert best.path == str(path)


def test_a_turned_copy_scores_as_its_upright_original(retriever: Retriever, odd_folder: dict[str, Path]) -> None:
    pair = [odd_folder["upright"], odd_folder["rotated"]]
    retriever.add_images([*pair, odd_folder["webp"]], progress=False)
    for path in pair:
        hits = retriever.search(image=path)
        assert {hit.id for hit in hits[:2]} == set(map(str, pair))
        assert hits[1].score == pytest.approx(hits[0].score, abs=1e-2)
    scores = retriever.score(pair, TEXTS)
    torch.testing.assert_close(scores[0], scores[1], atol=1e-2, rtol=0)


def test_a_name_that_is_no_utf8_is_a_name(build: Callable[..., Retriever], tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        PICTURES[0].save(path)
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    retriever = build(index=tmp_path / "index")
    assert retriever.add_images([path], progress=False).added == [str(path)]
    assert build(index=tmp_path / "index").search(image=path)[0].id == str(path)


def test_broken_pictures_do_not_shift_metadata(retriever: Retriever) -> None:
    images = [PICTURES[0], b"broken", PICTURES[1], np.zeros((0, 3)), PICTURES[2]]
    names, metadata = list("abcde"), [{"n": n} for n in range(5)]
    report = retriever.add_images(images, ids=names, metadata=metadata, batch_size=2, progress=False)
    assert report.added == ["a", "c", "e"]
    assert [item for item, _ in report.skipped] == ["b", "d"]
    for image, name, meta in zip(PICTURES[:3], "ace", metadata[::2], strict=True):
        hit = retriever.search(image=image, k=1)[0]
        assert (hit.id, hit.metadata) == (name, meta)


# Keeping --------------------------------------------------------------------------------------------------------------


def test_reopening_gives_identical_hits(build: Callable[..., Retriever], tmp_path: Path) -> None:
    first = build(index=tmp_path / "index")
    first.add_images(PICTURES, metadata=[{"size": picture.size} for picture in PICTURES], batch_size=4, progress=False)
    first.add_texts(TEXTS, progress=False)
    before = first.search(TEXTS), first.search(image=PICTURES, k=20)
    first.index.close()

    again = build(index=tmp_path / "index")
    assert len(again) == 11
    assert (again.search(TEXTS), again.search(image=PICTURES, k=20)) == before
    assert again.add_texts(["one more"], progress=False).added == ["text-11"]
    assert ids_of(build(index=tmp_path / "index").search("one more", k=1)) == ["text-11"]


def test_another_checkpoint_is_refused_and_both_are_named(
    build: Callable[..., Retriever], checkpoint: Path, other_checkpoint: Path, tmp_path: Path
) -> None:
    build(index=tmp_path / "index").add_texts(["a"], progress=False)
    with pytest.raises(StoreError) as caught:
        build(checkpoint=other_checkpoint, index=tmp_path / "index")
    assert str(checkpoint) in str(caught.value)
    assert str(other_checkpoint) in str(caught.value)
    assert "open it with the checkpoint that wrote it" in str(caught.value)


def test_a_copied_checkpoint_is_the_same(build: Callable[..., Retriever], checkpoint: Path, tmp_path: Path) -> None:
    build(index=tmp_path / "index").add_texts(["a"], progress=False)
    finelip_fast.save(finelip_fast.load(checkpoint), tmp_path / "copy")
    assert len(build(checkpoint=tmp_path / "copy", index=tmp_path / "index")) == 1


def test_an_interrupted_job_goes_on_where_it_was(
    build: Callable[..., Retriever], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    commit = Catalogue.add

    def killed_at_the_second(*arguments: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        commit(*arguments, **options)

    retriever = build(index=tmp_path / "index")
    names = [f"picture {n}" for n in range(6)]
    with monkeypatch.context() as patch:
        patch.setattr("finelip_fast.ingest._FLUSH_BYTES", 1)
        patch.setattr(Catalogue, "add", killed_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            retriever.add_images(PICTURES, ids=names, batch_size=2, progress=False)
    assert retriever.index.ids == names[:4]  # items encoded before the failure are kept

    again = build(index=tmp_path / "index")
    assert again.index.ids == names[:4]
    assert again.add_images(PICTURES, ids=names, existing="skip", progress=False).added == names[4:]
    uninterrupted = build()
    uninterrupted.add_images(PICTURES, ids=names, progress=False)
    results = build(index=tmp_path / "index").search(TEXTS, k=6)
    for hits, expected in zip(results, uninterrupted.search(TEXTS, k=6), strict=True):
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=1e-3)


def test_what_was_taken_out_is_not_found(build: Callable[..., Retriever], tmp_path: Path) -> None:
    retriever = build(index=tmp_path / "index")
    retriever.add_texts(TEXTS, ids=list("abcde"), progress=False)
    retriever.delete("b")
    retriever.delete(["c", "e"])
    assert {hit.id for hit in retriever.search(TEXTS[1], k=5)} == {"a", "d"}
    assert build(index=tmp_path / "index").index.ids == ["a", "d"]


def test_two_retrievers_may_share_a_folder(build: Callable[..., Retriever], tmp_path: Path) -> None:
    first, second = (build(index=tmp_path / "index") for _ in range(2))
    first.add_texts(["a"], ids=["first"], progress=False)
    second.add_texts(["b"], ids=["second"], progress=False)
    assert {hit.id for hit in first.search("b", k=5)} == {"first", "second"}


def test_ids_that_are_there_are_skipped_or_replaced(build: Callable[..., Retriever], tmp_path: Path) -> None:
    retriever = build(index=tmp_path / "index")
    retriever.add_texts(TEXTS[:3], ids=list("abc"), metadata=[{"n": 1}] * 3, progress=False)
    options = {"ids": list("bxc"), "metadata": [{"n": 2}] * 3, "progress": False}
    assert retriever.add_texts(TEXTS[2:5], **options, existing="skip").added == ["x"]
    assert retriever.index.ids == list("abcx")
    assert retriever.search(TEXTS[1], k=1)[0].metadata == {"n": 1}
    assert retriever.add_texts(TEXTS[2:5], **options, existing="replace").added == list("bxc")
    assert retriever.index.ids == list("abxc")
    assert [hit.id for hit in retriever.search(TEXTS[3], k=1)] == ["x"]
    assert [meta["n"] for meta in retriever.index.metadata] == [1, 2, 2, 2]
    for existing in ("replace", "error"):
        with pytest.raises(InputError, match="expected unique ids, got 'n' twice"):
            retriever.add_texts((text for text in TEXTS[:2]), ids=["n", "n"], existing=existing, progress=False)
    with pytest.raises(InputError, match="expected existing to be one of error, skip, replace, got 'ignore'"):
        retriever.add_texts(TEXTS[:1], existing="ignore", progress=False)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_every_mode_and_a_filter_find_the_same(build: Callable[..., Retriever], tmp_path: Path, dtype: str) -> None:
    retriever = build(index=tmp_path / "index", dtype=dtype)
    retriever.add_images(PICTURES, metadata=[{"camera": "ab"[n % 2], "n": n} for n in range(6)], progress=False)
    assert build(index=tmp_path / "index").index.spec.dtype == dtype  # as it was created
    expected = retriever.search(TEXTS[0], k=6, mode="exact")
    assert {hit.mode for hit in expected} == {"exact"}
    for mode in ("exact-int8", "two-stage", "sketch"):
        hits = retriever.search(TEXTS[0], k=6, mode=mode)
        assert [(hit.id, hit.score) for hit in hits] == [(hit.id, hit.score) for hit in expected]
        filtered_hits = retriever.search(TEXTS[0], k=6, mode=mode, where="camera = 'b' and n > 1")
        assert [hit.id for hit in filtered_hits] == [hit.id for hit in expected if hit.metadata["n"] in (3, 5)]
        assert retriever.search(TEXTS[0], mode=mode, where="camera = 'c'") == []
    with pytest.raises(
        InputError, match="expected mode to be one of auto, exact, exact-int8, two-stage, sketch, got 'fast'"
    ):
        retriever.search(TEXTS[0], mode="fast")
    with pytest.raises(InputError, match="expected a value, got the end"):
        retriever.search(TEXTS[0], where="camera =")


def test_a_lost_segment_is_named(build: Callable[..., Retriever], tmp_path: Path) -> None:
    build(index=tmp_path / "index").add_texts(["a"], progress=False)
    (segment,) = (tmp_path / "index" / "segments").glob("*.safetensors")
    segment.unlink()
    with pytest.raises(StoreError, match=f"{segment.name} is missing"):
        build(index=tmp_path / "index")


def test_a_file_in_the_indexs_place_is_refused(build: Callable[..., Retriever], tmp_path: Path) -> None:
    (tmp_path / "index").write_text("a file")
    with pytest.raises(StoreError, match="cannot make the index folder"):
        build(index=tmp_path / "index")


# Processes ------------------------------------------------------------------------------------------------------------


def test_a_retriever_is_pickled_as_what_it_was_opened_with(
    build: Callable[..., Retriever], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    retriever = build(index="index", alpha=0.25, overflow="error", engine="torch")
    add_all(retriever)
    expected = retriever.search(TEXTS[0])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    content = pickle.dumps(retriever)
    assert len(content) < 2000
    for again in (pickle.loads(content), copy.copy(retriever)):
        assert (again.alpha, again.overflow, again.engine.name) == (0.25, "error", "torch")
        assert again.search(TEXTS[0]) == expected
        again.index.close()


def test_an_index_in_memory_is_not_pickled(retriever: Retriever) -> None:
    with pytest.raises(InputError, match="a retriever with an in-memory index cannot be pickled"):
        pickle.dumps(retriever)


def test_a_spawned_process_opens_anew(build: Callable[..., Retriever], tmp_path: Path) -> None:
    retriever = build(index=tmp_path / "index", engine="torch")
    add_all(retriever)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(Retriever.search, retriever, TEXTS[0]).result(120) == retriever.search(TEXTS[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="for systems with fork")
def test_a_forked_process_is_told_to_open_anew(build: Callable[..., Retriever], tmp_path: Path) -> None:
    retriever = build(index=tmp_path / "index")
    add_all(retriever)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        retriever.search(TEXTS[0])  # starts threads that a forked child does not have
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for attempt in (
                lambda: retriever.search("a"),
                lambda: retriever.add_texts(["a"]),
                lambda: retriever.add_images([]),
                lambda: retriever.delete("a"),
                lambda: retriever.score(PICTURES, TEXTS),
                lambda: retriever.explain(PICTURES[0], "a"),
                lambda: len(retriever),
            ):
                try:
                    attempt()
                except EngineError as error:
                    os.write(writer, b"." if "before the process forked" in str(error) else b"?")
            os._exit(0)
        os.close(writer)
        os.waitpid(child, 0)
        with open(reader, "rb") as file:
            assert file.read() == b"......."
    finally:
        torch.set_num_threads(before)
    assert retriever.search(TEXTS[0])


# What users of other libraries try ---------------------------------------------------------------------------------------


def test_embeddings_without_an_index(build: Callable[..., Retriever]) -> None:
    retriever = build()
    images, texts = retriever.encode_images(PICTURES, batch_size=4), retriever.encode_texts(TEXTS)
    config = retriever.engine.config
    assert images.shape == (len(PICTURES), config.tokens, config.embed_dim)
    torch.testing.assert_close(retriever.similarity(images, texts), retriever.score(PICTURES, TEXTS))
    assert len(retriever) == 0
    arrays = (
        retriever.encode_images(PICTURES, convert_to_numpy=True),
        retriever.encode_texts(TEXTS, convert_to_numpy=True),
    )
    assert all(array.dtype == np.float32 for array in arrays)
    np.testing.assert_allclose(arrays[0], images.cpu().float(), atol=1e-6)
    torch.testing.assert_close(retriever.similarity(*arrays).cpu(), retriever.score(PICTURES, TEXTS).cpu())
    torch.testing.assert_close(
        retriever.similarity(arrays[0], texts.half()).cpu(), retriever.score(PICTURES, TEXTS).cpu(), atol=2e-3, rtol=0
    )


def test_similarity_goes_by_the_retrievers_alpha(build: Callable[..., Retriever]) -> None:
    retriever = build(alpha=1)
    images, texts = retriever.encode_images(PICTURES), retriever.encode_texts(TEXTS)
    torch.testing.assert_close(retriever.similarity(texts, images), texts[:, 0] @ images[:, 0].T)


def test_embeddings_of_nothing_and_of_one(build: Callable[..., Retriever]) -> None:
    retriever = build()
    config = retriever.engine.config
    assert retriever.encode_texts([]).shape == retriever.encode_images([]).shape == (0, config.tokens, config.embed_dim)
    assert retriever.encode_texts("a house").shape[0] == retriever.encode_images(PICTURES[0]).shape[0] == 1
    assert retriever.similarity(retriever.encode_texts([]), retriever.encode_images(PICTURES)).shape == (
        0,
        len(PICTURES),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda retriever: retriever.encode_texts([5]), "expected .*str"),
        (lambda retriever: retriever.encode_texts(5), "expected texts to be a list, got 5"),
        (lambda retriever: retriever.encode_images(5), "expected images to be a list, got 5"),
        (lambda retriever: retriever.encode_texts(["a"], batch_size=0), "expected batch_size of at least 1"),
        (lambda retriever: retriever.similarity([1], [2]), "expected queries as a tensor or an array"),
        (
            lambda retriever: retriever.similarity(np.array(["a"]), ROWS),
            "expected queries of floating-point numbers, got <U1",
        ),
        (lambda retriever: retriever.search_embeddings(ROWS.int()), r"of floating-point numbers, got torch\.int32"),
        (
            lambda retriever: retriever.search_embeddings(5 * ROWS),
            r"expected rows of length 1, got 5 \(query 0, row 0\); normalize",
        ),
        (
            lambda retriever: retriever.search_embeddings(ROWS[:, :0]),
            r"expected queries \[Q, L, 48\] of one row or more, got \[2, 0, 48\]",
        ),
        (lambda retriever: retriever.similarity(torch.zeros(2, 3), torch.zeros(2, 3)), "expected"),
    ],
)
def test_what_cannot_be_embedded_or_compared_is_refused(
    build: Callable[..., Retriever], call: Callable[[Retriever], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(build())


ROWS = torch.nn.functional.normalize(torch.ones(2, 4, 48), dim=-1)


@pytest.mark.filterwarnings("error")
def test_embeddings_come_from_any_array(retriever: Retriever) -> None:
    add_all(retriever)
    tensor = retriever.encode_images(PICTURES)
    array = tensor.numpy()
    frozen = array.copy()
    frozen.flags.writeable = False
    for queries in (
        array[::-1][::-1],
        array[::-1],
        array.astype(">f4"),
        array.astype(np.float64),
        frozen,
        tensor.double(),
    ):
        expected = [f"picture {n}" for n in range(len(PICTURES))]
        backwards = isinstance(queries, np.ndarray) and queries.strides[0] < 0
        ids = [hits[0].id for hits in retriever.search_embeddings(queries)]
        assert ids == (expected[::-1] if backwards else expected)
        assert retriever.similarity(queries, array).argmax(dim=1).tolist() == [int(name.split()[1]) for name in ids]


def test_several_queries_come_in_any_iterable(retriever: Retriever) -> None:
    add_all(retriever)
    expected = retriever.search(["night", "a blue bus"])
    for texts in (
        iter(["night", "a blue bus"]),
        np.array(["night", "a blue bus"]),
        {"night": 0, "a blue bus": 0}.keys(),
    ):
        assert retriever.search(texts) == expected
    pictures = [np.asarray(image) for image in PICTURES[:2]]
    for images in (iter(PICTURES[:2]), np.stack(pictures)):
        assert [hits[0].id for hits in retriever.search(image=images)] == ["picture 0", "picture 1"]
    assert retriever.search(image=pictures[1])[0].id == "picture 1", "an array of one picture"
    with pytest.raises(InputError, match=r"expected text to be a list, got {'night': 0}"):
        retriever.search({"night": 0})


@pytest.mark.parametrize("missing", ["photoss/", "photoss/a.jpg", "", Path("photoss")])
def test_a_path_to_nothing_is_an_error(retriever: Retriever, missing: str | Path) -> None:
    with pytest.raises(InputError, match=r"expected a folder or a picture, got nothing there: .*; check the path"):
        retriever.add_images(missing, progress=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda retriever: retriever.add_folder(None), "expected folder to be a path, got None"),
        (lambda retriever: retriever.add_table(None), "expected table to be a path, got None"),
        (lambda retriever: retriever.add_table("a.csv", root=3), "expected root to be a path, got 3"),
        (
            lambda retriever: retriever.add_texts({"a": 1}),
            r"got a dict; pass list\(texts\.values\(\)\) with ids=list\(texts\)",
        ),
        (
            lambda retriever: retriever.add_images(PICTURES, progress="yes"),
            "expected progress as True, False or a tqdm bar",
        ),
        (lambda retriever: setattr(retriever, "alpha", 5), r"expected alpha in \[0, 1\], got 5"),
        (lambda _: Retriever(""), "expected checkpoint to be a path, got ''"),
        (lambda _: Retriever(index=""), "expected index to be a path, got ''; the working folder is '.'"),
        (lambda _: Retriever(device="foo"), "device='foo' cannot be used: .*; use device='cpu', or leave it out"),
        (lambda _: Retriever(device="meta"), "expected device to be 'cpu', .*, got 'meta'"),
        (lambda _: Retriever.open(None), "expected index to be a path, got None"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(
    retriever: Retriever, call: Callable[[Retriever], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(retriever)
    assert len(retriever) == 0


def test_alpha_can_be_changed(retriever: Retriever) -> None:
    retriever.alpha = 0.25
    assert retriever.alpha == 0.25
    retriever.alpha = None
    assert retriever.alpha == retriever.engine.alpha


def test_a_closed_retriever_is_not_entered(retriever: Retriever) -> None:
    retriever.close()
    with pytest.raises(StoreError, match="the index is closed: its items were in memory"), retriever:
        pass


def test_an_index_of_another_format_says_so(build: Callable[..., Retriever], tmp_path: Path) -> None:
    build(index=tmp_path / "index")
    with pytest.raises(StoreError, match="stores float16, got dtype='int8': leave dtype out"):
        build(index=tmp_path / "index", dtype="int8")


def test_a_hit_without_a_picture_is_not_explained(retriever: Retriever) -> None:
    retriever.add_texts(["a house"], progress=False)
    with pytest.raises(
        InputError, match="expected a hit with a picture file, got 'text-0', which has none; pass the picture"
    ):
        retriever.explain(retriever.search("a house")[0], "a house")


def test_the_advice_on_moved_pictures_is_python_for_an_index_in_memory(retriever: Retriever, tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    PICTURES[0].save(tmp_path / "before" / "a.png")
    retriever.add_folder(tmp_path / "before", progress=False)
    (hit,) = retriever.search("a house")
    (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(InputError, match=r"where the pictures lie now: index\.root = FOLDER"):
        retriever.explain(hit, "a house")
    retriever.index.root = tmp_path / "after"
    assert retriever.explain(retriever.search("a house")[0], "a house")


def test_a_retriever_says_what_it_is_and_closes(build: Callable[..., Retriever], tmp_path: Path) -> None:
    with build(index=tmp_path / "index") as retriever:
        retriever.add_images(PICTURES, progress=False)
        assert repr(retriever) == f"<Retriever of {retriever.index!r} by {retriever.engine}>"
        assert f"{len(PICTURES)} items" in repr(retriever)
    with pytest.raises(StoreError, match="the index is closed"):
        retriever.search("a house")
    assert "closed" in repr(retriever)


def test_hits_come_as_hits(build: Callable[..., Retriever]) -> None:
    retriever = build()
    retriever.add_images(PICTURES, progress=False)
    assert isinstance(retriever.search("a house"), Hits)
    assert all(isinstance(hits, Hits) for hits in retriever.search(image=PICTURES[:2]))


def test_a_folder_is_added_and_goes_on(build: Callable[..., Retriever], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, picture in enumerate(PICTURES):
        picture.save(photos / f"{number}.png")
    (photos / "notes.txt").touch()
    with build(index=photos / "index") as retriever:
        report = retriever.add_folder(photos, progress=False)
        assert (report.added, [name for name, _ in report.skipped]) == (len(PICTURES), [str(photos / "notes.txt")])
        assert retriever.add_folder(photos, progress=False).added == 0
        with pytest.raises(InputError, match="no such folder"):
            retriever.add_folder(tmp_path / "missing")
        with pytest.raises(InputError, match="expected a folder, got the file"):
            retriever.add_folder(photos / "0.png")
