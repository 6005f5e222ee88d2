"""Loading a folder of ours: defects are reported before anything large is built."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.checkpoint import UntrainedAggregatorsWarning, convert, load, loading, save
from finelip_fast.config import KEEP_POSITIONS
from finelip_fast.errors import CheckpointError, ConfigError, InputError

from .files import assert_same_weights, change_config, change_weights, load_untrained, rename_field, write_hub_folder


def test_the_weights_file_stands_for_its_folder(model, folder):
    loaded = load(folder / "model.safetensors")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


def test_our_own_weights_want_their_configuration(folder, model, tmp_path):
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json that was written with them; put it beside model"):
        load(tmp_path / "model.safetensors")
    shutil.move(folder / "config.json", tmp_path / "config.json")
    assert_same_weights(load(tmp_path / "model.safetensors"), model)


def test_context_length(model, folder):
    longer = load(folder, context_length=100)
    assert longer.config == model.config.replace(context_length=100)
    assert longer.text.positional_embedding.shape[0] == 100
    assert torch.equal(
        longer.text.positional_embedding[:KEEP_POSITIONS], model.text.positional_embedding[:KEEP_POSITIONS]
    )
    with pytest.raises(ConfigError, match="at least 77"):
        load(folder, context_length=76)


@pytest.mark.parametrize("length", [1 << 40, True, "x", 8193])
def test_a_context_length_beyond_bounds(folder, length):
    with pytest.raises((ConfigError, InputError), match="context_length"):
        load(folder, context_length=length)


def test_untrained_aggregators_warn_and_score_globally(make_model, tmp_path):
    save(make_model(trained_aggregators=False), tmp_path)
    loaded = load_untrained(tmp_path)
    assert loaded.alpha == 1.0
    save(make_model(), tmp_path)
    assert load(tmp_path).alpha == 0.8  # without a warning, which would be an error here


def test_the_bundled_model(folder, tmp_path, monkeypatch, model):
    monkeypatch.setattr(loading, "BUNDLED", folder)
    assert_same_weights(load(), model)
    monkeypatch.setattr(loading, "BUNDLED", tmp_path / "absent")
    with pytest.raises(
        CheckpointError, match=r"the bundled model .* is missing; reinstall finelip-fast, or name a checkpoint"
    ):
        load()
    assert_same_weights(load(folder), model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), r"expected config\.json .*found model\.safetensors"),
        (lambda f: [path.unlink() for path in f.iterdir()], "found nothing"),
        (
            lambda f: (f / "config.json").write_text("{"),
            r"config\.json: expected a model's configuration in JSON: .* line 1",
        ),
        (lambda f: (f / "config.json").write_text("[]"), "found a list instead of an object"),
        (lambda f: change_config(f, format="other/1", model_type="bert"), "has format 'other/1', model_type 'bert'"),
        (lambda f: change_config(f, format="finelip_fast/2"), r"expected format 'finelip_fast/1'.*upgrade"),
        (
            lambda f: rename_field(f, "embed_dim", "width"),
            r"unknown fields 'width'; missing fields embed_dim",
        ),
        (lambda f: change_config(f, image_size="big"), r"config\.json: expected the sizes of a model"),
        (lambda f: change_config(f, vision_layers=3), r"missing: visual\.transformer\.resblocks\.2\.ln_1\.weight"),
        (
            lambda f: change_config(f, context_length=99),
            r"misshapen: text\.positional_embedding \[77, 64\].*expected \[99, 64\]",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"expected model\.safetensors beside .*found config\.json"),
        (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").touch()), "truncated or damaged"),
        (lambda f: change_weights(f, lambda t: t.pop("logit_scale")), "missing: logit_scale"),
        (lambda f: change_weights(f, lambda t: t.update(x=torch.zeros(1))), "unknown: x"),
        (lambda f: change_weights(f, lambda t: t.update({"visual.proj": torch.zeros(2)})), r"visual\.proj \[2\]"),
    ],
)
def test_damaged_folders_say_what_is_wrong(folder, change, message):
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["a\0b", "x" * 5000, "~nosuchuser/x", "../" * 2000, "a/..", "open_clip:", "open_clip:a\0b/c", "open_clip:ViT-B-32/\0",
     "open_clip:ViT-B-32/" + "x" * 5000, "open_clip:ViT-B-32/~nosuchuser", "\x1b[2J", "hf-hub:", "hf-hub:a/b/c", "\udcff",
     "/dev/zero", "/dev/null"],
)  # fmt: skip
def test_names_of_nothing_are_errors(name):
    with pytest.raises(CheckpointError) as caught:
        load(name)
    assert len(str(caught.value)) < 1500


def test_a_name_is_a_text():
    with pytest.raises(InputError, match="expected a checkpoint's path or name, got 5"):
        load(5)


@pytest.mark.parametrize("kind", ["config.json", "model.safetensors"])
def test_a_pipe_in_a_folder_is_not_waited_for(folder, kind):
    (folder / kind).unlink()
    os.mkfifo(folder / kind)
    with pytest.raises(CheckpointError, match="expected"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_layers": 1_000_000_000}, "expected the sizes of a model: expected vision_layers"),
        ({"vision_layers": 256, "vision_width": 1024}, r"the configured model, 32\d{8} parameters, found"),
        ({"metadata": 5}, None),
    ],
)
def test_sizes_are_refused_before_anything_is_built(folder, changes, message):
    change_config(folder, **changes)
    if message is None:
        with pytest.raises(CheckpointError, match="expected metadata as an object"):
            convert(folder, folder / "x")
        return
    with pytest.raises(CheckpointError, match=message):
        load(folder)


STRANGE = st.sampled_from(
    [None, True, False, 0, -1, 1, 2, 3, 64, 1 << 20, 10**9, 1 << 62, 0.5, 1e308, -0.0, "", "x", "64", "\x1b[0m", [], {}, [1],
     [0.5] * 3, [[[]]], {"a": {}}, ["gelu"], {"width": 64}]
)  # fmt: skip


TEXTS = st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "9" * 30, "[" * 1000, '"\\ud800"', "{", "\x00", "﻿"])


def places(value, path=()):
    """Return the paths of all values in nested objects and lists."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(part, (dict, list)):
            yield from places(part, (*path, key))


@pytest.fixture(scope="module")
def configured(model, clip_state, tmp_path_factory):
    """One folder of every kind, and its configurations."""
    folders = {}
    for kind in ("ours", "open_clip", "transformers"):
        folder = tmp_path_factory.mktemp(kind)
        save(model, folder) if kind == "ours" else write_hub_folder(kind, clip_state, folder)
        folders[kind] = folder, {path: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return folders


@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_any_configuration_is_an_error_or_a_model(configured, data):
    folder, files = configured[data.draw(st.sampled_from(sorted(configured)))]
    path = data.draw(st.sampled_from(sorted(files)))
    values = json.loads(json.dumps(files[path]))
    for _ in range(data.draw(st.integers(1, 3))):
        *above, last = data.draw(st.sampled_from(sorted(places(values), key=str)))
        inner = values
        for key in above:
            inner = inner[key]
        inner[last] = copy.deepcopy(data.draw(STRANGE))
    text = json.dumps(values)
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(text)))
        text = text[:place] + data.draw(TEXTS) + text[place + data.draw(st.integers(0, 4)) :]
    path.write_text(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UntrainedAggregatorsWarning)
            load(folder)
    except (CheckpointError, ConfigError):
        pass
    finally:
        path.write_text(json.dumps(files[path]))
