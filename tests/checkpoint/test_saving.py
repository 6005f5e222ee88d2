"""Our own format: written atomically and read back, converted from others, and checked for modification."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from finelip_fast.checkpoint import UntrainedAggregatorsWarning, convert, fingerprint, identify, load, save, verify
from finelip_fast.config import FineLIPConfig
from finelip_fast.errors import CheckpointError, InputError, WriteError
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import CLIP_BPE

from .files import assert_same_weights, load_untrained


def test_a_folder_whose_name_is_not_utf8_is_saved_and_loaded(model, tmp_path):
    save(model, tmp_path / "caf\udce9")
    assert_same_weights(load(tmp_path / "caf\udce9"), model)
    assert verify(tmp_path / "caf\udce9")["status"] == "ok"


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
    replacement = make_model(seed=1, vision_heads=1, text_heads=1, context_length=77)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", half_written)
        with pytest.raises(OSError, match="no space"):
            save(replacement, folder)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    assert_same_weights(load(folder), model)
    save(replacement, folder)
    assert_same_weights(load(folder), replacement)


def test_weights_never_stand_beside_the_sizes_of_others(model, folder, make_model, monkeypatch):
    replacement = make_model(seed=1, vision_heads=2, text_heads=1, context_length=77)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda path, text: path.write_bytes(b"half") / 0)
        with pytest.raises(ZeroDivisionError):
            save(replacement, folder)
    assert load(folder).config == model.config
    assert_same_weights(load(folder), model)
    rename = Path.replace

    def killed(path, target):
        rename(path, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(replacement, folder)
    with pytest.raises(CheckpointError):
        load(folder)
    save(replacement, folder)
    assert load(folder).config == replacement.config


def test_metadata_must_be_plain(model, tmp_path):
    with pytest.raises(InputError, match="metadata of plain values"):
        save(model, tmp_path / "x", metadata={"model": model})
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("metadata", [{"a": float("nan")}, {"a": "\ud800"}, {"a": 1 << 70}, {"a": "x" * (1 << 21)}])
def test_what_is_saved_can_be_loaded(model, tmp_path, metadata):
    with pytest.raises(InputError, match="metadata"):
        save(model, tmp_path / "x", metadata=metadata)
    assert not (tmp_path / "x").exists()


def test_a_full_disk_says_what_is_missing(model, folder, make_model, monkeypatch):
    def fill(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    replacement = make_model(seed=1, vision_heads=1, text_heads=1, context_length=77)
    monkeypatch.setattr(safetensors.torch, "save_file", fill)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(
        WriteError, match=r"cannot write .*model\.safetensors: No space.*; 12\.9 MiB are needed, 1\.0 MiB are free"
    ):
        save(replacement, folder)
    assert_same_weights(load(folder), model)


def test_a_folder_that_cannot_be_made(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write .*file/x: "):
        save(model, tmp_path / "file" / "x")


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


def test_convert(clip_state, model, tmp_path):
    torch.save(clip_state, tmp_path / "clip.pt")
    options = {"activation": "gelu", "heads": 2}
    summary = convert(tmp_path / "clip.pt", tmp_path / "out", context_length=248, dtype=torch.float16, **options)
    assert summary == {
        "layout": "CLIP",
        "parameters": sum(p.numel() for p in model.parameters()) + (248 - 77) * 64,
        "family": "clip",
        "trained_aggregators": False,
        "alpha": 1.0,
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


def test_a_checkpoint_carries_its_alpha_and_embeds_as_before(folder, tmp_path):
    summary = convert(folder, tmp_path / "out", alpha=0.3)
    assert (summary["alpha"], load(tmp_path / "out").alpha, load(folder).alpha) == (0.3, 0.3, 0.8)
    assert fingerprint(tmp_path / "out") == fingerprint(folder)
    assert convert(tmp_path / "out", tmp_path / "again")["alpha"] == 0.3
    with pytest.raises(InputError, match=r"alpha in \[0, 1\], got 2"):
        convert(folder, tmp_path / "third", alpha=2)


def test_converting_our_own_changes_nothing(folder, tmp_path, model):
    assert convert(folder, tmp_path / "again")["layout"] == "finelip_fast"
    assert fingerprint(tmp_path / "again") == fingerprint(model)


@pytest.mark.parametrize("source", ["trained", "~/trained", "trained/model.safetensors"])
def test_converting_our_own_keeps_what_is_known_of_it(model, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    save(model, tmp_path / "trained", metadata={"step": 7, "source": "nowhere"})
    convert(source, tmp_path / "half", dtype=torch.float16)
    metadata = json.loads((tmp_path / "half" / "config.json").read_text())["metadata"]
    assert metadata == {"step": 7, "source": os.path.basename(source), "layout": "finelip_fast"}


@pytest.mark.parametrize(
    ("source", "recorded"),
    [("caf\udce9.pt", r"caf\udce9.pt"), ("~/clip.pt", "clip.pt"), (".", "base")],
    ids=["not UTF-8", "at home", "the working folder"],
)
def test_the_name_of_what_is_converted_is_recorded_and_its_place_is_not(
    clip_state, folder, known_widths, tmp_path, monkeypatch, source, recorded
):
    home = tmp_path / "base"
    folder.rename(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    if source != ".":
        torch.save(clip_state, os.path.expanduser(source))
    convert(source, tmp_path / "out", activation=None if source == "." else "gelu")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["metadata"]["source"] == recorded


@pytest.mark.parametrize("hint", [{"activation": "gelu"}, {"heads": 2}, {"key": "model"}])
def test_what_a_configuration_says_is_not_said_again(folder, hint, tmp_path):
    for source in (folder, folder / "model.safetensors", "open_clip:ViT-B-16/openai", None):
        with pytest.raises(
            InputError, match=rf"expected no {next(iter(hint))}=.*only for weights without a configuration"
        ):
            convert(source, tmp_path / "out", **hint)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_checkpoint_is_identified_without_its_model(make_model, tmp_path, monkeypatch, dtype):
    save(make_model(context_length=90), tmp_path, dtype=dtype)
    model = load(tmp_path)
    expected = fingerprint(model)
    monkeypatch.setattr(FineLIP, "load_state_dict", lambda *_, **__: pytest.fail("the model was built"))
    assert identify(tmp_path) == (model.config, expected, CLIP_BPE)
    assert fingerprint(tmp_path) == expected


def test_a_foreign_checkpoint_is_identified_as_it_is_loaded(longclip_state, known_widths, tmp_path):
    torch.save(longclip_state, tmp_path / "clip.pt")
    with pytest.warns(UntrainedAggregatorsWarning):
        model = load(tmp_path / "clip.pt")
    with pytest.warns(UntrainedAggregatorsWarning, match=r"clip\.pt"):
        assert identify(tmp_path / "clip.pt") == (model.config, fingerprint(model), CLIP_BPE)
    assert model.config.context_length == 256  # stretched as when loading


def test_a_fingerprint_follows_the_checkpoint(model, folder, make_model, tmp_path):
    mark = fingerprint(model)
    assert re.fullmatch("[0-9a-f]{64}", mark)
    assert fingerprint(folder) == fingerprint(load(folder)) == mark
    copy = make_model(vision_heads=1, text_heads=1, context_length=77)
    assert fingerprint(copy) == mark
    with torch.no_grad():
        copy.text_aggregator.scale += 1e-3
    assert fingerprint(copy) != mark
    copy.config = copy.config.replace(quick_gelu=False)
    half = tmp_path / "half"
    save(model, half, dtype=torch.float16)
    marks = {mark, fingerprint(copy), fingerprint(half), fingerprint(load(folder, context_length=78))}
    assert len(marks) == 4
    assert fingerprint(load(half, dtype=torch.float16)) == fingerprint(half)


def test_verify_compares_the_weights_with_what_was_saved(folder, model):
    report = verify(folder)
    assert report["status"] == "ok"
    assert report["recorded_sha256"] == report["sha256"]
    assert report["fingerprint"] == fingerprint(model)
    assert (report["format"], report["weights"]) == ("finelip_fast", str(folder / "model.safetensors"))


def test_verify_finds_weights_that_were_exchanged_in_the_header(folder, model):
    """Two weights of equal shape swap names: the file is valid, but the weights are different."""
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
    report = verify(tmp_path / "clip.pt")
    assert report["status"] == "mismatch"
    assert len(report["damaged"]) == 1


def test_the_bundled_model_is_what_was_recorded():
    assert verify()["status"] == "ok"
