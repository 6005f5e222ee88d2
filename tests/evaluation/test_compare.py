"""Comparison of evaluations, in Python and by command."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.cli import main
from finelip_fast.errors import FineLIPError, InputError, WriteError
from finelip_fast.evaluation import Evaluation, Row, Sweep, compare, read_evaluation

SHARED = [0] * 5 + [1] * 5  # ten captions of two pictures


def result(
    path: Path,
    ranks: list[int],
    *,
    i2t: list[int] | None = None,
    picture_of: list[int] | None = None,
    context_lengths: tuple[int, ...] = (256,),
    sweep: Sweep | None = None,
    **changes: Any,
) -> Path:
    """Write an evaluation with these ranks of captions, and of pictures if there are fewer of them."""
    owners = picture_of or list(range(len(ranks)))
    ranks_by_direction = {"i2t": torch.tensor(i2t or ranks), "t2i": torch.tensor(ranks)}
    about = {
        "data": "some",
        "checkpoint": "models/ours",
        "checkpoint_fingerprint": "f",
        "engine": "torch",
        "precision": "fp32",
        "device": "cpu",
        "version": "0",
        "pairs_fingerprint": "same",
    }
    Evaluation(
        **(about | changes),
        pictures=len(ranks_by_direction["i2t"]),
        pairs=len(ranks),
        picture_of=owners,
        alpha=0.8,
        sweep=sweep,
        rows=[Row.of(length, "combined", ranks_by_direction, torch.tensor(owners)) for length in context_lengths],
        image_seconds=1.0,
        text_seconds=1.0,
    ).save(path)
    return path


def test_a_difference_is_tested_query_by_query(tmp_path: Path) -> None:
    a = result(tmp_path / "a.json", [1] * 10 + [2] * 10)
    b = result(tmp_path / "b.json", [1] * 20, engine="onnx")
    first, second = compare([a, b]).rows
    assert (first["run"], first["against"], first["i2t_p"], first["t2i_interval"]) == ("a", None, None, None)
    assert (second["run"], second["engine"], second["against"], second["t2i_recall@1"]) == ("b", "onnx", 256, 1.0)
    assert second["i2t_p"] == second["t2i_p"] == pytest.approx(2 / 2**10)  # ten against none
    assert second["i2t_difference"] == 0.5
    assert second["i2t_interval"] == pytest.approx((0.28, 0.72), abs=0.05)
    assert compare([b, a]).rows[1]["i2t_difference"] == -0.5


def test_captions_of_one_picture_are_no_evidence_of_their_own(tmp_path: Path) -> None:
    a = result(tmp_path / "a.json", [2] * 10, i2t=[1, 2], picture_of=SHARED)
    b = result(tmp_path / "b.json", [1] * 5 + [2] * 5, i2t=[1, 1], picture_of=SHARED)
    row = compare([a, b]).rows[1]
    assert row["t2i_p"] is None
    assert row["t2i_difference"] == 0.5
    assert row["t2i_interval"] == (0.0, 1.0)  # resampled by picture; ten separate captions would give about 0.2 to 0.8
    assert row["i2t_p"] == 1.0


def test_the_row_of_the_same_context_is_the_baseline_or_that_of_the_longest(tmp_path: Path) -> None:
    a = result(tmp_path / "a.json", [1, 2], context_lengths=(77, 128, 248))
    b = result(tmp_path / "b.json", [1, 1], context_lengths=(77, 256))
    assert [row["against"] for row in compare([a, b]).rows] == [None, None, None, 77, 248]


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    files = [result(tmp_path / name / "result.json", [1, 2]) for name in "ab"]
    assert [row["run"] for row in compare(files).rows] == [str(file) for file in files]


def test_the_command_prints_three_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(result(tmp_path / f"{name}.json", ranks)) for name, ranks in (("a", [1, 2]), ("b|c", [1, 1]))]
    assert main(["eval", "compare", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [
        *("a", "ours", "torch", "fp32", "256", "combined"),
        *("50.0", "100.0", "100.0", "75.0") * 2,
    ]
    assert lines[-1].split()[:6] == ["b|c", "256", "combined", "context", "256", "+50.0"]
    assert max(map(len, lines)) <= 120
    assert main(["eval", "compare", *files, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("|---|")
    assert lines[2].startswith("|a|models/ours|torch fp32|256|combined|50.0|")
    assert lines[3].startswith(r"|b\|c|")
    assert {line.replace(r"\|", "").count("|") for line in lines[:4]} == {14}
    for form in (["--json"], ["--json", "--markdown"]):
        assert main(["eval", "compare", *files, *form]) == 0
        comparison = json.loads(capsys.readouterr().out)
        assert comparison["data"] == "some"
        assert comparison["rows"][1]["t2i_p"] == 1.0


def test_evaluations_are_compared_as_they_were_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", "scenes:test:8", "--quiet", "--engine", "torch"]
    short, long = str(tmp_path / "short.json"), str(tmp_path / "long.json")
    assert main([*command, "--context-lengths", "77", "--save", short]) == 0
    assert main([*command, "--validation", "scenes:val:8", "--save", long]) == 0
    assert "validation pairs scenes:val:8" in capsys.readouterr().out
    assert main(["eval", "compare", short, long]) == 0
    output = capsys.readouterr().out
    assert "long" in output
    assert "bundled" in output


def test_a_place_to_write_to_is_looked_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (tmp_path, tmp_path / "missing" / "result.json"):
        assert main(["eval", "scenes:test:8", "--checkpoint", "missing", "--save", str(out)]) == 2
        assert "expected --save as a file in an existing folder" in capsys.readouterr().err


def test_what_was_measured_is_told_where_it_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise WriteError(28, "cannot write result.json: No space left on device")

    monkeypatch.setattr(Evaluation, "save", full)
    command = ["eval", "scenes:test:8", "--quiet", "--engine", "torch", "--save", str(tmp_path / "result.json")]
    assert main(command) == 2
    printed = capsys.readouterr()
    assert "i2t R@1" in printed.out
    assert "No space left on device" in printed.err


def test_what_cannot_be_compared_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, other_result = result(tmp_path / "a.json", [1]), result(tmp_path / "b.json", [1, 1], pairs_fingerprint="other")
    (tmp_path / "c.json").write_text("{}")
    for files, message in (
        (
            [a, other_result],
            "some (2 pictures, 2 captions) and some (1 pictures, 1 captions): the numbers of pictures differ",
        ),
        ([a], "at least two"),
        ([a, tmp_path / "c.json"], "expected a result of finelip eval"),
        ([a, tmp_path / "none.json"], "cannot read"),
    ):
        assert main(["eval", "compare", *map(str, files)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("picture_of", "message"),
    [
        ([0, 1, 1], "captions belong to other pictures"),
        ([0, 0, 1], "captions, names of pictures or their order differ"),
    ],
)
def test_what_differs_is_said(tmp_path: Path, picture_of: list[int], message: str) -> None:
    a = result(tmp_path / "a.json", [1, 1, 1], i2t=[1, 1], picture_of=[0, 0, 1])
    b = result(tmp_path / "b.json", [1, 1, 1], i2t=[1, 1], picture_of=picture_of, pairs_fingerprint="other")
    with pytest.raises(InputError, match=message):
        compare([a, b])


def test_a_result_with_ranks_cut_off_is_refused(tmp_path: Path) -> None:
    a = result(tmp_path / "a.json", [1, 2])
    values = json.loads(a.read_text())
    values["rows"][0]["t2i_ranks"].pop()
    (tmp_path / "b.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"b\.json.*ranks of .* queries"):
        compare([a, tmp_path / "b.json"])


METRICS = {f"{way}_{name}": 0.5 for way in ("i2t", "t2i") for name in ("recall@1", "mrr")}
SWEEP = Sweep("other", "fingerprint", 20, 256, [{"alpha": alpha, **METRICS} for alpha in (0.8, 1)])


def test_a_sweep_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = result(tmp_path / "a.json", [1, 2, 3], sweep=SWEEP)
    assert read_evaluation(path).sweep == SWEEP


@settings(settings.get_profile("fuzz"))
@given(st.data())
def test_a_damaged_result_is_refused_or_right(tmp_path: Path, damage_json: Any, data: st.DataObject) -> None:
    sound = result(tmp_path / "sound.json", [1, 2, 3, 2], picture_of=[0, 0, 1, 2], i2t=[1, 2, 4], sweep=SWEEP)
    sound_values = json.loads(sound.read_text())
    path = tmp_path / "damaged.json"
    path.write_bytes(damage_json(data, sound_values))
    try:
        evaluation = read_evaluation(path)
    except InputError as error:
        message = str(error)
    else:
        for row, before in zip(evaluation.rows, read_evaluation(sound).rows, strict=True):
            assert row.metrics == pytest.approx(before.metrics)
        evaluation.save(path)
        assert read_evaluation(path) == evaluation
        with suppress(FineLIPError):  # if the pairs differ
            compared = compare([path, sound])
            assert len(str(compared).splitlines()) <= 6
            assert len(compared.markdown().splitlines()) <= 8
        return
    assert message.startswith((f"{path}: expected ", f"cannot read {path}: "))
    assert len(message) < 1000


def edit(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 2}, r"alpha in \[0, 1\], found 2"),
        ({"alpha": True}, "a finite number as alpha, found True"),
        ({"pictures": 10**12}, "picture_of with each of the 1000000000000 pictures, found 3"),
        ({"picture_of": [0, 0, 0]}, "each of the 3 pictures, found 1"),
        ({"rows": []}, r"expected rows, found \[\]"),
        ({"rows": [5]}, r"an object as rows\[0\], found 5"),
        ({"rows": {}}, r"a list as rows, found \{\}"),
        ({"image_seconds": -1}, "times of at least 0 s"),
        ({"data": "a" * 10 + "\ud800"}, "half of a surrogate pair"),
        ({"engine": None}, "a text as engine, found None"),
        ({"unheard": 1}, "an unknown field 'unheard'"),
    ],
)
def test_a_value_that_no_evaluation_has_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = edit(result(tmp_path / "a.json", [1, 2, 3]), **changes)
    with pytest.raises(InputError, match=rf"a\.json: expected a result of finelip eval .*{message}"):
        read_evaluation(path)


def test_a_field_under_an_earlier_name_is_refused_with_the_name_it_has_now(tmp_path: Path) -> None:
    path = result(tmp_path / "a.json", [1, 2, 3])
    [row] = json.loads(path.read_text())["rows"]
    edit(path, rows=[{"context": row.pop("context_length")} | row])
    with pytest.raises(InputError, match=r"no field 'context_length' in rows\[0\]\); run the evaluation again"):
        read_evaluation(path)


def test_numbers_that_do_not_follow_from_the_ranks_are_refused(tmp_path: Path) -> None:
    path = result(tmp_path / "a.json", [1, 2, 3])
    [row] = json.loads(path.read_text())["rows"]
    edit(path, rows=[row | {"t2i_recall@1": 0.9}])
    with pytest.raises(InputError, match="metrics that follow from the ranks"):
        read_evaluation(path)


def test_runs_that_claim_the_same_pairs_must_have_them(tmp_path: Path) -> None:
    a = result(tmp_path / "a.json", [1, 2, 3])
    b = result(tmp_path / "b.json", [1, 2, 3], picture_of=[0, 2, 1])
    with pytest.raises(InputError, match="captions belong to other pictures"):
        compare([a, b])


def test_names_in_a_comparison_are_shown_and_not_obeyed(tmp_path: Path) -> None:
    a = result(tmp_path / "a.json", [1, 2, 3], checkpoint="x|y\n|forged|\x1b[2J<script>")
    b = result(tmp_path / "b.json", [1, 2, 3], data="caf\udce9", checkpoint="[a](javascript:b)")
    table = compare([a, b])
    assert len(str(table).splitlines()) == 6
    assert "\x1b" not in str(table) + table.markdown()
    assert r"x\|y\\n\|forged\|" in table.markdown()
    assert r"[a]\(javascript:b)" in table.markdown()
    assert read_evaluation(b).data == "caf?"
