"""Checkpoints: our folder there and back, files and folders of others, names, and what errors say."""

from __future__ import annotations

import argparse
import collections
import copy
import datetime
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import finelip_fast.checkpoint as checkpoint
from finelip_fast import cli
from finelip_fast.checkpoint import (
    AveragedWeightsWarning,
    UntrainedAggregatorsWarning,
    architecture,
    convert,
    fingerprint,
    identify,
    load,
    loading,
    save,
    verify,
)
from finelip_fast.config import KEEP_POSITIONS, FineLIPConfig
from finelip_fast.errors import CheckpointError, ConfigError, InputError, WriteError
from finelip_fast.model import FineLIP


@pytest.fixture(scope="module")
def model(make_model):
    """One head of 64 columns in each tower."""
    return make_model(vision_heads=1, text_heads=1, context_length=77)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    save(model, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A folder to damage: the weights are linked, not copied, so replace that file rather than write into it."""
    (tmp_path / "ours").mkdir()
    os.link(saved / "model.safetensors", tmp_path / "ours/model.safetensors")
    (tmp_path / "ours/config.json").write_bytes((saved / "config.json").read_bytes())
    return tmp_path / "ours"


@pytest.fixture(scope="module")
def clip_state(model) -> dict[str, Tensor]:
    """The model in OpenAI's layout, without aggregators."""
    return {
        name.removeprefix("text."): tensor for name, tensor in model.state_dict().items() if "aggregator" not in name
    }


@pytest.fixture(scope="module")
def longclip_state(clip_state) -> dict[str, Tensor]:
    """The same in Long-CLIP's layout, which shows its activation."""
    table = clip_state["positional_embedding"]
    return clip_state | {"positional_embedding_res": table.clone()}


@pytest.fixture
def known_widths(monkeypatch):
    """A published CLIP of the width of these tests: files without a configuration are read."""
    for table in (architecture.VISION_HEADS, architecture.TEXT_HEADS):
        monkeypatch.setitem(table, 64, 1)


def load_untrained(*args, **kwargs):
    with pytest.warns(UntrainedAggregatorsWarning, match=re.escape(str(args[0]))):
        return load(*args, **kwargs)


def assert_same_weights(loaded, model):
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0, msg=name)


def assert_same_towers(loaded, model):
    """The same encoders; of the positions, the rows that stretching does not touch."""
    weights = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        if name == "text.positional_embedding":
            assert torch.equal(weights[name][:KEEP_POSITIONS], tensor[:KEEP_POSITIONS])
        elif "aggregator" not in name:
            assert torch.equal(weights[name], tensor), name


# Our format -----------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(model, folder, make_captions):
    loaded = load(folder)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    with torch.no_grad():
        ids = make_captions([77, 4], 77)
        assert torch.equal(loaded.encode_text(ids), model.encode_text(ids))


def test_the_folder_holds_two_files_and_no_pickle(model, tmp_path):
    save(model, tmp_path / "a" / "b", metadata={"run": 7})
    folder = tmp_path / "a" / "b"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
    values = json.loads((folder / "config.json").read_text())
    assert values.pop("format") == "finelip_fast/1"
    assert values.pop("metadata") == {"run": 7}
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert values.pop("weights_sha256") == digest
    assert FineLIPConfig.from_dict(values) == model.config
    assert safetensors.torch.load_file(folder / "model.safetensors").keys() == model.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk_and_in_memory(model, tmp_path, dtype):
    save(model, tmp_path, dtype=dtype)
    loaded = load(tmp_path)
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.visual.proj, model.visual.proj.to(dtype).float())
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * sum(4 * p.numel() for p in model.parameters())
    half = load(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}


def half_written(tensors, path, metadata):
    Path(path).write_bytes(b"half")
    raise OSError("no space")


