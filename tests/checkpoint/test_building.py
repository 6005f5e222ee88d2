"""Weights with NaN or infinity are refused."""

from __future__ import annotations

import pytest
import torch

from finelip_fast.checkpoint import convert, fingerprint, identify, load, save, verify
from finelip_fast.errors import CheckpointError

from .files import change_weights


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("command", [load, identify, fingerprint, verify])
def test_weights_that_are_no_numbers_are_refused_by_name(folder, tmp_path, command, number):
    def spoil(tensors):
        tensors["visual.proj"][3, 4] = number
        tensors["logit_scale"].fill_(number)

    change_weights(folder, spoil)
    with pytest.raises(
        CheckpointError, match=r"found NaN or infinity in logit_scale, visual\.proj; the training diverged"
    ):
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
    """Their sum overflows float32."""
    model = make_model()
    with torch.no_grad():
        model.text.token_embedding.weight.fill_(3e38)
    save(model, tmp_path)
    load(tmp_path)
