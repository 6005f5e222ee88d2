"""AdamW's groups, and the learning rate over a run."""

from __future__ import annotations

import pytest

from finelip_fast.training.config import TrainConfig
from finelip_fast.training.optimizer import freeze, parameter_groups, schedule


def config_of(**changes):
    return TrainConfig(out="run", train="scenes:train", validation="scenes:val", tensorboard=False, **changes)


def test_which_weights_decay_and_at_which_rate(make_model):
    config = config_of(encoder_lr=1e-6, aggregator_lr=2e-4, weight_decay=0.05)
    model = make_model()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config)
    options = {
        names[id(parameter)]: (group["peak_lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }
    assert sum(len(group["params"]) for group in groups) == len(options) == len(names)
    aggregator = {f"{side}_aggregator.{layer}.weight" for side in ("image", "text") for layer in ("hidden", "logits")}
    layers = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    encoder = {name for name in options if name.endswith(layers)}
    encoder |= {"visual.conv1.weight", "visual.proj", "text.token_embedding.weight", "text.text_projection"}
    assert {name for name, (_, decay) in options.items() if decay} == aggregator | encoder
    assert {decay for _, decay in options.values()} == {0.0, 0.05}
    for name, (rate, _) in options.items():
        assert rate == (2e-4 if "aggregator" in name else 1e-6)
    for name in ("logit_scale", "image_aggregator.scale", "visual.class_embedding", "visual.positional_embedding"):
        assert options[name][1] == 0.0


@pytest.mark.parametrize(
    ("unfreeze", "first"), [("all", None), ("last:1", 1), ("last:2", 0), ("last:9", 0), ("none", 2)]
)
def test_what_is_frozen_is_in_no_group(make_model, unfreeze, first):
    """``first`` is the number of the first trained block; None: the layers before the blocks are trained, too."""
    model = make_model(vision_layers=2, text_layers=2)
    freeze(model, unfreeze)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {names[id(parameter)] for group in parameter_groups(model, config_of()) for parameter in group["params"]}
    assert {"logit_scale", "image_aggregator.scale", "text_aggregator.logits.weight"} <= trained
    blocks = {name.split(".")[0]: set() for name in trained if "resblocks" in name}
    for name in trained:
        if "resblocks" in name:
            blocks[name.split(".")[0]].add(int(name.split(".")[3]))
    numbers = set(range(first or 0, 2))
    assert blocks == ({"visual": numbers, "text": numbers} if numbers else {})
    behind = {"visual.proj", "visual.ln_post.weight", "text.text_projection", "text.ln_final.bias"}
    assert (behind <= trained) is (unfreeze != "none")
    ahead = {
        "visual.conv1.weight",
        "visual.positional_embedding",
        "visual.ln_pre.weight",
        "text.token_embedding.weight",
    }
    assert (ahead <= trained) is (unfreeze == "all")
    assert unfreeze == "all" or not ahead & trained


def test_schedule_warms_up_then_follows_a_cosine_to_zero():
    config = config_of(steps=14, warmup_steps=4)
    assert [schedule(step, config) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule(9, config) == pytest.approx(0.5)
    assert schedule(14, config) == pytest.approx(0.0)
    shares = [schedule(step, config) for step in range(4, 15)]
    assert shares == sorted(shares, reverse=True)
    assert schedule(0, config_of(steps=1, warmup_steps=0)) == 1.0
    assert schedule(2, config_of(steps=3, warmup_steps=200)) == pytest.approx(3 / 200)