def test_saving_again_replaces_and_a_failure_leaves_the_old(model, folder, make_model, monkeypatch):
    other = make_model(seed=1, vision_heads=1, text_heads=1, context_length=77)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", half_written)
        with pytest.raises(OSError, match="no space"):
            save(other, folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert_same_weights(load(folder), model)
    save(other, folder)
    assert_same_weights(load(folder), other)


def test_metadata_must_be_plain(model, tmp_path):
    with pytest.raises(InputError, match="metadata of plain values"):
        save(model, tmp_path / "x", metadata={"model": model})
    assert not (tmp_path / "x").exists()


def test_the_weights_file_stands_for_its_folder(model, folder):
    loaded = load(folder / "model.safetensors")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


def test_context_length(model, folder):
    longer = load(folder, context_length=100)
    assert longer.config == model.config.replace(context_length=100)
    assert longer.text.positional_embedding.shape[0] == 100
    assert torch.equal(
        longer.text.positional_embedding[:KEEP_POSITIONS], model.text.positional_embedding[:KEEP_POSITIONS]
    )
    with pytest.raises(ConfigError, match="at least 77"):
        load(folder, context_length=76)


def test_untrained_aggregators_warn_and_score_globally(make_model, tmp_path):
    save(make_model(trained_aggregators=False), tmp_path)
    loaded = load_untrained(tmp_path)
    assert loaded.alpha == 1.0
    save(make_model(), tmp_path)
    assert load(tmp_path).alpha == 0.8  # and no warning, which would be an error here


def test_the_bundled_model(folder, tmp_path, monkeypatch, model):
    monkeypatch.setattr(loading, "BUNDLED", folder)
    assert_same_weights(load(), model)
    monkeypatch.setattr(loading, "BUNDLED", tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"lacks the bundled model .*reinstall"):
        load()


# Fingerprints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_checkpoint_is_identified_without_its_model(make_model, tmp_path, monkeypatch, dtype):
    save(make_model(context_length=90), tmp_path, dtype=dtype)
    model = load(tmp_path)
    expected = fingerprint(model)
    monkeypatch.setattr(FineLIP, "load_state_dict", lambda *_, **__: pytest.fail("the model was built"))
    assert identify(tmp_path) == (model.config, expected)
    assert fingerprint(tmp_path) == expected


def test_a_foreign_checkpoint_is_identified_as_it_is_loaded(longclip_state, known_widths, tmp_path):
    torch.save(longclip_state, tmp_path / "clip.pt")
    with pytest.warns(UntrainedAggregatorsWarning):
        model = load(tmp_path / "clip.pt")
    with pytest.warns(UntrainedAggregatorsWarning, match=r"clip\.pt"):
        assert identify(tmp_path / "clip.pt") == (model.config, fingerprint(model))
    assert model.config.context_length == 256  # stretched alike


def test_a_fingerprint_follows_the_checkpoint(model, folder, make_model, tmp_path):
    mark = fingerprint(model)
    assert re.fullmatch("[0-9a-f]{64}", mark)
    assert fingerprint(folder) == fingerprint(load(folder)) == mark
    same = make_model(vision_heads=1, text_heads=1, context_length=77)
    assert fingerprint(same) == mark
    with torch.no_grad():
        same.text_aggregator.scale += 1e-3
    assert fingerprint(same) != mark
    same.config = same.config.replace(quick_gelu=False)
    half = tmp_path / "half"
    save(model, half, dtype=torch.float16)
    marks = {mark, fingerprint(same), fingerprint(half), fingerprint(load(folder, context_length=78))}
    assert len(marks) == 4
    assert fingerprint(load(half, dtype=torch.float16)) == fingerprint(half)


# Other projects' files ------------------------------------------------------------------------------------------------


def test_a_file_alone_is_read_where_its_layout_and_widths_are_known(longclip_state, known_widths, model, tmp_path):
    # Half precision, as OpenAI's own; heads by width, quick GELU, and the context stretched.
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


# Folders --------------------------------------------------------------------------------------------------------------


def change_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def rename_field(folder, old, new):
    path = folder / "config.json"
    path.write_text(path.read_text().replace(f'"{old}"', f'"{new}"'))


def change_weights(folder, change):
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


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
            r"unknown fields \['width'\], missing fields \['embed_dim'\]",
        ),
        (lambda f: change_config(f, image_size="big"), r"config\.json: no sizes of a model"),
        (lambda f: change_config(f, vision_layers=3), r"missing: visual\.transformer\.resblocks\.2\.ln_1\.weight"),
        (
            lambda f: change_config(f, context_length=99),
            r"misshapen: text\.positional_embedding \[77, 64\].*expected \[99, 64\]",
        ),
        (lambda f: (f / "model.safetensors").unlink(), r"expected model\.safetensors beside .*found config\.json"),
        (lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").touch()), "damaged or cut"),
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


OPEN_CLIP_CONFIG = {
    "model_cfg": {
        "embed_dim": 48,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16},
        "text_cfg": {"width": 64, "heads": 8, "layers": 2},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "resize_mode": "squash", "size": [32, 32]},
}


