"""Every input of a pipeline works on an extended one: text, pictures, masks, ControlNet, LoRA, the refiner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image

from finelip_fast.config import EOT_TOKEN
from finelip_fast.diffusion import extend, prompt_embeddings
from finelip_fast.errors import InputError
from finelip_fast.model import FineLIP

LONG = "A man in a pink coat carries a yellow umbrella past the red door of a small grey house, today. " * 9
SMALL = {"num_inference_steps": 2, "output_type": "np"}
SIZE = {"height": 32, "width": 32}
PHOTO = Image.new("RGB", (32, 32), "orange")
VISIBLE = 2e-4  # differences of pixels in [0, 1]; rounding is below a tenth of it
MASK = Image.new("L", (32, 32), 255)


@pytest.fixture(scope="module")
def model(make_model: Callable[..., FineLIP]) -> FineLIP:
    return make_model(text_layers=3)


def drawn(pipeline: Any, prompt: str, **options: Any) -> Any:
    """Return the picture of a prompt, float32 ``[H, W, 3]``, always from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(prompt, generator=torch.Generator().manual_seed(0), **SMALL, **options).images[0]
    assert picture.shape == (32, 32, 3)
    return torch.from_numpy(picture)


def check_that_the_end_counts(pipeline: Any, **options: Any) -> None:
    """Check that words after token 77 change the picture."""
    first, second = (drawn(pipeline, LONG + end, **options) for end in ("A dog.", "Cats, blue and green."))
    assert (first - second).abs().max() > VISIBLE
    torch.testing.assert_close(drawn(pipeline, LONG + "A dog.", **options), first, rtol=0, atol=VISIBLE / 10)


@pytest.mark.parametrize("second", ["stretch", "windows"])
def test_text(second: Any, model: FineLIP, tiny_pipelines: ModuleType) -> None:
    check_that_the_end_counts(extend(tiny_pipelines.xl(), model, second=second, layer="last"), **SIZE)


