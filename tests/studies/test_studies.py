"""Each study on a few scenes: its results can be checked, and its command writes a table and a plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finelip_fast import checkpoint
from finelip_fast.cli import main
from finelip_fast.cli.study import NAMES
from finelip_fast.engines import Engine, open_engine
from finelip_fast.errors import EngineError, InputError
from finelip_fast.model import FineLIP
from finelip_fast.runtimes.onnx import OnnxGraph
from finelip_fast.studies import STUDIES, Setting
from finelip_fast.studies.noise import NOISES, irrelevant, sentences
from finelip_fast.studies.overhead import clip_alone
from finelip_fast.studies.setting import Pairs, medians_ms, peak_memory
from finelip_fast.studies.tokens import most_matched

CAPTION = "A red house stands on the left. It has three floors. A dog sits there! Is it black? Yes."
FEW = Setting("scenes:test:16", "scenes:val:8", progress=False)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return open_engine("torch", None)


def test_every_study_has_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(NAMES) == {*STUDIES, "ablation", "adaptation", "drawing", "generation"}
    assert main(["study"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == list(NAMES)


def test_only_overhead_builds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "length", "--build"]) == 2
    assert "got length" in capsys.readouterr().err


def test_length_reads_more_and_finds_more(engine: Engine) -> None:
    record = STUDIES["length"].run(engine, Setting("scenes:test:40", progress=False))
    rows = record.tables[0].rows
    assert [row["tokens"] for row in rows] == ["77", "128", "192", "256"]
    assert [row["read (%)"] for row in rows] == sorted(row["read (%)"] for row in rows)
    assert rows[-1]["read (%)"] == 100
    assert rows[-1]["combined t2i R@1 (%)"] > rows[0]["combined t2i R@1 (%)"] + 20
    assert all(row["captions/s"] > 0 and row["1 caption (ms)"] > 0 for row in rows)
    for series in record.plots[0].series:
        assert series.low
        assert series.high
        assert all(low <= y <= high for low, y, high in zip(series.low, series.y, series.high, strict=True))


def test_long_captions_are_read_in_windows(engine: Engine) -> None:
    record = STUDIES["beyond"].run(engine, Setting("scenes:very_long:8", progress=False))
    assert [row["captions are"] for row in record.tables[0].rows] == ["cut at 77", "cut at 256", "windows"]
    assert [row["read (%)"] for row in record.tables[0].rows][-1] == 100
    assert record.finding.startswith("8 of 8 captions are longer than 256 tokens")
    with pytest.raises(ValueError, match="more than 256 tokens"):
        STUDIES["beyond"].run(engine, FEW)


def test_noise_loses_recall_and_names_the_worst(engine: Engine) -> None:
    record = STUDIES["noise"].run(engine, FEW)
    rows = {row["captions"]: row for row in record.tables[0].rows}
    assert set(rows) == {*NOISES, *(f"{count} of other captions added" for count in (1, 2, 4))}
    assert rows["a quarter dropped"]["combined t2i R@1 (%)"] <= rows["clean"]["combined t2i R@1 (%)"]
    assert rows["4 of other captions added"]["cut at the context"] >= rows["clean"]["cut at the context"]


def test_standing_out_tells_what_is_there_from_what_is_not(engine: Engine) -> None:
    record = STUDIES["standing-out"].run(engine, Setting("scenes:test:80", "scenes:val:80", progress=False))
    (nothing_alike, alike) = record.tables[0].rows[-2:]
    assert nothing_alike["z relative to chance"] > 0.85
    assert alike["score (flat cut-off)"] < nothing_alike["score (flat cut-off)"]
    with pytest.raises(InputError, match="50 pictures to search"):
        STUDIES["standing-out"].run(engine, FEW)


def test_noises_do_what_they_say() -> None:
    statements = sentences(CAPTION)
    assert len(statements) == 5
    spoilt = {name: change(CAPTION, Random(1)) for name, change in NOISES.items()}
    assert spoilt["clean"] == CAPTION
    assert len(sentences(spoilt["a quarter dropped"])) == 4
    assert len(sentences(spoilt["a quarter repeated"])) == 6
    assert sorted(sentences(spoilt["shuffled"])) == sorted(statements)
    assert spoilt["lower case, no punctuation"] == " ".join(
        CAPTION.lower().translate(str.maketrans(".!?", "   ")).split()
    )
    assert NOISES["lower case, no punctuation"]("A two-storey house", Random(1)) == "a two storey house"
    mixed = NOISES["typos"]("elephants " * 100, Random(1)).split()
    assert 0 < sum(word != "elephants" for word in mixed) < 30
    assert all(sorted(word) == sorted("elephants") and word[0] == "e" for word in mixed)
    extended = irrelevant([CAPTION, "Of the same picture.", "Nothing to see."], [0, 0, 1], 0, 2, Random(1))
    assert [sentence for sentence in sentences(extended) if sentence != "Nothing to see."] == statements
    assert len(sentences(extended)) == 7
    with pytest.raises(ValueError, match="pairs of at least 2 pictures"):
        irrelevant([CAPTION, "Of the same picture."], [0, 0], 0, 1, Random(1))
    for change in NOISES.values():
        assert change("one", Random(1)) in ("one", "one one")
        assert isinstance(change("", Random(1)), str)


def test_fewer_tokens_take_fewer_bytes(engine: Engine) -> None:
    record = STUDIES["tokens"].run(engine, FEW)
    rows = record.tables[0].rows
    assert [row["aggregated tokens"] for row in rows] == 2 * [0, 1, 2, 4, 8, 12]
    half, small = rows[5], rows[-1]
    # Two-byte tokens, and the global row in int8 with its scale.
    assert half["bytes an item"] >= 13 * 128 * 2 + 128
    assert small["bytes an item"] < half["bytes an item"] - 1000  # for 16 items, whose files also have headers
    assert half["t2i R@1 (%)"] > 75


def test_overhead_counts_what_is_added(engine: Engine) -> None:
    record = STUDIES["overhead"].run(engine, FEW)
    clip77, clip256, atrm = record.tables[0].rows[:3]
    assert [clip77["tokens"], clip256["tokens"]] == [77, 256]
    assert clip77["parameters (M)"] < clip256["parameters (M)"] < atrm["parameters (M)"]
    assert clip256["parameters (M)"] - clip77["parameters (M)"] == pytest.approx(179 * 128 / 1e6, abs=1e-3)
    assert [row["pictures"] for row in record.tables[1].rows] == [1_000, 10_000]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("int8", 0.1)])
def test_overhead_takes_clip_out_of_exported_graphs(
    make_model: Callable[..., FineLIP],
    make_captions: Callable[..., Tensor],
    tmp_path: Path,
    precision: str,
    tolerance: float,
) -> None:
    pytest.importorskip("onnxruntime")
    from finelip_fast.export.to_onnx import export_onnx

    model = make_model()
    checkpoint.save(model, tmp_path)
    folder = export_onnx(tmp_path, precision=precision, data="scenes:test:8", progress=False)
    graphs = [OnnxGraph(clip_alone(folder / f"{side}.onnx"), torch.device("cpu")) for side in ("image", "text")]
    side = model.config.image_size
    inputs = [torch.randn(3, 3, side, side), make_captions([9, 4], 9)]
    with torch.inference_mode():
        embeddings = [model.encode_image(inputs[0]), model.encode_text(inputs[1])]
    for graph, batch, rows in zip(graphs, inputs, embeddings, strict=True):
        torch.testing.assert_close(F.normalize(graph(batch).flatten(1), dim=-1), rows[:, 0], atol=tolerance, rtol=0)
    record = STUDIES["overhead"].run(open_engine("torch", tmp_path), FEW)
    models = [(row["model"], row["engine"]) for row in record.tables[0].rows]
    assert models == [
        (name, engine) for engine in ("torch fp32", f"onnx {precision}") for name in ("CLIP", "CLIP", "CLIP + ATRM")
    ]


def test_overhead_insists_on_building_what_runs_everywhere(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, bool]] = []

    def refuse(name: str, *_: object, precision: str, build: bool) -> Engine:
        opened.append((f"{name} {precision}", build))
        if (name, precision) == ("onnx", "fp32") and len(opened) == 1:
            return engine
        raise EngineError("not here")

    monkeypatch.setattr(
        sys.modules[clip_alone.__module__], "open_engine", refuse
    )  # the module is shadowed by its function
    STUDIES["overhead"].run(engine, replace(FEW, build=True))
    assert [name for name, build in opened if build] == ["onnx fp32", "onnx int8"]
    with pytest.raises(EngineError, match="not here"):
        STUDIES["overhead"].run(engine, replace(FEW, build=True))


def test_untrained_aggregators_are_not_ranked_by(engine: Engine) -> None:
    pairs = FEW.embed(engine)
    result = pairs.measure(engine.embed_texts(pairs.captions), 1.0)
    assert result.main == "global"
    assert list(result.row()) == [f"global {way} R@{k} (%)" for way in ("i2t", "t2i") for k in (1, 5, 10)]


@pytest.mark.parametrize("name", ["tokens", "overhead", "pointing"])
def test_studies_of_aggregators_refuse_untrained_ones(
    name: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "config", engine.config.replace(trained_aggregators=False))
    with pytest.raises(InputError, match="expected a checkpoint with trained aggregators"):
        STUDIES[name].run(engine, FEW)


def test_rows_are_kept_in_order_of_wins_on_either_side() -> None:
    """Each row of the caption matches its own row; row 2 of the picture also matches row 3."""
    images, texts = torch.eye(4)[None], torch.eye(4)[None].clone()
    texts[0, 3] = torch.tensor([0.0, 0.0, 2.0, 3.0])
    assert most_matched(Pairs([""], torch.tensor([0]), images), texts).tolist() == [0, 3, 1, 2]


def test_what_is_compared_is_timed_in_turns() -> None:
    calls: list[str] = []
    medians_ms([lambda: calls.append("a"), lambda: calls.append("b")], 3)
    assert calls == ["a", "b"] * 5


def test_memory_is_seen_that_was_used_and_kept_before() -> None:
    for _ in range(2):
        with peak_memory() as peaks:
            blocks = [torch.ones(1 << 12) for _ in range(4000)]
            assert len(blocks) == 4000
            del blocks
        if not torch.cuda.is_available():
            assert 30 < peaks[0] < 200  # 62 MiB in small blocks


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["study", "pointing", "--data", "scenes:val:4", "--quiet", "--out", str(tmp_path)]
    assert main(command) == 0
    assert "raw tokens (%)" in capsys.readouterr().out
    stored = json.loads((tmp_path / "pointing.json").read_text())
    assert stored["tables"][0]["rows"][0]["phrases of"] == "all"
    assert stored["command"] == f"finelip study pointing --data scenes:val:4 --quiet --out {tmp_path.name}"
    assert {"commit", "dirty", "machine", "versions", "date"} <= set(stored)
    page = (tmp_path / "pointing.md").read_text()
    assert "|all|" in page
    assert "](pointing-hits.png)" in page
    assert (tmp_path / "pointing-hits.png").stat().st_size > 1000
    assert main(["study", "noise", "--data", "scenes:test:0", "--quiet", "--out", str(tmp_path)]) == 2
    assert "expected pairs to study" in capsys.readouterr().err