def write_hub_folder(kind: str, state: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "open_clip":
        (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG))
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    elif kind == "transformers":
        vision = {"num_attention_heads": 4, "hidden_act": "gelu"}
        text = {"num_attention_heads": 8, "hidden_act": "gelu"}
        (folder / "config.json").write_text(
            json.dumps({"model_type": "clip", "vision_config": vision, "text_config": text})
        )
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.2] * 3}))
        # The names are tested on their own; here the configuration beside the weights counts.
        torch.save(state, folder / "pytorch_model.bin")


def assert_hub_config(config, resize_mode):
    assert (config.vision_heads, config.text_heads, config.quick_gelu) == (4, 8, False)
    assert (config.image_mean, config.image_std) == ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert (config.context_length, config.resize_mode) == (256, resize_mode)


@pytest.mark.parametrize(("kind", "resize_mode"), [("open_clip", "squash"), ("transformers", "shortest")])
def test_folders_of_other_projects(kind, resize_mode, clip_state, model, tmp_path):
    write_hub_folder(kind, clip_state, tmp_path / "hub")
    loaded = load_untrained(tmp_path / "hub")
    assert_hub_config(loaded.config, resize_mode)
    assert_same_towers(loaded, model)
    file = next(path for path in (tmp_path / "hub").iterdir() if path.suffix == ".bin")
    assert load_untrained(file).config == loaded.config
    # Under another name the file has nothing to do with the configuration.
    with pytest.raises(CheckpointError, match="--heads"):
        load(file.rename(file.with_name("mine.bin")))


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub without a network: repositories in a folder, of which a call brings what its patterns name."""
    remote, local, calls = tmp_path / "remote", tmp_path / "local", []

    def snapshot_download(repository, *, allow_patterns):
        calls.append((repository, tuple(allow_patterns)))
        source, target = remote / repository, local / repository
        if not source.is_dir():
            raise OSError("404")
        target.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            if (source / name).is_file():
                (target / name).write_bytes((source / name).read_bytes())
        return str(target)

    def list_repo_files(repository):
        return [
            str(path.relative_to(remote / repository)) for path in (remote / repository).rglob("*") if path.is_file()
        ]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    return remote, calls


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
@pytest.mark.parametrize(("kind", "resize_mode"), [("open_clip", "squash"), ("transformers", "shortest")])
def test_hub_names(prefix, kind, resize_mode, hub, clip_state, model):
    remote, _ = hub
    write_hub_folder(kind, clip_state, remote / "org/clip-model")
    loaded = load_untrained(prefix + "org/clip-model")
    assert_hub_config(loaded.config, resize_mode)
    assert_same_towers(loaded, model)


def test_our_format_on_the_hub_comes_without_anything_else(hub, model):
    remote, calls = hub
    save(model, remote / "org/ours")
    (remote / "org/ours/pytorch_model.bin").write_bytes(b"large")
    assert_same_weights(load("org/ours"), model)
    assert [patterns for _, patterns in calls] == [
        ("config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json"),
        ("model.safetensors",),
    ]


def test_hub_failures(hub):
    remote, _ = hub
    with pytest.raises(
        CheckpointError, match=r"nobody/none: .*tried config\.json.*huggingface\.co/nobody/none: OSError: 404"
    ):
        load("nobody/none")
    (remote / "org/data").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="found nothing"):
        load("org/data")


@pytest.mark.parametrize(
    "name", ["missing", "./missing/folder", "missing/clip.pt", "hf-hub:clip", "/no/such/model.safetensors"]
)
def test_missing_paths_touch_no_network(name, hub):
    with pytest.raises(CheckpointError, match=f"^{re.escape(name)}: no such file or folder.*open_clip:MODEL/TAG"):
        load(name)
    assert hub[1] == []


@pytest.fixture
def tiny_open_clip(monkeypatch):
    """A small model in open_clip's list."""
    configs = {"ViT-Tiny-Test": OPEN_CLIP_CONFIG["model_cfg"]}
    monkeypatch.setattr(open_clip, "list_models", lambda: list(configs))
    monkeypatch.setattr(open_clip, "get_model_config", configs.get)
    return "ViT-Tiny-Test"