def test_text_of_stable_diffusion_15(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    check_that_the_end_counts(extend(tiny_pipelines.sd15(), model), negative_prompt="ugly", **SIZE)


def test_embeddings_stand_in_the_prompts_place(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    pipeline = extend(tiny_pipelines.xl(), model)
    embeddings = prompt_embeddings(pipeline, LONG, "ugly")
    picture = drawn(pipeline, None, **embeddings.arguments(), **SIZE)  # type: ignore[arg-type]
    expected = drawn(pipeline, LONG, negative_prompt="ugly", **SIZE)
    torch.testing.assert_close(picture, expected, rtol=0, atol=VISIBLE / 10)


@pytest.mark.parametrize("name", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"])
def test_pictures_and_masks(name: str, model: FineLIP, tiny_pipelines: ModuleType) -> None:
    import diffusers

    pipeline = getattr(diffusers, name).from_pipe(extend(tiny_pipelines.xl(), model))
    inputs: dict[str, Any] = {"image": PHOTO, "strength": 0.9}
    if "Inpaint" in name:
        inputs |= {"mask_image": MASK, **SIZE}
    check_that_the_end_counts(pipeline, **inputs)


def test_controlnet(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    from diffusers import StableDiffusionXLControlNetPipeline

    plain = tiny_pipelines.xl()
    pipeline = StableDiffusionXLControlNetPipeline.from_pipe(plain, controlnet=tiny_pipelines.controlnet(plain))
    check_that_the_end_counts(extend(pipeline, model), image=PHOTO, **SIZE)
    assert plain.tokenizer.model_max_length == 77


@pytest.mark.parametrize("second", ["stretch", "windows"])
def test_refiner(second: Any, model: FineLIP, tiny_pipelines: ModuleType) -> None:
    pipeline = extend(tiny_pipelines.refiner(), model, second=second)
    assert pipeline.text_encoder is None
    check_that_the_end_counts(pipeline, image=PHOTO, strength=0.9, negative_prompt="ugly")


def test_refiner_that_shares_the_second_encoder(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    base, refiner = extend(tiny_pipelines.xl(), model), tiny_pipelines.refiner()
    refiner.register_modules(text_encoder_2=base.text_encoder_2, tokenizer_2=base.tokenizer_2)
    check_that_the_end_counts(extend(refiner, model), image=PHOTO, strength=0.9)


def test_lora(model: FineLIP, tiny_pipelines: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained adapters for all three networks load into the right places."""
    peft = pytest.importorskip("peft")
    # Some releases of transformers require a release of PEFT that does not exist yet.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.17.0", raising=False)
    trained = tiny_pipelines.xl()
    layers = {}
    for part, targets in {
        "unet": ["to_q", "to_v"],
        "text_encoder": ["q_proj", "v_proj"],
        "text_encoder_2": ["q_proj", "v_proj"],
    }.items():
        network = getattr(trained, part)
        network.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        layers[f"{part}_lora_layers"] = peft.get_peft_model_state_dict(network, adapter_name="default")
    type(trained).save_lora_weights(tmp_path, **layers)

    pipeline = extend(tiny_pipelines.xl(), model)
    before, picture = prompt_embeddings(pipeline, LONG).prompt_embeds, drawn(pipeline, LONG, **SIZE)
    pipeline.load_lora_weights(tmp_path)
    after = prompt_embeddings(pipeline, LONG).prompt_embeds
    width = tiny_pipelines.TEXT_WIDTH
    assert not torch.equal(before[..., :width], after[..., :width])
    assert not torch.equal(before[..., width:], after[..., width:])
    assert (drawn(pipeline, LONG, **SIZE) - picture).abs().max() > VISIBLE
    scaled = drawn(pipeline, LONG, cross_attention_kwargs={"scale": 0.0}, **SIZE)
    torch.testing.assert_close(scaled, picture, rtol=0, atol=VISIBLE / 10)
    with pytest.raises(InputError, match="expected a text_encoder without adapters; extend the pipeline first"):
        extend(pipeline, model)
    pipeline.unload_lora_weights()
    assert torch.equal(prompt_embeddings(pipeline, LONG).prompt_embeds, before)


def test_textual_inversion(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    pipeline = extend(tiny_pipelines.sd15(), model)
    pipeline.load_textual_inversion({"<my-cat>": torch.ones(2, tiny_pipelines.TEXT_WIDTH)})
    inverted, plain = (prompt_embeddings(pipeline, text).prompt_embeds for text in ("a <my-cat>", "a cat"))
    assert not torch.equal(inverted, plain)
    assert inverted.shape == (1, 256, tiny_pipelines.TEXT_WIDTH)


def test_stable_diffusion_3(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    """The first encoder's projection is FineLIP's; the number of tokens is a setting of the pipeline."""
    pipeline = extend(tiny_pipelines.sd3(), model)
    embeddings = prompt_embeddings(pipeline, LONG, "ugly")
    ids = pipeline.tokenizer([LONG], padding="max_length", max_length=256, return_tensors="pt").input_ids
    with torch.no_grad():
        end = model.text(ids)[0, int((ids[0] == EOT_TOKEN).int().argmax())]
    assert embeddings.pooled_prompt_embeds is not None
    torch.testing.assert_close(embeddings.pooled_prompt_embeds[0, : len(end)], end, rtol=0, atol=1e-5)
    assert embeddings.prompt_embeds.shape == embeddings.negative_prompt_embeds.shape
    check_that_the_end_counts(pipeline, **SIZE)


def test_flux(model: FineLIP, tiny_pipelines: ModuleType) -> None:
    """The pooled embedding is FineLIP's, after the final LayerNorm; T5 is unchanged."""
    pipeline = tiny_pipelines.flux()
    t5 = pipeline.text_encoder_2
    extend(pipeline, model)
    assert pipeline.text_encoder_2 is t5
    ids = pipeline.tokenizer([LONG], padding="max_length", max_length=256, return_tensors="pt").input_ids
    with torch.no_grad():
        _, pooled, _ = pipeline.encode_prompt(LONG, None)
        features = pipeline.text_encoder(ids).last_hidden_state
    assert torch.equal(pooled[0], features[0, int((ids[0] == EOT_TOKEN).int().argmax())])
    drawn(pipeline, LONG, **SIZE)
