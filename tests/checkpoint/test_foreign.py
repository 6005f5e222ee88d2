"""Other projects' state dicts: equal embeddings, and every weight, size and table as the method defines."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finelip_fast.checkpoint import config_from_open_clip, import_state_dict, stretch_positions
from finelip_fast.checkpoint.architecture import config_from_transformers
from finelip_fast.checkpoint.foreign import text_for_transformers, translate
from finelip_fast.config import CLIP_MEAN, FineLIPConfig, mlp_ratio
from finelip_fast.errors import CheckpointError, ConfigError

VISION = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}


def make_clip(model_class=open_clip.CLIP, seed: int = 0, **changes) -> nn.Module:
    """Return a small open_clip model with no parameter at a trivial value."""
    cfg = {"embed_dim": 48, "vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True} | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(**cfg)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


@pytest.fixture(scope="module")
def clip():
    return make_clip()


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def captions(make_captions):
    """Captions within the first 20 positions, which stretching leaves unchanged."""
    return make_captions([3, 11, 20], 77)


def as_longclip(state: dict[str, Tensor], length: int = 248) -> dict[str, Tensor]:
    """Return Long-CLIP's two position tables; the halves that must not be read are NaN."""
    table = stretch_positions(state["positional_embedding"], length)
    first_rows, rest = table.clone(), table.clone() + 1.0
    first_rows[20:], rest[:20] = torch.nan, torch.nan
    return state | {"positional_embedding": first_rows, "positional_embedding_res": rest}


def as_finelip(state: dict[str, Tensor], tokens: int = 5, hidden: int = 7) -> dict[str, Tensor]:
    """Return the layout of the released weights: Long-CLIP's plus two aggregators."""
    state, generator = as_longclip(state), torch.Generator().manual_seed(1)
    for name in ("aggr_net", "cap_aggr_net"):
        for part, shape in {
            "weight.0.weight": (48,),
            "weight.0.bias": (48,),
            "weight.1.weight": (hidden, 48),
            "weight.1.bias": (hidden,),
            "weight.3.weight": (tokens, hidden),
            "weight.3.bias": (tokens,),
            "scale": (1, 1, 1),
        }.items():
            state[f"cross_net.{name}.{part}"] = torch.randn(shape, generator=generator)
    return state


def as_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return OpenAI's layout with transformers' names."""
    renamed: dict[str, Tensor] = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T.contiguous(),
        "text_projection.weight": state["text_projection"].T.contiguous(),
        "vision_model.embeddings.class_embedding": state["visual.class_embedding"],
        "vision_model.embeddings.patch_embedding.weight": state["visual.conv1.weight"],
        "vision_model.embeddings.position_embedding.weight": state["visual.positional_embedding"],
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.token_embedding.weight": state["token_embedding.weight"],
        "text_model.embeddings.position_embedding.weight": state["positional_embedding"],
        "text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    for end in ("weight", "bias"):
        renamed[f"vision_model.pre_layrnorm.{end}"] = state[f"visual.ln_pre.{end}"]
        renamed[f"vision_model.post_layernorm.{end}"] = state[f"visual.ln_post.{end}"]
        renamed[f"text_model.final_layer_norm.{end}"] = state[f"ln_final.{end}"]
        for tower, blocks in (
            ("vision_model", "visual.transformer.resblocks"),
            ("text_model", "transformer.resblocks"),
        ):
            for layer in range(2):
                target, source = f"{tower}.encoder.layers.{layer}", f"{blocks}.{layer}"
                renamed[f"{target}.layer_norm1.{end}"] = state[f"{source}.ln_1.{end}"]
                renamed[f"{target}.layer_norm2.{end}"] = state[f"{source}.ln_2.{end}"]
                renamed[f"{target}.mlp.fc1.{end}"] = state[f"{source}.mlp.c_fc.{end}"]
                renamed[f"{target}.mlp.fc2.{end}"] = state[f"{source}.mlp.c_proj.{end}"]
                renamed[f"{target}.self_attn.out_proj.{end}"] = state[f"{source}.attn.out_proj.{end}"]
                joined = state[f"{source}.attn.in_proj_{end}"]
                for part, third in zip("qkv", joined.chunk(3), strict=True):
                    renamed[f"{target}.self_attn.{part}_proj.{end}"] = third.clone()
    return renamed


def assert_same_embeddings(model, clip, pixels, captions, tolerance=1e-5):
    """Assert that row 0 equals the other library's normalised global embedding."""
    with torch.no_grad():
        for embeddings, expected in (
            (model.encode_image(pixels), clip.encode_image(pixels)),
            (model.encode_text(captions), clip.encode_text(captions)),
        ):
            torch.testing.assert_close(embeddings[:, 0], F.normalize(expected, dim=-1), rtol=0, atol=tolerance)


