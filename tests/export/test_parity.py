"""The parity gate: the model's own graphs pass in every precision, and broken ones fail for the right reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto, numpy_helper
from PIL import Image

from finelip_fast.encoders import caption_lengths
from finelip_fast.errors import EngineError, InputError
from finelip_fast.export import graphs, parity, precision, quantize
from finelip_fast.model import FineLIP


def in_precision(proto: ModelProto, name: str) -> ModelProto:
    if name == "int8":
        return quantize.by_rows(proto)
    return precision.in_half(proto, name) if name in precision.HALF else proto


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_what_the_model_gives_passes(prove, protos, name):
    image, text = (in_precision(protos[graph], name) for graph in ("image", "text"))
    report = prove(image, text, name, image_uint8=in_precision(protos["image_uint8"], name), scorer=protos["scorer"])
    assert report.passed, report.failures
    assert report.summary()["passed"] is True
    assert {(case.name, case.batch, case.length) for case in report.cases} == {
        *(("image", batch, 0) for batch in (1, 7, 64)),
        *(("text", batch, length) for batch in (1, 7, 64) for length in (3, 40)),
    }


def test_bfloat16_passes_as_hardware_would_round_it(prove, protos):
    image, text = (precision.rounding_twin(precision.in_half(protos[name], "bf16")) for name in ("image", "text"))
    report = prove(image, text, "bf16")
    measured = [check for check in report.checks if "weights" not in check.name]  # the twin's weights are float32
    assert all(check.passed for check in measured), report.failures


def test_a_frozen_batch_is_refused(prove, protos):
    image = copy.deepcopy(protos["image"])
    image.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    report = prove(image, protos["text"])
    assert report.failures == ["image: interface: pixels: axis 0 (batch) is frozen at 2, expected any size"]
    assert not report.cases, "files that are wrong are not run"


@pytest.mark.parametrize(("offset", "words"), [(-1, "1 position(s) before"), (1, "1 position(s) after")])
def test_an_end_token_off_by_one_is_refused(prove, protos, model, monkeypatch, offset, words):
    def lengths(ids, end_token):
        return (caption_lengths(ids, end_token) + offset).clamp(min=0, max=ids.shape[1])

    monkeypatch.setattr("finelip_fast.model.caption_lengths", lengths)
    text = graphs.build(model, "text")
    monkeypatch.undo()
    report = prove(protos["image"], text)
    assert f"text: largest error: row 0 comes from {words} the end token (" in report.failures[0]
    assert not [failure for failure in report.failures if failure.startswith("image")]


def test_an_overflow_is_refused(make_model):
    """The weights suit float32, but their products overflow float16."""
    wild = make_model(context_length=40, embed_dim=128, vision_width=128, text_width=128)
    with torch.no_grad():
        wild.text.transformer.resblocks[0].mlp.c_fc.weight.mul_(1e5)
        wild.text.transformer.resblocks[0].mlp.c_proj.weight.mul_(1e-5)
    wild_reference = parity.Reference(wild, "scenes:test:70", progress=False)
    from finelip_fast.runtimes.onnx import OnnxGraph

    halves = {name: precision.in_half(graphs.build(wild, name), "fp16") for name in ("image", "text")}
    twins = {name: precision.rounding_twin(proto) for name, proto in halves.items()}
    run = {name: OnnxGraph(proto.SerializeToString(), torch.device("cpu")) for name, proto in twins.items()}
    report = parity.prove(wild_reference, parity.Encoders(run["image"], run["text"], graphs=halves), "fp16")
    assert report.failures[0].startswith("text: finite: "), report.failures
    (failure,) = report.failures
    assert "rows hold NaN or infinity: a number exceeds the range of the precision" in failure


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_one_changed_weight_is_refused(prove, protos, name):
    image = copy.deepcopy(in_precision(protos["image"], name))
    weight = max(image.graph.initializer, key=lambda tensor: np.prod(tensor.dims))
    values = numpy_helper.to_array(weight).copy()
    values.flat[5] += 1
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    report = prove(image, in_precision(protos["text"], name), name)
    (failure,) = report.failures
    assert failure.startswith("image: weights: ")
    assert "differs from visual.transformer.resblocks." in failure
    assert f"in 1 of {values.size:,} values, by up to 1" in failure


def test_answers_that_hang_on_company_are_refused(reference, model):
    """All values are within the limits, but depend on the batch."""

    def by_place(pixels):
        rows = model.encode_image(pixels)
        rows[:, 0, 0] += 4e-5 * (torch.arange(len(rows)) % 2)
        return rows

    report = parity.prove(reference, parity.Encoders(by_place, model.encode_text), "fp32")
    assert report.failures == ["image: company: alone and in a batch, at any padding (4e-05, limit 1e-05)"]

    def by_repetition(pixels):
        rows = model.encode_image(pixels)
        rows[4:, 0, 0] += 4e-5 * (len(rows) == 8)
        return rows

    report = parity.prove(reference, parity.Encoders(by_repetition, model.encode_text), "fp32")
    assert report.failures == ["image: identical rows: the same item four times in a batch (4e-05, limit 1e-05)"]


def test_a_ranking_that_changes_is_refused(reference, model, monkeypatch):
    """Every other limit allows the error, which always favours one picture."""
    limits = parity.Limits(largest=2, mean=2, cosine=-1, company=2, agreement=0.9, recall=1)
    monkeypatch.setitem(parity.LIMITS, "int8", limits)
    favourite = reference.texts.mean(dim=0)

    def image(pixels):
        rows = model.encode_image(pixels)
        chosen = (pixels == reference.pixels[5]).flatten(1).all(dim=1)
        rows[chosen] = torch.nn.functional.normalize(favourite, dim=-1)
        return rows

    report = parity.prove(reference, parity.Encoders(image, model.encode_text), "int8")
    (failure,) = report.failures
    assert failure.startswith("ranking: same best: of queries (0.")


def test_an_encoder_that_fails_is_a_refusal(reference, model):
    def image(pixels):
        raise EngineError("out of memory")

    report = parity.prove(reference, parity.Encoders(image, model.encode_text), "fp32")
    assert report.failures == ["runs: out of memory"]


def test_every_length_is_asked(reference):
    lengths = [int(n) for ids, _ in reference.every_length for n in caption_lengths(ids)]
    assert lengths == list(range(41))
    widths = [ids.shape[1] for ids, _ in reference.every_length]
    assert widths[-1] == 40
    assert set(reference.full) == {3, 40}
    for length, (ids, _) in reference.full.items():
        assert ids.shape == (64, length)
        assert (caption_lengths(ids) == length).all()


def test_the_report_is_written_for_people_and_programs(prove, protos, tmp_path: Path):
    report = prove(protos["image"], protos["text"])
    report.write(tmp_path)
    values = json.loads((tmp_path / "parity.json").read_text())
    assert values["passed"] is True
    assert values["limits"]["cosine"] == parity.LIMITS["fp32"].cosine
    assert len(values["cases"]) == 9
    text = (tmp_path / "parity.md").read_text()
    assert text.startswith("# Parity, fp32: passed")
    assert "|text, 64|40|" in text


def test_reports_of_two_devices_are_one(reference, model):
    encoders = parity.Encoders(model.encode_image, model.encode_text)
    cpu_report, gpu_report = (parity.prove(reference, encoders, "fp32", on=on) for on in ("CPU", "a GPU"))
    combined_report = cpu_report.also(gpu_report)
    assert combined_report.passed
    assert combined_report.facts["on"] == "CPU, a GPU"
    assert [check.name for check in combined_report.checks[-1:]] == ["a GPU: ranking: recall@1"]
    gpu_report.checks[-1] = parity.Check("ranking: recall@1", False, "worse")
    assert cpu_report.also(gpu_report).failures == ["a GPU: ranking: recall@1: worse"]


def test_limits_loosen_with_the_precision():
    columns = zip(*(parity.LIMITS[name] for name in ("fp32", "fp16", "bf16", "int8", "int8-calibrated")), strict=True)
    for name, column in zip(parity.Limits._fields, columns, strict=True):
        assert list(column) == sorted(column, reverse=name in ("cosine", "agreement"))


def test_captions_without_a_word_can_be_held_out(model, tmp_path: Path):
    lines = []
    for number in range(2):
        Image.new("RGB", (40, 40), (90 * number, 0, 0)).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": ""}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    reference = parity.Reference(model, f"jsonl:{tmp_path / 'pairs.jsonl'}", progress=False)
    assert (caption_lengths(reference.full[40][0]) == 40).all()


def test_the_documentation_states_the_limits():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "export.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    stated = {cells[0].strip("`"): cells[2:] for cells in rows if len(cells) == 6}
    assert set(stated) == set(parity.LIMITS)
    for name, limits in parity.LIMITS.items():
        largest, cosine, agreement, points = stated[name]
        assert (float(largest), float(cosine)) == (limits.largest, limits.cosine)
        assert float(agreement.split()[0]) == pytest.approx(100 * limits.agreement)
        assert float(points.split()[0]) == pytest.approx(100 * limits.recall)


def test_too_few_pairs_are_refused(model: FineLIP):
    with pytest.raises(InputError, match="expected at least two held-out pairs, got 1"):
        parity.Reference(model, "scenes:test:1")
