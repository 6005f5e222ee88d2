"""The towers' transformer: the initial weights and the results of open_clip's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from torch import nn

from finelip_fast.config import FineLIPConfig
from finelip_fast.encoders import ImageEncoder, TextEncoder

VISION = {"vision_width": 24, "vision_layers": 2, "vision_heads": 3, "vision_mlp_ratio": 2.5, "image_size": 32}
TEXT = {"text_width": 16, "text_layers": 3, "text_heads": 2, "context_length": 20}


@pytest.mark.parametrize("activation", [nn.GELU, QuickGELU])
@pytest.mark.parametrize("tower", ["picture", "caption"])
def test_a_tower_equals_that_of_open_clip(tower: str, activation: type[nn.Module]) -> None:
    config = FineLIPConfig.preset("scenes").replace(**VISION, **TEXT, quick_gelu=activation is QuickGELU)
    shared = {"output_dim": config.embed_dim, "act_layer": activation, "pool_type": "none"}
    if tower == "picture":
        inputs, encoder = torch.randn(2, 3, 32, 32), partial(ImageEncoder, config)
        reference = partial(VisionTransformer, 32, config.patch_size, 24, 2, 3, 2.5, **shared)
    else:
        inputs, encoder = torch.randint(1, 1000, (2, 20)), partial(TextEncoder, config)
        sizes = {"width": 16, "heads": 2, "layers": 3, "mlp_ratio": config.text_mlp_ratio}
        reference = partial(TextTransformer, 20, config.vocab_size, **sizes, **shared)
    towers, following = [], []
    for make in (encoder, reference):
        torch.manual_seed(0)
        towers.append(make())
        following.append(torch.rand(1))
    states = [model.state_dict() for model in towers]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(*following), "other numbers of random draws"
    with torch.no_grad():
        torch.testing.assert_close(towers[0](inputs), towers[1](inputs), rtol=1e-5, atol=1e-6)