def imported(state, **options):
    """Import weights that determine neither their heads nor their activation."""
    return import_state_dict(state, **{"activation": "quick_gelu", "heads": (2, 1), **options})


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("model_class", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_clip_layouts_give_the_same_embeddings(model_class, quick_gelu, pixels, captions):
    clip = make_clip(model_class, quick_gelu=quick_gelu)
    model = imported(clip.state_dict(), activation="quick_gelu" if quick_gelu else "gelu")
    assert model.config == FineLIPConfig(
        embed_dim=48,
        image_size=32,
        patch_size=8,
        vision_width=128,
        vision_layers=2,
        vision_heads=2,
        text_width=64,
        text_layers=2,
        text_heads=1,
        quick_gelu=quick_gelu,
        trained_aggregators=False,
    )
    assert_same_embeddings(model, clip, pixels, captions)
    assert not model.training
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())


def test_a_full_caption_agrees_at_the_original_length(clip, pixels, make_captions):
    model = imported(clip.state_dict(), context_length=77)
    assert model.config.context_length == 77
    assert_same_embeddings(model, clip, pixels, make_captions([77, 40], 77))


def test_transformers_names_give_the_same_embeddings(clip, pixels, captions):
    state = as_transformers(clip.state_dict())
    assert translate(state).layout == "transformers CLIPModel"
    assert_same_embeddings(imported(state), clip, pixels, captions)


def test_longclip_takes_the_first_rows_of_one_table_and_the_rest_of_the_other(clip, pixels, captions):
    state = as_longclip(clip.state_dict())
    model = imported(state)
    table = model.text.positional_embedding
    assert (model.config.context_length, model.config.trained_aggregators) == (248, False)
    torch.testing.assert_close(table[:20], state["positional_embedding"][:20], rtol=0, atol=0)
    torch.testing.assert_close(table[20:], state["positional_embedding_res"][20:], rtol=0, atol=0)
    assert_same_embeddings(model, clip, pixels, captions)


def test_finelip_brings_its_aggregators(clip, pixels, captions, method):
    state = as_finelip(clip.state_dict())
    model = imported(state)
    config = model.config
    assert (config.context_length, config.aggregated_tokens, config.aggregator_hidden) == (248, 5, 7)
    assert config.trained_aggregators
    assert_same_embeddings(model, clip, pixels, captions)
    for aggregator, prefix in ((model.image_aggregator, "aggr_net"), (model.text_aggregator, "cap_aggr_net")):
        prefix = f"cross_net.{prefix}."
        for part, name in {"norm": "weight.0", "hidden": "weight.1", "logits": "weight.3"}.items():
            for end in ("weight", "bias"):
                assert torch.equal(getattr(getattr(aggregator, part), end), state[f"{prefix}{name}.{end}"]), (
                    prefix,
                    part,
                )
        assert aggregator.scale.shape == ()
        assert aggregator.scale.item() == state[f"{prefix}scale"].item()


def test_our_own_state_dict_comes_back(make_model):
    original = make_model(context_length=90, text_heads=1, vision_heads=1)
    model = imported(original.state_dict(), activation="quick_gelu", heads=1)
    assert model.config == original.config
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_the_text_tower_goes_to_transformers_and_back(make_model):
    weights = make_model().state_dict()
    exported = text_for_transformers(weights)
    assert all(name == "text_projection.weight" or name.startswith("text_model.") for name in exported)
    tensors = translate(exported).tensors
    assert tensors.keys() == {name for name in weights if name.startswith("text.")}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in tensors.items())


def test_sizes_that_no_default_covers(pixels, captions):
    vision = VISION | {"width": 96, "head_width": 32, "mlp_ratio": 4.3637, "patch_size": 16, "layers": 3}
    clip = make_clip(vision_cfg=vision, text_cfg=TEXT | {"heads": 4, "layers": 1, "mlp_ratio": 2.0})
    model = imported(clip.state_dict(), heads=(3, 4))
    assert (model.config.image_size, model.config.vision_layers, model.config.text_layers) == (32, 3, 1)
    assert_same_embeddings(model, clip, pixels, captions)


@pytest.mark.parametrize("width", [1408, 1664, 192, 70])
def test_a_ratio_gives_the_hidden_width_back(width):
    for hidden in range(width, 5 * width, 7):
        assert int(width * mlp_ratio(hidden, width)) == hidden


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_precision_becomes_float32(clip, dtype):
    state = {name: tensor.to(dtype) for name, tensor in clip.state_dict().items()}
    model = imported(state)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.visual.proj, state["visual.proj"].float())


