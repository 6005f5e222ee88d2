"""Pipelines read 256 tokens with FineLIP's encoder, and their results for 77 tokens are unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import finelip_fast
from finelip_fast.checkpoint import stretch_positions
from finelip_fast.diffusion import extend, prompt_embeddings
from finelip_fast.errors import ConfigError, InputError, TruncationWarning
from finelip_fast.model import FineLIP

SHORT = ["A red house, isn't it? It is 3.5 m high.", "a cat"]
# 200 tokens, in sentences of 22.
LONG = "A man in a pink coat carries a yellow umbrella past the red door of a small grey house, today. " * 9
ALONE = 3  # number of first tokens that are compared with another run of the encoder

Make = Callable[..., FineLIP]


@pytest.fixture(scope="module")
def model(make_model: Make) -> FineLIP:
    return make_model(text_layers=3)


@pytest.fixture(scope="module")
def clip(tiny_pipelines: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A plain CLIP of transformers, saved, and its text encoder as in pipelines."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPVisionConfig

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(3)
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=32,
        patch_size=16,
    )
    texts = tiny_pipelines.text_config(tiny_pipelines.TEXT_WIDTH, bos_token_id=49406, eos_token_id=49407)
    model = CLIPModel(CLIPConfig(text_config=texts.to_dict(), vision_config=vision.to_dict(), projection_dim=48)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)
    encoder = CLIPTextModel(texts).eval()
    weights = {name.removeprefix("text_model."): tensor for name, tensor in model.text_model.state_dict().items()}
    encoder.load_state_dict({name: weights[name.removeprefix("text_model.")] for name in encoder.state_dict()})
    return folder, encoder


def encoded(pipeline: Any, prompts: list[str], negatives: list[str] | None, images: int = 1) -> list[Tensor]:
    with torch.no_grad():
        return list(
            pipeline.encode_prompt(
                prompt=prompts,
                device="cpu",
                num_images_per_prompt=images,
                do_classifier_free_guidance=True,
                negative_prompt=negatives,
            )
        )


def layers(model: FineLIP, ids: Tensor) -> list[Tensor]:
    """Return the output of each layer of our text encoder, and finally of the last LayerNorm."""
    text = model.text
    x = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
    outputs = [x]
    for block in text.transformer.resblocks:
        x = block(x, attn_mask=text.attn_mask[: ids.shape[1], : ids.shape[1]])
        outputs.append(x)
    return [*outputs, text.ln_final(x)]


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("negatives", [None, ["ugly", "blurred"]], ids=["zeros", "negatives"])
@pytest.mark.parametrize("kind", ["xl", "sd15"])
def test_plain_clip_at_77_tokens_is_what_the_pipeline_had(
    kind: str, negatives: list[str] | None, images: int, clip: tuple[Path, Any], tiny_pipelines: ModuleType
) -> None:
    folder, encoder = clip
    pipeline = getattr(tiny_pipelines, kind)(encoder)
    before = encoded(pipeline, SHORT, negatives, images)
    extend(pipeline, folder, context_length=77)
    assert pipeline.text_encoder is not encoder
    after = encoded(pipeline, SHORT, negatives, images)
    assert len(after) == {"xl": 4, "sd15": 2}[kind]
    for expected, got in zip(before, after, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    if images == 1:
        embeddings = prompt_embeddings(pipeline, SHORT, negatives)
        assert all(map(torch.equal, embeddings.arguments().values(), after))


@pytest.mark.parametrize("length", [248, 256])
@pytest.mark.parametrize("layer", [None, "penultimate", "last"])
def test_the_first_encoder_is_our_own(layer: Any, length: int, make_model: Make, tiny_pipelines: ModuleType) -> None:
    model = make_model(text_layers=3, context_length=length)
    pipeline = extend(tiny_pipelines.xl(), model, layer=layer)
    embeddings = prompt_embeddings(pipeline, [LONG, "a cat"])
    ids = pipeline.tokenizer([LONG, "a cat"], padding="max_length", max_length=length, return_tensors="pt").input_ids
    with torch.no_grad():
        *_, penultimate, _, last = layers(model, ids)
    expected = last if layer == "last" else penultimate
    width = tiny_pipelines.TEXT_WIDTH
    assert embeddings.prompt_embeds.shape == (2, length, width + tiny_pipelines.SECOND_WIDTH)
    torch.testing.assert_close(embeddings.prompt_embeds[..., :width], expected, rtol=0, atol=1e-5)


def test_stable_diffusion_15_reads_the_last_layer(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    for layer in (None, "last"):
        pipeline = extend(tiny_pipelines.sd15(), model, layer=layer)
        embeddings = prompt_embeddings(pipeline, LONG, "ugly")
        ids = pipeline.tokenizer([LONG], padding="max_length", max_length=256, return_tensors="pt").input_ids
        with torch.no_grad():
            torch.testing.assert_close(embeddings.prompt_embeds, layers(model, ids)[-1], rtol=0, atol=1e-5)
        assert embeddings.pooled_prompt_embeds is None
        assert list(embeddings.arguments()) == ["prompt_embeds", "negative_prompt_embeds"]


def test_stable_diffusion_15_can_read_the_penultimate_layer(
    tmp_path: Path, model: FineLIP, tiny_pipelines: ModuleType
) -> None:
    """Pictures are generated as with ``clip_skip=1``: from the layer before the last one, after the final LayerNorm."""
    pipeline = extend(tiny_pipelines.sd15(), model, layer="penultimate")
    embeddings = prompt_embeddings(pipeline, LONG)
    ids = pipeline.tokenizer([LONG], padding="max_length", max_length=256, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.text.ln_final(layers(model, ids)[-3])
    torch.testing.assert_close(embeddings.prompt_embeds, expected, rtol=0, atol=1e-5)
    pipeline.save_pretrained(tmp_path)
    again = type(pipeline).from_pretrained(tmp_path)
    assert torch.equal(prompt_embeddings(again, LONG).prompt_embeds, embeddings.prompt_embeds)


def test_the_last_layer_of_the_second_encoder_and_its_pooled_embedding(
    model: FineLIP, tiny_pipelines: ModuleType
) -> None:
    pipeline = extend(tiny_pipelines.xl(), model, layer="last")
    embeddings = prompt_embeddings(pipeline, LONG)
    ids = pipeline.tokenizer_2([LONG], padding="max_length", max_length=256, return_tensors="pt").input_ids
    with torch.no_grad():
        output = pipeline.text_encoder_2(ids)
    assert torch.equal(embeddings.prompt_embeds[..., tiny_pipelines.TEXT_WIDTH :], output.last_hidden_state)
    assert embeddings.pooled_prompt_embeds is not None
    assert torch.equal(embeddings.pooled_prompt_embeds, output.text_embeds)
    plain = prompt_embeddings(extend(tiny_pipelines.xl(), model), LONG)
    torch.testing.assert_close(plain.pooled_prompt_embeds, embeddings.pooled_prompt_embeds)


def test_the_second_encoder_is_stretched_and_shares_its_weights(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    pipeline = tiny_pipelines.xl()
    parts = {name: getattr(pipeline, name) for name in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
    table = parts["text_encoder_2"].text_model.embeddings.position_embedding.weight
    before = encoded(pipeline, SHORT, None)
    assert extend(pipeline, model) is pipeline
    second = pipeline.text_encoder_2
    stretched = second.text_model.embeddings.position_embedding.weight
    assert torch.equal(stretched, stretch_positions(table.detach(), 256))
    weights, shared = (encoder.state_dict() for encoder in (parts["text_encoder_2"], second))
    assert weights.keys() == shared.keys()
    assert [name for name in weights if weights[name].data_ptr() != shared[name].data_ptr()] == [
        "text_model.embeddings.position_embedding.weight"
    ]
    assert second.config.max_position_embeddings == 256
    # The original parts stay usable, because other pipelines may share them.
    again = type(pipeline)(**{**pipeline.components, **parts}, add_watermarker=False)
    assert all(map(torch.equal, encoded(again, SHORT, None), before))
    assert parts["tokenizer"].model_max_length == 77


def test_prompt_and_negative_have_one_length(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    pipeline = extend(tiny_pipelines.xl(), model)
    zeros = prompt_embeddings(pipeline, [LONG, "a cat"])
    assert zeros.negative_prompt_embeds.shape == zeros.prompt_embeds.shape
    assert zeros.negative_pooled_prompt_embeds is not None
    assert not zeros.negative_prompt_embeds.any()
    assert not zeros.negative_pooled_prompt_embeds.any()
    for prompt, negative in ((LONG, "ugly"), ("a cat", LONG)):
        embeddings = prompt_embeddings(pipeline, prompt, negative)
        assert embeddings.negative_prompt_embeds.shape == embeddings.prompt_embeds.shape
        assert embeddings.negative_prompt_embeds.any()
    one_for_all = prompt_embeddings(pipeline, [LONG, "a cat"], "ugly")
    one_for_each = prompt_embeddings(pipeline, [LONG, "a cat"], ["ugly", "ugly"])
    assert all(map(torch.equal, one_for_all.arguments().values(), one_for_each.arguments().values()))


def test_words_behind_token_77_count(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    pipeline = extend(tiny_pipelines.xl(), model)
    first, second = (prompt_embeddings(pipeline, LONG + end).prompt_embeds for end in ("A dog.", "A cat."))
    assert torch.equal(first[:, :199], second[:, :199])
    assert not torch.equal(first, second)


@pytest.mark.parametrize("negative", [None, "ugly"])
def test_weights_of_words_are_text(negative: str | None, model: FineLIP, tiny_pipelines: ModuleType) -> None:
    pipeline = extend(tiny_pipelines.xl(), model)
    ids = pipeline.tokenizer("(red:1.2)").input_ids
    assert pipeline.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "(red:1.2)"
    first, second = (prompt_embeddings(pipeline, text, negative) for text in ("(red:1.2) house", "red house"))
    assert not torch.equal(first.prompt_embeds, second.prompt_embeds)


@pytest.mark.parametrize("kind", ["xl", "refiner", "sd15"])
@pytest.mark.parametrize("cut", ["prompt", "negative prompt"])
def test_cut_text_is_reported(kind: str, cut: str, model: FineLIP, tiny_pipelines: ModuleType) -> None:
    pipeline = extend(getattr(tiny_pipelines, kind)(), model)
    texts = [LONG * 2, "a cat"] if cut == "prompt" else ["a cat", LONG * 2]
    with pytest.warns(TruncationWarning, match="1 of 1 prompts was cut to 256 tokens; it lost 142"):
        prompt_embeddings(pipeline, *texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt_embeddings(pipeline, LONG, LONG)


@pytest.mark.parametrize(
    ("layer", "second", "class_names"),
    [
        (None, "stretch", set()),
        ("last", "stretch", {"LastLayerTextModel", "LastLayerTextModelWithProjection"}),
        (None, "windows", {"WindowedTextModelWithProjection"}),
        ("last", "windows", {"LastLayerTextModel", "WindowedLastLayerTextModelWithProjection"}),
    ],
)
def test_a_saved_pipeline_computes_the_same(
    layer: Any, second: Any, class_names: set[str], model: FineLIP, tiny_pipelines: ModuleType, tmp_path: Path
) -> None:
    """diffusers opens it; if all parts are from diffusers and transformers, it has no reference to this library."""
    pipeline = extend(tiny_pipelines.xl(), model, layer=layer, second=second)
    expected = prompt_embeddings(pipeline, [LONG, "a cat"], "ugly")
    pipeline.save_pretrained(tmp_path)
    opened = type(pipeline).from_pretrained(tmp_path)
    got = prompt_embeddings(opened, [LONG, "a cat"], "ugly")
    assert all(map(torch.equal, expected.arguments().values(), got.arguments().values()))
    configuration = "".join(path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.json"))
    assert ("finelip_fast" in configuration) == bool(class_names)
    assert all(name in configuration for name in class_names)
    assert opened.tokenizer.model_max_length == opened.tokenizer_2.model_max_length == 256


def test_a_pipeline_can_be_extended_again(model: FineLIP, make_model: Make, tiny_pipelines: ModuleType) -> None:
    pipeline = extend(tiny_pipelines.xl(), model, layer="last", second="windows")
    pipeline = extend(pipeline, model)
    expected = prompt_embeddings(extend(tiny_pipelines.xl(), model), LONG)
    got = prompt_embeddings(pipeline, LONG)
    assert all(map(torch.equal, expected.arguments().values(), got.arguments().values()))
    pipeline = extend(pipeline, make_model(seed=1, text_layers=3))
    assert not torch.equal(prompt_embeddings(pipeline, LONG).prompt_embeds, got.prompt_embeds)
    with pytest.raises(
        InputError, match="expected a second encoder of 77 positions for windows, got 256, already stretched"
    ):
        extend(pipeline, model, second="windows")
    with pytest.raises(InputError, match="of at most 77 positions, as the checkpoint has, got 256"):
        extend(pipeline, make_model(text_layers=3, context_length=77))


def test_checkpoints_are_taken_by_name_and_made_longer(
    model: FineLIP, tiny_pipelines: ModuleType, tmp_path: Path
) -> None:
    finelip_fast.save(model, tmp_path / "checkpoint")
    got = prompt_embeddings(extend(tiny_pipelines.sd15(), tmp_path / "checkpoint"), LONG)
    expected = prompt_embeddings(extend(tiny_pipelines.sd15(), model), LONG)
    assert torch.equal(got.prompt_embeds, expected.prompt_embeds)
    longer = extend(tiny_pipelines.xl(), model, context_length=300)
    assert prompt_embeddings(longer, LONG).prompt_embeds.shape[1] == 300
    with pytest.raises(ConfigError, match="expected context_length of at least 256"):
        extend(tiny_pipelines.xl(), model, context_length=100)


def test_precision_is_the_pipelines(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    pipeline = extend(tiny_pipelines.xl().to(dtype=torch.bfloat16), model, second="windows")
    embeddings = prompt_embeddings(pipeline, LONG, "ugly")
    assert {tensor.dtype for tensor in embeddings.arguments().values()} == {torch.bfloat16}
    assert pipeline.text_encoder.dtype == torch.bfloat16
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "first"}, "expected layer to be one of penultimate, last, got 'first'"),
        ({"second": "cut"}, "expected second to be one of stretch, windows, got 'cut'"),
        ({"second": "windows"}, "StableDiffusionPipeline has no second CLIP encoder"),
    ],
)
def test_arguments_that_fit_no_pipeline(
    arguments: dict[str, Any], message: str, model: FineLIP, tiny_pipelines: ModuleType
) -> None:
    with pytest.raises(InputError, match=message):
        extend(tiny_pipelines.sd15(), model, **arguments)


@pytest.mark.parametrize("layer", ["penultimate", "last"])
def test_flux_reads_no_layer(layer: Any, model: FineLIP, tiny_pipelines: ModuleType) -> None:
    with pytest.raises(InputError, match=f"expected no layer, got '{layer}': FluxPipeline reads only the pooled"):
        extend(tiny_pipelines.flux(), model, layer=layer)


def test_a_text_encoder_of_another_family_is_refused(open_clip_siglip: Any, tiny_pipelines: ModuleType) -> None:
    with pytest.raises(
        InputError, match=r"expected a checkpoint of CLIP's family, with which .* was trained, got siglip"
    ):
        extend(tiny_pipelines.xl(), open_clip_siglip.folder)


def test_what_cannot_be_extended_is_refused(model: FineLIP, make_model: Make, tiny_pipelines: ModuleType) -> None:
    pipeline = tiny_pipelines.xl()
    before = pipeline.text_encoder
    with pytest.raises(
        InputError, match=r"expected a checkpoint of text width 64, .* CLIPTextModel, got 32; .* ViT-L/14"
    ):
        extend(pipeline, make_model(text_width=32))
    assert pipeline.text_encoder is before
    with pytest.raises(InputError, match=r"expected a diffusers pipeline with a CLIP text encoder .*, got dict"):
        extend({}, model)
    inverted = tiny_pipelines.xl()
    inverted.tokenizer.add_tokens("<my-cat>")
    with pytest.raises(InputError, match="got 49409; a textual inversion is loaded"):
        extend(inverted, model)
    with_other_tokenizer = tiny_pipelines.xl()
    with_other_tokenizer.tokenizer = tiny_pipelines.tokenizer(bos_token="!")
    with pytest.raises(InputError, match="expected a pipeline with CLIP's tokenizer"):
        extend(with_other_tokenizer, model)
    quantized = tiny_pipelines.xl()
    quantized.text_encoder_2.is_quantized = True
    with pytest.raises(InputError, match="expected a text_encoder_2 in floating point, got a quantized one"):
        extend(quantized, model)
    offloaded = tiny_pipelines.xl()
    offloaded.text_encoder._hf_hook = object()
    with pytest.raises(InputError, match="expected a text_encoder without offloading; extend the pipeline first"):
        extend(offloaded, model)


def test_prompts_that_fit_no_pipeline(tiny_pipelines: ModuleType) -> None:
    pipeline = tiny_pipelines.sd15()
    with pytest.raises(InputError, match="expected 1 or 1 negative prompts for 1 prompts, got 2"):
        prompt_embeddings(pipeline, "a cat", ["ugly", "blurred"])
    with pytest.raises(InputError, match="expected at least one prompt"):
        prompt_embeddings(pipeline, [])
    with pytest.raises(InputError, match="expected prompts of type str, got 3"):
        prompt_embeddings(pipeline, [3])  # type: ignore[list-item]
    with pytest.raises(InputError, match="expected a pipeline whose encode_prompt takes a negative prompt, got dict"):
        prompt_embeddings({}, "a cat")


def test_missing_packages_are_named(model: FineLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"need diffusers and transformers: pip install 'finelip-fast\[diffusion\]'"):
        extend(object(), model)