def test_open_clip_names(tiny_open_clip, clip_state, model, tmp_path, monkeypatch):
    torch.save(clip_state, tmp_path / "clip.bin")
    tag = {"hf_hub": "org/tiny/", "mean": (0.5,) * 3, "std": (0.2,) * 3, "resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, wanted: tag if wanted == "web" else {})
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(tmp_path / "clip.bin") if cfg is tag else "")
    loaded = load_untrained(f"open_clip:{tiny_open_clip}/web")
    assert_hub_config(loaded.config, "squash")
    assert_same_towers(loaded, model)
    from_file = load_untrained(f"open_clip:{tiny_open_clip}/{tmp_path / 'clip.bin'}")
    assert (from_file.config.vision_heads, from_file.config.text_heads, from_file.config.quick_gelu) == (4, 8, False)


def test_open_clip_failures(monkeypatch):
    def unreachable(cfg):
        raise ConnectionError("no route")

    monkeypatch.setattr(open_clip, "download_pretrained", unreachable)
    for name, message in {
        "open_clip:ViT-Z/openai": "no model 'ViT-Z'.*open_clip:MODEL/TAG",
        "open_clip:ViT-B-16": r"pretrained tag of ViT-B-16 \(openai, .*got ''",
        "open_clip:ViT-B-16/nope": "got 'nope'",
        "open_clip:RN50/openai": r"vision_cfg\.layers",
        "open_clip:ViT-B-16/openai": "tried timm/.*: no route.*give its path: open_clip:ViT-B-16-quickgelu/PATH",
        "open_clip:ViT-B-16/laion2b_s34b_b88k": "no route.*give its path: open_clip:ViT-B-16/PATH",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            load(name)


# Conversion -----------------------------------------------------------------------------------------------------------


def test_convert(clip_state, model, tmp_path):
    torch.save(clip_state, tmp_path / "clip.pt")
    what = {"activation": "gelu", "heads": 2}
    summary = convert(tmp_path / "clip.pt", tmp_path / "out", context_length=248, dtype=torch.float16, **what)
    assert summary == {
        "layout": "CLIP",
        "parameters": sum(p.numel() for p in model.parameters()) + (248 - 77) * 64,
        "trained_aggregators": False,
        "embed_dim": 48,
        "tokens": 1,
        "image_size": 32,
        "patch_size": 8,
        "context_length": 248,
        "activation": "gelu",
        "heads": [2, 2],
        "dtype": "float16",
        "folder": str(tmp_path / "out"),
    }
    loaded = load_untrained(tmp_path / "out")
    assert (loaded.config.context_length, loaded.config.vision_heads, loaded.config.quick_gelu) == (248, 2, False)
    assert torch.equal(loaded.visual.proj, model.visual.proj.half().float())
    assert json.loads((tmp_path / "out/config.json").read_text())["metadata"] == {"source": "clip.pt", "layout": "CLIP"}


def test_converting_our_own_changes_nothing(folder, tmp_path, model):
    assert convert(folder, tmp_path / "again")["layout"] == "finelip_fast"
    assert fingerprint(tmp_path / "again") == fingerprint(model)


def test_converting_our_own_keeps_what_is_known_of_it(model, tmp_path):
    save(model, tmp_path / "trained", metadata={"step": 7, "source": "nowhere"})
    convert(tmp_path / "trained", tmp_path / "half", dtype=torch.float16)
    metadata = json.loads((tmp_path / "half" / "config.json").read_text())["metadata"]
    assert metadata == {"step": 7, "source": "trained", "layout": "finelip_fast"}


# Whose weights --------------------------------------------------------------------------------------------------------


def test_verify_compares_the_weights_with_what_was_saved(folder, model):
    found = verify(folder)
    assert found["status"] == "ok"
    assert found["recorded_sha256"] == found["sha256"]
    assert found["fingerprint"] == fingerprint(model)
    assert (found["format"], found["weights"]) == ("finelip_fast", str(folder / "model.safetensors"))


def test_verify_finds_weights_that_were_exchanged_in_the_header(folder, model):
    """Two weights of one shape exchange their names: a sound file, with other weights."""
    path = folder / "model.safetensors"
    content, (first, second) = path.read_bytes(), (b"resblocks.0.ln_1.weight", b"resblocks.1.ln_1.weight")
    path.unlink()
    path.write_bytes(content.replace(first, b"@" * 23).replace(second, first).replace(b"@" * 23, second))
    assert not torch.equal(load(folder).state_dict()["visual.transformer.resblocks.0.ln_1.weight"],
                           model.state_dict()["visual.transformer.resblocks.0.ln_1.weight"])  # fmt: skip
    assert verify(folder)["status"] == "mismatch"


def test_verify_knows_what_it_cannot_compare(folder, longclip_state, known_widths, tmp_path):
    values = json.loads((folder / "config.json").read_text())
    del values["weights_sha256"]
    (folder / "config.json").write_text(json.dumps(values))
    assert verify(folder)["status"] == "none recorded"

    torch.save(longclip_state, tmp_path / "clip.pt")
    assert (verify(tmp_path / "clip.pt")["status"], verify(tmp_path / "clip.pt")["damaged"]) == ("ok", [])
    content = bytearray((tmp_path / "clip.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "clip.pt").write_bytes(content)
    found = verify(tmp_path / "clip.pt")
    assert found["status"] == "mismatch"
    assert len(found["damaged"]) == 1


def test_the_bundled_model_is_what_was_recorded():
    assert verify()["status"] == "ok"


# What others may write ------------------------------------------------------------------------------------------------


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
        ({"vision_layers": 1_000_000_000}, "no sizes of a model: expected vision_layers"),
        ({"vision_layers": 256, "vision_width": 1024}, r"a model of 32\d{8} parameters, as it is configured, found"),
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


@pytest.mark.parametrize("length", [1 << 40, True, "x", 8193])
def test_a_context_length_beyond_bounds(folder, length):
    with pytest.raises((ConfigError, InputError), match="context_length"):
        load(folder, context_length=length)


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


@pytest.mark.parametrize("metadata", [{"a": float("nan")}, {"a": "\ud800"}, {"a": 1 << 70}, {"a": "x" * (1 << 21)}])
def test_what_is_saved_can_be_loaded(model, tmp_path, metadata):
    with pytest.raises(InputError, match="metadata"):
        save(model, tmp_path / "x", metadata=metadata)
    assert not (tmp_path / "x").exists()


def test_a_full_disk_says_what_is_missing(model, folder, make_model, monkeypatch):
    def fill(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    other = make_model(seed=1, vision_heads=1, text_heads=1, context_length=77)
    monkeypatch.setattr(safetensors.torch, "save_file", fill)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(
        WriteError, match=r"cannot write .*model\.safetensors: No space.*; 12\.9 MiB are needed, 1\.0 MiB are free"
    ):
        save(other, folder)
    assert_same_weights(load(folder), model)


def test_a_folder_that_cannot_be_made(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write .*file/x: "):
        save(model, tmp_path / "file" / "x")


STRANGE = st.sampled_from(
    [None, True, False, 0, -1, 1, 2, 3, 64, 1 << 20, 10**9, 1 << 62, 0.5, 1e308, -0.0, "", "x", "64", "\x1b[0m", [], {}, [1],
     [0.5] * 3, [[[]]], {"a": {}}, ["gelu"], {"width": 64}]
)  # fmt: skip
TEXTS = st.sampled_from(["NaN", "Infinity", "-Infinity", "1e999", "9" * 30, "[" * 1000, '"\\ud800"', "{", "\x00", "﻿"])


def places(value, path=()):
    """Paths of all values in nested objects and lists."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(part, (dict, list)):
            yield from places(part, (*path, key))


@pytest.fixture(scope="module")
def configured(model, clip_state, tmp_path_factory):
    """A folder of every kind, and its configurations."""
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


# As other programs write them -----------------------------------------------------------------------------------------


def as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A weight of every kind of name that tells transformers' layout; the others as OpenAI's."""
    renamed = dict(state)
    renamed["vision_model.embeddings.patch_embedding.weight"] = renamed.pop("visual.conv1.weight")
    renamed["text_model.embeddings.token_embedding.weight"] = renamed.pop("token_embedding.weight")
    return renamed


def write_shards(folder: Path, name: str, state: dict[str, Tensor]) -> list[Path]:
    """Two files and their index, as transformers writes them."""
    stem, suffix = name.split(".")
    names = sorted(state)
    parts = {f"{stem}-0000{n}-of-00002.{suffix}": names[n - 1 :: 2] for n in (1, 2)}
    for file, part in parts.items():
        tensors = {key: state[key].contiguous() for key in part}
        safetensors.torch.save_file(tensors, folder / file) if suffix == "safetensors" else torch.save(
            tensors, folder / file
        )
    places = {key: file for file, part in parts.items() for key in part}
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return [folder / file for file in parts]


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def sharded(request, clip_state, tmp_path):
    """A folder of transformers with its weights in two shards; the name of what they are shards of, and the shards."""
    write_hub_folder("transformers", clip_state, tmp_path / "hub")
    (tmp_path / "hub/pytorch_model.bin").unlink()
    return tmp_path / "hub", request.param, write_shards(tmp_path / "hub", request.param, clip_state)


def test_shards_are_read_together(sharded, model):
    folder, name, _ = sharded
    loaded = load_untrained(folder)
    assert_hub_config(loaded.config, "shortest")
    assert_same_towers(loaded, model)
    assert load_untrained(folder / f"{name}.index.json").config == loaded.config
    expected = ([], "ok") if name.endswith(".bin") else (None, "none recorded")
    report = verify(folder)
    assert (report["damaged"], report["status"]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shards, index: shards[1].unlink(), r"expected its shards beside it, missing .*-00002-of-00002"),
        (lambda shards, index: os.replace(shards[0], shards[1]), "expected its shards beside it"),
        (
            lambda shards, index: shutil.copy(shards[0], shards[1]),
            "each weight in the shard that the index names, missing",
        ),
        (lambda shards, index: index.write_text('{"weight_map": {"a": "../b.bin"}}'), "plain name of a file"),
        (lambda shards, index: index.write_text('{"weight_map": {"a": 5}}'), "plain name of a file"),
        (lambda shards, index: index.write_text('{"weight_map": []}'), "weight_map as an object"),
        (lambda shards, index: index.write_text('{"weight_map": {}}'), "got a dictionary with nothing"),
        (lambda shards, index: index.write_text("["), "the index of a model's shards in JSON"),
    ],
)
def test_shards_that_are_not_whole(sharded, change, message):
    folder, name, shards = sharded
    change(shards, folder / f"{name}.index.json")
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_one_shard_is_no_checkpoint(sharded):
    folder, name, shards = sharded
    with pytest.raises(CheckpointError, match=r"found a shard of them.*name their folder, or the index") as caught:
        load(shards[0])
    advised = str(caught.value).rpartition(" ")[2]
    assert advised == f"{name}.index.json"
    load_untrained(folder / advised)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_shards_on_the_hub(hub, clip_state, model, name):
    remote, calls = hub
    write_hub_folder("transformers", clip_state, remote / "org/large")
    if name.endswith(".json"):
        write_shards(remote / "org/large", "model.safetensors", clip_state)
    else:
        safetensors.torch.save_file(clip_state, remote / "org/large" / name)
    assert_same_towers(load_untrained("org/large"), model)
    assert "pytorch_model.bin" not in [file for _, patterns in calls for file in patterns]


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("layout", ["open_clip", "transformers"])
def test_open_clips_configuration_beside_other_weights(clip_state, tmp_path, layout, both):
    """The weights say whose configuration is theirs, and open_clip's serves where it is alone."""
    write_hub_folder("transformers", clip_state, tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    if not both:
        (tmp_path / "config.json").unlink()
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP_CONFIG))
    state = as_transformers(clip_state) if layout == "transformers" else clip_state
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    loaded = load_untrained(tmp_path)
    assert_hub_config(loaded.config, "shortest" if both and layout == "transformers" else "squash")
    assert load_untrained(tmp_path / "model.safetensors").config == loaded.config


def test_pictures_where_transformers_5_writes_them(clip_state, tmp_path):
    write_hub_folder("transformers", clip_state, tmp_path)
    pictures = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": pictures}))
    assert_hub_config(load_untrained(tmp_path).config, "shortest")


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
        pytest.warns(AveragedWeightsWarning, match=f"state_dict and {key}") as seen,
    ):
        loaded = load(tmp_path / "x.pt")
    (message,) = (str(warning.message) for warning in seen if warning.category is AveragedWeightsWarning)
    assert {warning.filename for warning in seen} == {__file__}
    assert torch.equal(loaded.visual.proj, longclip_state["visual.proj"])

    advice = re.search(r"finelip (convert) FILE FOLDER (--part) (\w+)", message)
    assert cli.main([advice[1], str(tmp_path / "x.pt"), str(tmp_path / "out"), advice[2], advice[3], "--quiet"]) == 0
    assert torch.equal(load_untrained(tmp_path / "out").visual.proj, longclip_state["visual.proj"] + 1)


@pytest.mark.parametrize("key", AVERAGES)
def test_averaged_weights_alone_are_taken(longclip_state, known_widths, model, tmp_path, key):
    torch.save({"epoch": 3, key: longclip_state}, tmp_path / "x.pt")
    assert_same_towers(load_untrained(tmp_path / "x.pt"), model)


def test_a_part_that_is_not_there(longclip_state, tmp_path):
    torch.save({"epoch": 3, "state_dict": longclip_state, "optimizer": {}}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"expected the part 'ema' .* which has state_dict, optimizer"):
        convert(tmp_path / "x.pt", tmp_path / "out", part="ema")


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


# One file of weights --------------------------------------------------------------------------------------------------


def test_a_folder_of_one_file(longclip_state, known_widths, model, tmp_path):
    torch.save(longclip_state, tmp_path / "longclip-B.pt")
    (tmp_path / "README.md").write_text("Long-CLIP")
    assert_same_towers(load_untrained(tmp_path), model)
    torch.save(longclip_state, tmp_path / "longclip-L.pt")
    with pytest.raises(
        CheckpointError, match=r"expected config\.json .*longclip-B\.pt, longclip-L\.pt.*can be named itself"
    ):
        load(tmp_path)


@pytest.mark.parametrize("prefix", ["", "hf-hub:"])
def test_a_hub_repository_of_one_file(hub, longclip_state, known_widths, model, prefix):
    remote, calls = hub
    (remote / "org/LongCLIP-B").mkdir(parents=True)
    torch.save(longclip_state, remote / "org/LongCLIP-B/longclip-B.pt")
    (remote / "org/LongCLIP-B/README.md").touch()
    assert_same_towers(load_untrained(f"{prefix}org/LongCLIP-B"), model)
    assert [patterns for _, patterns in calls][1:] == [("longclip-B.pt",)]


def test_a_hub_repository_of_several_files(hub, longclip_state, known_widths, model):
    remote, calls = hub
    (remote / "org/many").mkdir(parents=True)
    for name in ("a@336px.pt", "b.safetensors"):
        torch.save(longclip_state, remote / "org/many" / name)
    with pytest.raises(
        CheckpointError, match=r"one file of weights, found a@336px\.pt, b\.safetensors: name one"
    ) as caught:
        load("org/many")
    assert len(calls) == 1  # the configurations, and no weights
    assert_same_towers(load_untrained(str(caught.value).rpartition(" ")[2]), model)
    with pytest.raises(CheckpointError, match="there is no such file"):
        load("hf-hub:org/many/c.pt")


def test_a_file_that_came_before_is_read_without_a_network(hub, longclip_state, known_widths, model, monkeypatch):
    remote, _ = hub
    (remote / "org/one").mkdir(parents=True)
    torch.save(longclip_state, remote / "org/one/x.pt")
    load_untrained("org/one")

    def unreachable(repository):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    assert_same_towers(load_untrained("org/one"), model)
    (remote / "org/other").mkdir()
    with pytest.raises(CheckpointError, match=r"the list of files of huggingface\.co/org/other: ConnectionError"):
        load("org/other")


# What weights alone do not tell ---------------------------------------------------------------------------------------


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


def test_our_own_weights_want_their_configuration(folder, model, tmp_path):
    shutil.move(folder / "model.safetensors", tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"config\.json that was written with them: name the folder of both, or put"
    ):
        load(tmp_path / "model.safetensors")
    shutil.move(folder / "config.json", tmp_path / "config.json")
    assert_same_weights(load(tmp_path / "model.safetensors"), model)


def test_pictures_that_are_refused_can_be_taken_as_clip_takes_them(clip_state, tmp_path):
    write_hub_folder("transformers", clip_state, tmp_path)
    path = tmp_path / "preprocessor_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"resample": 2, "size": 64}))
    with pytest.raises(
        CheckpointError, match=r"resized bicubically to 32 pixels.*has size=64, resample=2, which .*; without"
    ):
        load(tmp_path)
    path.write_text(json.dumps(values))
    assert_hub_config(load_untrained(tmp_path).config, "shortest")


@pytest.mark.parametrize("hint", [{"activation": "gelu"}, {"heads": 2}, {"part": "model"}])
def test_what_a_configuration_says_is_not_said_again(folder, hint, tmp_path):
    for source in (folder, folder / "model.safetensors", "open_clip:ViT-B-16/openai", None):
        with pytest.raises(InputError, match=rf"expected no {next(iter(hint))}=.*its configuration says"):
            convert(source, tmp_path / "out", **hint)


def test_an_open_clip_model_of_another_activation(tiny_open_clip, longclip_state, tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, wanted: {})
    torch.save(longclip_state, tmp_path / "clip.pt")
    with pytest.raises(
        CheckpointError, match=r"ViT-Tiny-Test is a model with plain GELU.*Long-CLIP.*name the file alone"
    ):
        load(f"open_clip:{tiny_open_clip}/{tmp_path / 'clip.pt'}")


# Numbers that are none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("command", [load, identify, fingerprint, verify])
def test_weights_that_are_no_numbers_are_refused_by_name(folder, tmp_path, command, number):
    def spoil(tensors):
        tensors["visual.proj"][3, 4] = number
        tensors["logit_scale"].fill_(number)

    change_weights(folder, spoil)
    with pytest.raises(CheckpointError, match=r"found NaN or infinity in logit_scale, visual\.proj: a training that"):
        command(folder)
    with pytest.raises(CheckpointError, match="found NaN or infinity"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_foreign_weights_that_are_no_numbers(longclip_state, known_widths, tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in longclip_state.items()}
    state["ln_final.bias"] = torch.full((64,), 1e300 if dtype == torch.float64 else torch.nan, dtype=torch.float64).to(
        dtype
    )
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"infinity in ln_final\.bias"):
        load(tmp_path / "x.pt")


def test_large_numbers_are_numbers(make_model, tmp_path):
    """Their sum is infinite in float32."""
    model = make_model()
    with torch.no_grad():
        model.text.token_embedding.weight.fill_(3e38)
    save(model, tmp_path)
    load(tmp_path)


def test_what_a_precision_cannot_hold_is_not_written(make_model, tmp_path):
    model = make_model()
    with torch.no_grad():
        model.visual.proj[0, 0] = 1e6
    with pytest.raises(InputError, match=r"infinity in visual\.proj; store it as float32"):
        save(model, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()
    save(model, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"visual\.proj has numbers beyond float16's range.*torch\.bfloat16"):
        load(tmp_path / "whole", dtype=torch.float16)
    assert load(tmp_path / "whole", dtype=torch.bfloat16).visual.proj.isfinite().all()


def test_a_model_that_diverged_is_not_saved(make_model, folder):
    model = make_model()
    with torch.no_grad():
        model.visual.proj[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinity in visual\.proj; its training diverged"):
        save(model, folder)
    load(folder)