@pytest.mark.parametrize("nest", [(), ("state_dict",), ("model",), ("model_state_dict",), ("model", "state_dict")])
def test_wrappers_and_extras_do_not_matter(clip, nest, pixels, captions):
    state = {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}
    state |= {
        "module.input_resolution": torch.tensor(32),
        "module.context_length": torch.tensor(77),
        "module.vocab_size": torch.tensor(49408),
        "module.attn_mask": torch.zeros(77, 77),
        "module.logit_bias": torch.tensor(-10.0),
        "version": 3,
    }
    for key in nest:
        state = {key: state, "epoch": 3, "seen": torch.tensor(5)}
    assert_same_embeddings(imported(state), clip, pixels, captions)


def test_the_model_shares_no_memory_with_its_source(clip):
    state = {name: tensor.clone() for name, tensor in clip.state_dict().items()}
    model = imported(state)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tensor in state.values():
        tensor.fill_(torch.nan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_untrained_aggregators_start_the_same_and_draw_nothing(clip):
    torch.manual_seed(1)
    generator = torch.random.get_rng_state()
    first = imported(clip.state_dict())
    assert torch.equal(torch.random.get_rng_state(), generator)
    torch.manual_seed(2)
    second = imported(clip.state_dict())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    # Initialised like nn.Linear: within its bound, and reaching it.
    weight = first.image_aggregator.hidden.weight
    assert 0.9 * 48**-0.5 < weight.abs().max() <= 48**-0.5
    assert not torch.equal(weight, first.text_aggregator.hidden.weight)


# Context --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "context_length", "expected"),
    [(77, None, 256), (77, 100, 100), (64, None, 256), (120, None, 120), (120, 300, 300)],
)
def test_context_length(clip, rows, context_length, expected):
    table = torch.randn(rows, 64, generator=torch.Generator().manual_seed(0))
    model = imported(clip.state_dict() | {"positional_embedding": table}, context_length=context_length)
    assert model.config.context_length == expected
    assert model.text.attn_mask.shape == (expected, expected)
    torch.testing.assert_close(model.text.positional_embedding, stretch_positions(table, expected), rtol=0, atol=0)


def test_a_stretched_model_reads_long_captions(clip, make_captions):
    model = imported(clip.state_dict(), context_length=300)
    ids = make_captions([300, 5], 300)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids)[1], model.encode_text(ids[1:, :5])[0], rtol=0, atol=1e-5)


def test_a_shorter_context_is_refused(clip):
    with pytest.raises(ConfigError, match=r"at least 77.*got 50.*tokenize"):
        imported(clip.state_dict(), context_length=50)


# What is no checkpoint ------------------------------------------------------------------------------------------------


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"visual.extra": torch.zeros(3)}, r"unknown: visual\.extra$"),
        (lambda s: s | {f"odd.{i:02}": torch.zeros(3) for i in range(12)}, r"odd\.09 and 2 more$"),
        (
            lambda s: without(s, "ln_final.bias", "visual.ln_pre.weight"),
            r"missing: .*ln_pre\.weight, text\.ln_final\.bias",
        ),
        (lambda s: without(s, "visual.proj"), r"missing visual\.proj; found .*logit_scale"),
        (lambda s: s | {"ln_final.bias": torch.zeros(9)}, r"misshapen: text\.ln_final\.bias \[9\].*expected \[64\]"),
        (lambda s: s | {"ln_final.bias": torch.zeros(64, dtype=torch.int8)}, r"ln_final\.bias \[64\] torch\.int8"),
        (lambda s: s | {"visual.proj": torch.zeros(3)}, r"visual\.proj with 2 dimensions, got the shape \[3\]"),
        (lambda s: s | {"visual.positional_embedding": torch.zeros(8, 128)}, "square grid of patches, got 7"),
        (lambda s: s | {"token_embedding.weight": torch.zeros(32000, 64)}, "49408 tokens, got 32000"),
        (
            lambda s: s | {"positional_embedding_res": torch.zeros(248, 64)},
            r"one shape, got \[77, 64\] and \[248, 64\]",
        ),
        (lambda s: as_transformers(s) | {"text_model.adapter": torch.zeros(1)}, r"unknown: text_model\.adapter$"),
        (lambda s: without(as_finelip(s), "cross_net.aggr_net.weight.3.weight"), r"image_aggregator\.logits\.weight"),
        (lambda s: {"fc.weight": torch.zeros(2, 2)}, r"missing visual\.conv1\.weight.*found fc\.weight"),
        (lambda s: {"epoch": 3, "lr": 0.1}, "got a dictionary with epoch, lr"),
        (lambda s: {}, "got a dictionary with nothing"),
        (lambda s: [torch.zeros(2)], "got a list"),
    ],
)
def test_what_does_not_fit_is_named(clip, change, message):
    with pytest.raises(CheckpointError, match=message):
        imported(change(clip.state_dict()))


