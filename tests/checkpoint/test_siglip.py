"""SigLIP and SigLIP 2 from open_clip: embeddings equal open_clip's, and the tokenizers are kept."""

from __future__ import annotations

import json
import re
import shutil
import warnings

import open_clip
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast.checkpoint import (
    UntrainedAggregatorsWarning,
    convert,
    fingerprint,
    identify,
    import_state_dict,
    load,
    save,
    verify,
)
from finelip_fast.checkpoint.architecture import config_from_open_clip
from finelip_fast.errors import CheckpointError, ConfigError, InputError
from finelip_fast.model import FineLIP
from finelip_fast.tokenizer import FileTokenizer, encode_batch, tokenize

from .files import assert_same_weights, load_untrained

POSITIONS = 16
CAPTIONS = [
    *("", "a red house", "A red_house, left of the TREE!", "cafÃ© &amp; trees", "</s> <eos>", "zebra 42"),
    *("the " * 13 + "car", "the " * 14 + "car", "the " * 15 + "car", "the red car drives left of two trees " * 3),
]


@pytest.fixture
def siglip(open_clip_siglip):
    return open_clip_siglip


@pytest.fixture
def folder(siglip, tmp_path):
    """A copy to damage."""
    return shutil.copytree(siglip.folder, tmp_path / "siglip")


def their_tokens(siglip, captions, context_length=POSITIONS):
    pytest.importorskip("transformers")
    tokenizer = open_clip.tokenizer.HFTokenizer(str(siglip.folder), context_length, clean="canonicalize")
    return tokenizer(captions)


