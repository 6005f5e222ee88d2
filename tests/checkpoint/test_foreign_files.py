"""Other projects' weight files on their own: sizes, prefixes, averaged weights, and files beside the weights."""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import finelip_fast.checkpoint as checkpoint
from finelip_fast import cli
from finelip_fast.checkpoint import AveragedWeightsWarning, UntrainedAggregatorsWarning, convert, load
from finelip_fast.errors import CheckpointError

from .files import assert_same_towers, load_untrained


def test_a_file_alone_is_read_where_its_layout_and_widths_are_known(longclip_state, known_widths, model, tmp_path):
    # Half precision, like OpenAI's own; heads by width, quick GELU, and the context stretched.
    state = {f"module.{name}": tensor.half() for name, tensor in longclip_state.items()}
    torch.save({"state_dict": state}, tmp_path / "a.pt")
    loaded = load_untrained(tmp_path / "a.pt")
    assert loaded.config == model.config.replace(context_length=256, trained_aggregators=False, aggregated_tokens=3)
    assert torch.equal(loaded.visual.proj, model.visual.proj.half().float())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(3), "got a Tensor"),
        ({"lr": 0.1}, "got a dictionary with lr"),
        (
            {f"part.{i}": torch.zeros(1) for i in range(20)},
            r"missing visual\.conv1\.weight, .*found part\.0, .*part\.9 and 10 more",
        ),
    ],
)
def test_files_without_a_clip(content, message, tmp_path):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / "file.pt")
    assert str(tmp_path / "file.pt") in str(caught.value)


def test_a_loaded_model_outlives_its_file(longclip_state, known_widths, model, tmp_path):
    path = tmp_path / "clip.pt"
    torch.save(longclip_state, path)
    loaded = load_untrained(path)
    with path.open("rb+") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert_same_towers(loaded, model)


@pytest.mark.parametrize(
    "prefix", ["model.", "module.", "_orig_mod.", "model.module._orig_mod.", "_fsdp_wrapped_module.", "net.clip."]
)
def test_a_prefix_on_all_names(longclip_state, known_widths, model, tmp_path, prefix):
    torch.save({f"{prefix}{name}": tensor for name, tensor in longclip_state.items()}, tmp_path / "x.pt")
    assert_same_towers(load_untrained(tmp_path / "x.pt"), model)


def test_wrappers_inside_of_names(longclip_state, known_widths, model, tmp_path):
    state = {name.replace("visual.", "visual._orig_mod.", 1): tensor for name, tensor in longclip_state.items()}
    torch.save(state, tmp_path / "x.pt")
    assert_same_towers(load_untrained(tmp_path / "x.pt"), model)


AVERAGES = ["ema_state_dict", "state_dict_ema", "model_ema", "ema"]


@pytest.mark.parametrize("key", AVERAGES)
def test_averaged_weights_are_not_taken_unasked(longclip_state, known_widths, tmp_path, key):
    averaged = {f"module.{name}": tensor + 1 for name, tensor in longclip_state.items()}
    averaged["n_averaged"] = torch.tensor(5)
    torch.save({"epoch": 3, key: averaged, "state_dict": longclip_state}, tmp_path / "x.pt")
    with (
        pytest.warns(UntrainedAggregatorsWarning),
        pytest.warns(AveragedWeightsWarning, match=f"state_dict and {key}") as caught,
    ):
        loaded = load(tmp_path / "x.pt")
    (message,) = (str(warning.message) for warning in caught if warning.category is AveragedWeightsWarning)
    assert {warning.filename for warning in caught} == {__file__}
    assert torch.equal(loaded.visual.proj, longclip_state["visual.proj"])

    advice = re.search(r"finelip (convert) FILE FOLDER (--key) (\w+)", message)
    assert cli.main([advice[1], str(tmp_path / "x.pt"), str(tmp_path / "out"), advice[2], advice[3], "--quiet"]) == 0
    assert torch.equal(load_untrained(tmp_path / "out").visual.proj, longclip_state["visual.proj"] + 1)


@pytest.mark.parametrize("key", AVERAGES)
def test_averaged_weights_alone_are_taken(longclip_state, known_widths, model, tmp_path, key):
    torch.save({"epoch": 3, key: longclip_state}, tmp_path / "x.pt")
    assert_same_towers(load_untrained(tmp_path / "x.pt"), model)


def test_a_key_that_is_not_there(longclip_state, tmp_path):
    torch.save({"epoch": 3, "state_dict": longclip_state, "optimizer": {}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"expected the key 'ema' .* which has state_dict, optimizer"):
        convert(tmp_path / "x.pt", tmp_path / "out", key="ema")


def test_what_a_training_script_keeps_beside_its_weights(longclip_state, known_widths, model, tmp_path):
    remarks = {
        "optimizer": {"state": {0: {"step": np.float64(3), "moments": np.ones(4, np.float32)}}},
        "random": np.random.RandomState(0).get_state(),
        "best": np.int64(7),
        "dtype": np.dtype("float32"),
        "args": argparse.Namespace(lr=1e-3, out=Path("runs") / "a", since=datetime.datetime(2026, 1, 2)),
        "counts": collections.defaultdict(list, {"a": [1]}),
        "torch": torch.torch_version.TorchVersion(torch.__version__),
    }
    for legacy in (False, True):
        path = tmp_path / f"{legacy}.pt"
        content = {"state_dict": longclip_state, **remarks}
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        assert_same_towers(load_untrained(path), model)


def test_nests_that_contain_themselves(tmp_path):
    nest: dict = {}
    nest["model"] = nest
    with pytest.raises(CheckpointError, match="expected a state dict"):
        checkpoint.import_state_dict(nest)


def test_two_weights_for_one_name(clip_state):
    with pytest.raises(CheckpointError, match=r"one weight of the name 'ln_final\.bias', got two"):
        checkpoint.import_state_dict(clip_state | {"module.ln_final.bias": clip_state["ln_final.bias"]})
    with pytest.raises(CheckpointError, match=r"one weight of the name 'text\.ln_final\.bias', got two"):
        checkpoint.import_state_dict(clip_state | {"text.ln_final.bias": clip_state["ln_final.bias"]})


def test_what_is_asked_for_can_be_given(clip_state, model, tmp_path, capsys):
    path, out = str(tmp_path / "clip.pt"), str(tmp_path / "out")
    torch.save(clip_state, path)
    command = ["convert", path, out]
    for options in (["--heads", "4", "2"], ["--activation", "gelu"]):
        assert cli.main(command) == 2
        assert f"finelip convert FILE FOLDER {options[0]} " in capsys.readouterr().err
        assert not os.path.exists(out)
        command += options
    assert cli.main([*command, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["heads"], summary["activation"]) == ([4, 2], "gelu")
    loaded = load_untrained(out)
    assert (loaded.config.vision_heads, loaded.config.text_heads, loaded.config.quick_gelu) == (4, 2, False)
    assert_same_towers(loaded, model)