def test_heads_must_be_given_and_divide():
    state = make_clip(vision_cfg=VISION | {"width": 96, "head_width": 32}).state_dict()
    with pytest.raises(
        CheckpointError, match=r"vision transformer: expected the width of a published CLIP \(384, .*got 96.*--heads"
    ):
        imported(state, heads=None)
    with pytest.raises(ConfigError, match="multiple of vision_heads"):
        imported(state, heads=5)


# Configurations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in open_clip.list_models() if n.startswith("ViT-")])
def test_every_open_clip_vision_transformer_is_understood_or_refused(name):
    cfg = open_clip.get_model_config(name)
    plain = cfg["text_cfg"].get("vocab_size") == 49408 and not set(cfg["vision_cfg"]) & {
        "timm_model_name",
        "ls_init_value",
    }
    plain = plain and not set(cfg["text_cfg"]) & {"hf_tokenizer_name", "no_causal_mask"}
    if "SigLIP" in name:
        return  # see test_siglip.py
    if not plain:
        with pytest.raises(CheckpointError, match="does not support"):
            config_from_open_clip(cfg)
        return
    config = config_from_open_clip(cfg)
    assert config.vision_heads == cfg["vision_cfg"]["width"] // cfg["vision_cfg"].get("head_width", 64)
    assert config.text_heads == cfg["text_cfg"]["heads"]
    assert config.quick_gelu == ("quickgelu" in name)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("RN50", r"vision_cfg\.layers=\[3, 4, 6, 3\]"),
        ("nllb-clip-base-siglip", r"vision_cfg\.timm_model_name='vit_base_patch16_siglip_384'"),
        ("ViT-H-14-CLIPA", r"vision_cfg\.no_ln_pre=True, vision_cfg\.pool_type='avg'"),
        ("ViT-H-14-CLIPA", r"text_cfg\.vocab_size=32000"),
        ("roberta-ViT-B-32", r"text_cfg\.hf_model_name='roberta-base'"),
        ("coca_ViT-L-14", r"multimodal_cfg=.*vision_cfg\.attentional_pool=True"),
        ("ViT-L-14-worldwide", r"text_cfg\.pool_type='eos'"),
    ],
)
def test_refused_options_are_named(name, option):
    with pytest.raises(CheckpointError, match=option):
        config_from_open_clip(open_clip.get_model_config(name))


def test_a_pretrained_tag_decides_pictures_and_activation():
    cfg = open_clip.get_model_config("ViT-B-16")
    openai = config_from_open_clip(cfg, open_clip.get_pretrained_cfg("ViT-B-16", "openai"))
    assert openai == FineLIPConfig.preset("ViT-B-16", context_length=77)
    assert not config_from_open_clip(cfg, open_clip.get_pretrained_cfg("ViT-B-16", "laion2b_s34b_b88k")).quick_gelu
    squashed = config_from_open_clip(cfg, {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"})
    assert squashed.image_mean == (0.5, 0.5, 0.5)
    assert squashed.image_std == (0.25, 0.25, 0.25)
    assert squashed.resize_mode == "squash"
    with pytest.raises(CheckpointError, match=r"preprocess_cfg\.resize_mode='longest'"):
        config_from_open_clip(cfg, {"resize_mode": "longest"})
    with pytest.raises(CheckpointError, match="embed_dim=None"):
        config_from_open_clip({"vision_cfg": VISION, "text_cfg": TEXT})


def test_transformers_settings(clip):
    tensors = translate(as_transformers(clip.state_dict())).tensors
    config = config_from_transformers(
        tensors,
        {
            "vision_config": {"num_attention_heads": 4, "hidden_act": "quick_gelu"},
            "vision_config_dict": {"hidden_act": "gelu"},
            "text_config": {"hidden_act": "gelu"},
        },
        {"image_mean": [0.1, 0.2, 0.3], "size": {"height": 32, "width": 32}},
    )
    assert (config.vision_heads, config.text_heads, config.quick_gelu) == (4, 8, False)
    assert (config.image_mean, config.resize_mode) == ((0.1, 0.2, 0.3), "squash")
    plain = config_from_transformers(tensors, {"vision_config": {"num_attention_heads": 4}, "text_config_dict": None})
    assert (plain.quick_gelu, plain.image_mean, plain.resize_mode) == (True, CLIP_MEAN, "shortest")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vision_config": {"hidden_act": "gelu"}}, r"hidden_act \['gelu', 'quick_gelu'\]"),
        ({"text_config": {"layer_norm_eps": 1e-6}}, r"layer_norm_eps \[1e-05, 1e-06\]"),
    ],
)
def test_other_transformers_settings_are_refused(clip, settings, message):
    with pytest.raises(CheckpointError, match=message):
        config_from_transformers(translate(as_transformers(clip.state_dict())).tensors, settings)