@torch.inference_mode()
def test_embeddings_are_open_clip_s_own(siglip):
    model = load_untrained(siglip.folder, context_length=POSITIONS)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = siglip.model.encode_image(pixels, normalize=True)
    torch.testing.assert_close(model.encode_image(pixels)[:, 0], expected, atol=1e-5, rtol=0)
    ids = their_tokens(siglip, CAPTIONS)
    expected = siglip.model.encode_text(ids, normalize=True)
    for tokens in (ids, encode_batch(CAPTIONS, POSITIONS, tokenizer=model.tokenizer, warn=False).ids):
        torch.testing.assert_close(model.encode_text(tokens)[:, 0], expected[: len(tokens)], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_captions_that_fit_are_open_clip_s_own_in_a_long_context_too(siglip):
    model = load_untrained(siglip.folder)
    assert model.config.context_length == 256
    batch = encode_batch(CAPTIONS, 256, tokenizer=model.tokenizer)
    short = batch.lengths <= POSITIONS
    assert 0 < short.sum() < len(short)
    expected = siglip.model.encode_text(their_tokens(siglip, CAPTIONS), normalize=True)
    torch.testing.assert_close(model.encode_text(batch.ids)[short, 0], expected[short], atol=1e-5, rtol=0)


def test_tokens_are_open_clip_s_own(siglip):
    tokenizer = load_untrained(siglip.folder).tokenizer
    batch = encode_batch(CAPTIONS, POSITIONS, tokenizer=tokenizer, warn=False)
    ids = their_tokens(siglip, CAPTIONS)
    for row, expected, length in zip(batch.ids, ids, batch.lengths.tolist(), strict=True):
        assert row[:length].tolist() == expected[:length].tolist()
        assert set(expected[length:].tolist()) <= {load_untrained(siglip.folder).config.pad_token}


@torch.inference_mode()
def test_probabilities_are_open_clip_s_own(siglip, tmp_path):
    model = load_untrained(siglip.folder)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = their_tokens(siglip, CAPTIONS[:4])
    images, texts, scale, bias = siglip.model(pixels, ids)
    expected = torch.sigmoid(scale * images @ texts.T + bias)
    probabilities = model.probability(model.encode_image(pixels), model.encode_text(ids))
    torch.testing.assert_close(probabilities, expected, atol=1e-5, rtol=1e-4)
    save(model, tmp_path)
    assert load_untrained(tmp_path).config.logit_bias == model.config.logit_bias == pytest.approx(bias.item())
    expected_fingerprint = fingerprint(model)
    model.config = model.config.replace(logit_bias=None)
    assert fingerprint(model) == expected_fingerprint
    with pytest.raises(InputError, match=r"a SigLIP model with logit_bias, got .* compare scores with each other"):
        model.probability(model.encode_image(pixels), model.encode_text(ids))


def test_the_configuration_says_what_the_model_is(siglip):
    config = load_untrained(siglip.folder).config
    assert (config.family, config.resize_mode, config.image_mean) == ("siglip", "squash", (0.5, 0.5, 0.5))
    assert (config.vision_layers, config.vision_heads, config.text_heads) == (2, 3, 4)
    assert (config.vision_tanh_gelu, config.text_tanh_gelu) == (True, "act_kwargs" in siglip.model_cfg["text_cfg"])
    assert (config.text_positions, config.context_length, config.end_token) == (POSITIONS, 256, 1)
    assert config.pad_token == (0 if config.text_tanh_gelu else 1)
    model = load_untrained(siglip.folder)
    assert config.parameters == sum(parameter.numel() for parameter in model.parameters())


def test_the_tokenizer_travels_with_the_checkpoint(siglip, tmp_path):
    model = load_untrained(siglip.folder)
    save(model, tmp_path / "saved")
    assert (tmp_path / "saved/tokenizer.json").read_bytes() == (siglip.folder / "tokenizer.json").read_bytes()
    loaded = load_untrained(tmp_path / "saved")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert loaded.tokenizer.tokens("a red house") == model.tokenizer.tokens("a red house")
    assert isinstance(identify_quietly(tmp_path / "saved").tokenizer, FileTokenizer)
    assert fingerprint(loaded) == fingerprint(model) == verify(tmp_path / "saved")["fingerprint"]


def identify_quietly(folder):
    with pytest.warns(UserWarning, match="no trained aggregators"):
        return identify(folder)


@pytest.fixture
def in_open_clip_s_list(siglip, monkeypatch):
    """Add the model with its configuration to open_clip's list."""
    monkeypatch.setattr(open_clip, "list_models", lambda: ["ViT-Test-SigLIP"])
    monkeypatch.setattr(open_clip, "get_model_config", {"ViT-Test-SigLIP": siglip.model_cfg}.get)
    return "open_clip:ViT-Test-SigLIP"


def test_a_name_of_open_clip_s_brings_the_tokenizer_that_it_names(siglip, in_open_clip_s_list, hub, monkeypatch):
    remote, calls = hub
    shutil.copytree(siglip.folder, remote / "timm/ViT-Test-SigLIP")
    preprocess = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    pretrained = {"hf_hub": "timm/ViT-Test-SigLIP/", **preprocess}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda *_: pretrained)
    weights = siglip.folder / "open_clip_model.safetensors"
    cached = shutil.copy(weights, remote.parent / "cached.safetensors")
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: str(cached))
    model = load_untrained(f"{in_open_clip_s_list}/webli")
    assert model.config == load_untrained(siglip.folder).config
    assert calls == [
        ("timm/ViT-Test-SigLIP", ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")),
    ]


def test_a_file_of_weights_has_its_tokenizer_beside_it(siglip, in_open_clip_s_list, folder, hub):
    model = load_untrained(f"{in_open_clip_s_list}/{folder / 'open_clip_model.safetensors'}")
    assert model.config == load_untrained(siglip.folder).config
    (folder / "tokenizer.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"download failed; tried tokenizer\.json.* of huggingface\.co/timm/ViT-Test"
    ):
        load(f"{in_open_clip_s_list}/{folder / 'open_clip_model.safetensors'}")


def test_a_hub_repository_comes_with_its_tokenizer(siglip, hub):
    remote, calls = hub
    shutil.copytree(siglip.folder, remote / "timm/ViT-Test-SigLIP")
    model = load_untrained("hf-hub:timm/ViT-Test-SigLIP")
    assert model.config == load_untrained(siglip.folder).config
    save(model, remote / "org/ours")
    assert load_untrained("org/ours").tokenizer.content == model.tokenizer.content
    assert [patterns[0] for name, patterns in calls if name == "org/ours"] == [
        *("config.json", "tokenizer.json", "model.safetensors"),
    ]


def test_converting_says_what_it_is(siglip, tmp_path):
    summary = convert(siglip.folder, tmp_path / "out", context_length=POSITIONS)
    assert (summary["family"], summary["layout"]) == ("siglip", "open_clip SigLIP")
    assert load_untrained(tmp_path / "out").config.context_length == POSITIONS
    assert load_untrained(tmp_path / "out", context_length=100).config.context_length == 100
    with pytest.raises(ConfigError, match="context_length of at least 16"):
        convert(siglip.folder, tmp_path / "out", context_length=POSITIONS - 1)


@pytest.mark.parametrize("name", [name for name in open_clip.list_models() if "SigLIP" in name])
def test_every_siglip_of_open_clip_s_is_understood(name):
    cfg = open_clip.get_model_config(name)
    if name == "ViT-SO400M-14-SigLIP-384":
        with pytest.raises(
            CheckpointError, match=r"384 pixels in patches of 14.* last 6 .*; use the model of 378 pixels"
        ):
            config_from_open_clip(cfg)
        return
    if name == "ViT-SO400M-16-SigLIP-i18n-256":
        with pytest.raises(CheckpointError, match=r"text_cfg\.proj_type='none'"):
            config_from_open_clip(cfg)
        return
    config = config_from_open_clip(cfg)
    assert (config.family, config.vocab_size) == ("siglip", cfg["text_cfg"]["vocab_size"])
    assert (config.image_size, config.embed_dim) == (cfg["vision_cfg"]["image_size"], cfg["embed_dim"])
    assert config.text_positions == config.context_length == cfg["text_cfg"]["context_length"]
    assert config.text_tanh_gelu == ("SigLIP2" in name)


@pytest.mark.parametrize(
    ("part", "option", "value", "message"),
    [
        ("vision_cfg", "timm_pool", "avg", r"vision_cfg\.timm_pool='avg'"),
        ("vision_cfg", "timm_model_name", "hf-hub:stranger/siglip", r"a SigLIP of timm .*got 'hf-hub:stranger/siglip'"),
        ("vision_cfg", "timm_model_name", "vit_no_siglip", "a SigLIP of timm"),
        ("vision_cfg", "image_size", 64, r"pictures of 32 pixels .*got 64"),
        ("text_cfg", "pool_type", "first", r"text_cfg\.pool_type='first'"),
        ("text_cfg", "tokenizer_kwargs", {"clean": "lower"}, r"text_cfg\.tokenizer_kwargs={'clean': 'lower'}"),
        ("text_cfg", "act_kwargs", {"approximate": "half"}, r"text_cfg\.act_kwargs"),
        ("text_cfg", "embed_cls", True, r"text_cfg\.embed_cls=True"),
        ("text_cfg", "width", "wide", r"text_cfg\.width='wide'"),
    ],
)
def test_what_no_siglip_has_is_named(siglip, part, option, value, message):
    cfg = json.loads(json.dumps(siglip.model_cfg))
    cfg[part][option] = value
    with pytest.raises(CheckpointError, match=message):
        config_from_open_clip(cfg)


def change_tokenizer(folder, **changes):
    values = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


def without_end(folder):
    values = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(values | {"post_processor": None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            r"tokenizer\.json: no such file; a SigLIP needs",
        ),
        (
            lambda folder: (folder / "tokenizer.json").write_bytes(b"{}"),
            r"tokenizer\.json: expected a tokenizer, found",
        ),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), r"expected pad_token in tokenizer_config\.json"),
        (lambda folder: change_tokenizer(folder, pad_token="<none>"), "to be one of its tokens, found '<none>'"),
        (lambda folder: change_tokenizer(folder, padding_side="left"), "padding_side 'right'"),
        (without_end, r"adds an end token to a caption and nothing else, found one that adds the tokens \[\]"),
    ],
)
def test_a_tokenizer_that_cannot_be_used(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_map_of_special_tokens_says_it_too(folder, siglip):
    token = json.loads((folder / "tokenizer_config.json").read_text())["pad_token"]
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": token, "lstrip": False}}))
    assert load_untrained(folder).config == load_untrained(siglip.folder).config


def test_another_model_s_tokenizer_is_refused(siglip, tmp_path):
    model = load_untrained(siglip.folder)
    tokenizer = FileTokenizer(model.tokenizer.content, 1, vocab_size=20)
    with pytest.raises(CheckpointError, match=r"ids below 20, .* another model's tokenizer"):
        tokenizer.tokens("a red house")
    save(model, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(model.tokenizer.content + b"\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected the tokenizer of SHA-256"):
        load(tmp_path)
    with pytest.raises(InputError, match="the tokenizer that its configuration names"):
        save(FineLIP(model.config), tmp_path)


def test_weights_alone_are_not_enough(siglip, tmp_path):
    shutil.copy(siglip.folder / "open_clip_model.safetensors", tmp_path / "siglip.safetensors")
    state = safetensors.torch.load_file(tmp_path / "siglip.safetensors")
    for open_it in (lambda: load(tmp_path / "siglip.safetensors"), lambda: import_state_dict(state, activation="gelu")):
        with pytest.raises(CheckpointError, match=r"weights of a SigLIP .*open_clip:ViT-B-16-SigLIP/FILE, or a folder"):
            open_it()


@torch.inference_mode()
def test_a_patch_s_feature_is_what_the_pool_gives_where_it_looks_there_alone(siglip):
    model = load_untrained(siglip.folder)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = model.visual(pixels)[0, 1:]
    patches = siglip.model.visual.trunk.forward_features(pixels)[0]
    alone = siglip.model.visual.trunk.attn_pool(patches[:, None])  # as if each picture had one patch
    torch.testing.assert_close(features, alone, atol=1e-5, rtol=0)


def test_clip_s_configuration_and_fingerprint_are_as_before(model, saved):
    values = json.loads((saved / "config.json").read_text())
    names = {"family", "text_positions", "pad_token", "end_token", "tokenizer", "logit_bias", "text_tanh_gelu"}
    assert not names & set(values)
    assert not re.search("siglip", json.dumps(model.config.to_dict()))


@settings(settings.get_profile("fuzz"))
@given(data=st.data(), name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "open_clip_config.json"]))
def test_a_damaged_file_gives_an_error_or_a_model(siglip, tmp_path_factory, damage_json, data, name):
    folder = shutil.copytree(siglip.folder, tmp_path_factory.mktemp("damaged") / "siglip")
    (folder / name).write_bytes(damage_json(data, json.loads((folder / name).read_text())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UntrainedAggregatorsWarning)
        try:
            model = load(folder)
            ids = tokenize(["a red house, Ωmega zebra 42"], overflow="error", tokenizer=model.tokenizer)
        except (CheckpointError, ConfigError, InputError):
            return
    assert model.encode_text(ids).isfinite().all()


def test_a_model_card_says_what_it_came_from(siglip, tmp_path):
    load_untrained(siglip.folder).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "- siglip\n" in card
    assert "extends SigLIP to 256 text tokens" in card
