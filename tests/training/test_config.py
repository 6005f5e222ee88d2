"""A run's configuration: refusals before any data is read, recipes, and the command line."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from finelip_fast import cli
from finelip_fast.config import PRESETS
from finelip_fast.errors import ConfigError
from finelip_fast.training.config import RECIPES, TrainConfig, configure, load_recipe
from finelip_fast.training.losses import LossTerm

# None of these exists, so a refusal proves that no data was read.
NOWHERE = {"out": "nowhere/run", "train": "jsonl:nowhere/train.jsonl", "validation": "jsonl:nowhere/val.jsonl"}


def test_defaults_need_three_places_alone():
    config = TrainConfig(**NOWHERE)
    assert config.criterion.terms == tuple(LossTerm("contrastive", score) for score in ("global", "fine", "combined"))
    assert config.model_config == PRESETS["scenes"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"precision": "fp8"}, "expected precision auto, bf16 or fp32, got 'fp8'"),
        ({"accumulation": "lazy"}, "expected accumulation cached or separate, got 'lazy'"),
        ({"group": 3, "batch_size": 128}, "expected batch_size a multiple of group 3, got 128"),
        ({"loss": ("tripelt:fine",)}, "got 'tripelt:fine'"),
        ({"loss": ()}, "expected at least one loss term"),
        ({"loss": "triplet:fine"}, "expected loss as a list of texts, got 'triplet:fine'"),
        ({"loss": [1]}, "expected loss as a list of texts"),
        ({"train": "webdataset:shards-{0..9}.tar"}, "expected epoch_batches with webdataset, got 0"),
        ({"train": "webdataset:x.tar", "epoch_batches": 9, "group": 4}, "expected group 1 with webdataset, got 4"),
        ({"grounding": 1.0}, "expected train=scenes:.* with grounding, whose phrases have boxes, got 'jsonl:"),
        ({"grounding": 1.0, "train": "scenes:train:64:typos"}, "with grounding.* got 'scenes:train:64:typos'"),
        (
            {"grounding": 1.0, "train": "scenes:train", "accumulation_steps": 2},
            "expected accumulation separate with grounding or contextual, got 'cached'",
        ),
        (
            {"contextual": 1.0, "accumulation_steps": 2},
            "expected accumulation separate with grounding or contextual, got",
        ),
        ({"beta": 1.5}, "expected beta of at most 1, got 1.5"),
        ({"validation": "webdataset:x.tar"}, "expected validation of map-style data"),
        ({"preset": "ViT-H"}, "expected preset .* or scenes.*, got 'ViT-H'"),
        ({"batch_size": 1}, "expected batch_size of at least 2, got 1"),
        ({"steps": 0}, "expected steps of at least 1, got 0"),
        ({"accumulation_steps": 0}, "expected accumulation_steps of at least 1, got 0"),
        ({"save_every": 0}, "expected save_every of at least 1, got 0"),
        ({"encoder_lr": -1e-3}, "expected encoder_lr of at least 0, got -0.001"),
        ({"aggregator_lr": float("nan")}, "expected aggregator_lr of at least 0, got nan"),
        ({"weight_decay": -0.1}, "expected weight_decay of at least 0"),
        ({"ema_decay": 1.0}, "expected ema_decay below 1, got 1.0"),
        ({"max_broken_share": 1.5}, "expected max_broken_share of at most 1, got 1.5"),
        ({"label_smoothing": 1.1}, "expected label_smoothing of at most 1, got 1.1"),
        ({"alpha": "best"}, r"expected alpha in \[0, 1\] or validation, got 'best'"),
        ({"alpha": "1.5"}, r"expected alpha in \[0, 1\] or validation, got '1.5'"),
        ({"alpha": "nan"}, r"expected alpha in \[0, 1\] or validation, got 'nan'"),
        ({"augment": ("typos",)}, "expected terms CHANGE:CHANCE, .*, got 'typos'"),
        ({"unfreeze": "last:0"}, "expected unfreeze all, none or last:N, got 'last:0'"),
        ({"unfreeze": "first:2"}, "expected unfreeze all, none or last:N, got 'first:2'"),
        ({"features": "x"}, "expected unfreeze none with features, got 'all'"),
        ({"features": "x", "unfreeze": "none", "augment": ("typos:0.1",)}, "expected no augment with features"),
        (
            {"features": "x", "unfreeze": "none", "train": "webdataset:x.tar", "epoch_batches": 9},
            "expected train of map-style data with features",
        ),
        ({"device": "gpu"}, "expected device auto, cpu or cuda, got 'gpu'"),
        ({"steps": "100"}, "expected steps of type int, got '100'"),
        ({"steps": 1.5}, "expected steps of type int, got 1.5"),
        ({"steps": True}, "expected steps of type int, got True"),
        ({"margin": "wide"}, "expected margin of type float, got 'wide'"),
        ({"compile": 1}, "expected compile of type bool, got 1"),
        ({"train": None}, "expected train of type str, got None"),
        ({"margin": float("inf")}, "expected margin as a finite number, got inf"),
        ({"gamma": float("nan")}, "expected gamma as a finite number, got nan"),
        ({"workers": 10**9}, "expected workers of at most 1024, got 1000000000"),
        ({"batch_size": 10**12}, "expected batch_size of at most"),
        ({"context_length": 10**9}, "expected context_length of at most"),
        ({"context_length": 0}, "expected context_length of at least 3"),
        ({"seed": 10**30}, "expected seed of at most"),
        ({"out": ""}, "expected out, a folder"),
        ({"out": "a\0b"}, "expected out of at most 4096 characters without NUL"),
        ({"validation": "a" * 10**6}, "expected validation of at most 4096 characters without NUL, got 'aaa"),
        ({"loss": ("triplet:fine",) * 1000}, "expected at most 64 loss terms, got 1000"),
        ({"loss": ("triplet:fine:nan",)}, "got"),
        ({"loss": ("triplet:fine:1:1:1:1",)}, "got"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_refuses_before_any_data_is_read(changes, reason):
    with pytest.raises(ConfigError, match=reason):
        TrainConfig(**(NOWHERE | changes))


def test_refuses_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="expected a CUDA device for device=cuda, found none; use --device cpu"):
        TrainConfig(**NOWHERE, device="cuda")


@pytest.mark.parametrize(
    ("package", "changes"),
    [("tensorboard", {}), ("webdataset", {"train": "webdataset:x.tar", "epoch_batches": 1, "tensorboard": False})],
)
def test_says_which_package_is_missing(monkeypatch, package, changes):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(ConfigError, match=rf"needs the package '{package}': pip install 'finelip-fast\[train\]'"):
        TrainConfig(**(NOWHERE | changes))
    assert TrainConfig(**NOWHERE, tensorboard=False).tensorboard is False


def test_a_whole_number_does_for_a_real_one():
    assert TrainConfig(**NOWHERE, clip_norm=1).clip_norm == 1


def test_is_written_as_it_is_read():
    config = TrainConfig(**NOWHERE, loss=["triplet:fine", "contrastive:global:0.5"], encoder_lr=3e-6, compile=True)
    assert TrainConfig(**json.loads(config.to_json())) == config


# --- Recipes -----------------------------------------------------------------------------------------------------


def from_arguments(arguments):
    """Return the configuration that ``finelip train`` reads from its arguments."""
    words = cli.train.make_context("finelip train", arguments).params
    return configure(
        words.pop("recipe"), {name: value for name, value in words.items() if name not in ("json", "quiet")}
    )


SHIPPED = {
    *("ablation", "ablation-start", "finelip", "scenes", "scenes-clip", "scenes-full", "scenes-hardest"),
    *("scenes-long", "scenes-mixed", "scenes-robust", "scenes-start"),
}


def test_the_shipped_recipes_are_these():
    assert {path.stem for path in RECIPES.glob("*.json")} == SHIPPED


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_recipe_loads(name):
    config = from_arguments([name])
    for field, value in load_recipe(name).items():
        assert getattr(config, field) == (tuple(value) if isinstance(value, list) else value)


def test_the_authors_recipe():
    config = from_arguments(["finelip"])
    assert (config.loss, config.label_smoothing) == (("triplet:fine", "contrastive:global"), 0.1)
    assert (config.batch_size * config.accumulation_steps, config.accumulation) == (512, "separate")
    assert (config.encoder_lr, config.aggregator_lr, config.weight_decay) == (1e-6, 2e-4, 1e-2)
    assert (config.warmup_steps, config.margin, config.context_length, config.freeze_positions) == (200, 0.2, 256, 20)


def test_the_default_loss_is_the_bundled_models():
    default, bundled = TrainConfig(**NOWHERE), from_arguments(["scenes-long"])
    assert (default.loss, default.label_smoothing) == (bundled.loss, bundled.label_smoothing)


def test_options_override_a_recipe():
    arguments = ["scenes", "--steps", "7", "--loss", "triplet:fine", "contrastive:global:2", "--no-tensorboard"]
    config = from_arguments([*arguments, "--encoder-lr", "1e-4", "--out", "elsewhere"])
    changes = {"steps": 7, "loss": ("triplet:fine", "contrastive:global:2"), "tensorboard": False, "encoder_lr": 1e-4}
    assert config == TrainConfig(**(load_recipe("scenes") | changes | {"out": "elsewhere"}))


def test_a_recipe_from_a_file_and_options_alone(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**NOWHERE, "steps": 5}))
    expected = TrainConfig(**NOWHERE, steps=5)
    assert from_arguments([str(path)]) == expected
    options = [text for name, value in NOWHERE.items() for text in (f"--{name}", value)]
    assert from_arguments([*options, "--steps", "5"]) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"step": 3, "steps": 4, "lr": 1}', r"expected fields of a recipe, found \['lr', 'step'\]; see --help"),
        ("[1]", "expected a recipe: found a list instead of an object"),
        ("{", "expected a recipe: Expecting property name"),
        (None, "cannot read .*: No such file"),
        ('{"steps": ' + "[" * 100_000, "nesting deeper than 64"),
        ('{"margin": 1e999}', "a number that is not finite"),
        (" " * (1 << 20) + "{}", "expected at most 1048576 bytes"),
    ],
)
def test_refuses_a_recipe_that_is_none(tmp_path, content, reason):
    path = tmp_path / "recipe.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=reason) as caught:
        from_arguments([str(path)])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("old", "name"), [("val", "validation"), ("image_root", "root"), ("accumulate", "accumulation_steps")]
)
def test_a_field_of_an_old_recipe_answers_with_its_name_of_today(tmp_path, old, name, capsys):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({old: "x"}))
    with pytest.raises(ConfigError, match=f"the field '{old}' is called '{name}' now"):
        from_arguments([str(path)])
    flag, flag_now = (f"--{word.replace('_', '-')}" for word in (old, name))
    assert cli.main(["train", flag, "x"]) == 2
    assert f"error: {flag} is called {flag_now} now." in capsys.readouterr().err


def test_refuses_an_unknown_recipe_and_a_run_without_places():
    with pytest.raises(ConfigError, match=r"expected one of the recipes ablation, .*, or a JSON file, got 'scene'"):
        from_arguments(["scene"])
    with pytest.raises(
        ConfigError,
        match=re.escape(f"expected --train, --validation, or a recipe that gives them: {', '.join(sorted(SHIPPED))}"),
    ):
        from_arguments(["--out", "somewhere"])


@pytest.mark.parametrize(
    "name", ["../recipes/scenes", "/etc/passwd", "scenes\0", "", "a" * 5000, "\ud800"], ids=lambda name: f"{name!r:.40}"
)
def test_a_recipe_is_a_shipped_one_or_a_file_of_json(name):
    with pytest.raises(ConfigError, match=r"expected one of the recipes ablation, .*, or a JSON file"):
        load_recipe(name)


@pytest.mark.parametrize("out", ["/somewhere/else", "../run", "a/../../run", "~/../../run/../../.."])
def test_a_recipe_writes_within_this_folder_unless_told_otherwise(tmp_path, monkeypatch, out):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({**NOWHERE, "out": out}))
    with pytest.raises(ConfigError, match=r"expected 'out' within .*here, found .*; give --out to write there"):
        from_arguments([str(path)])
    assert from_arguments([str(path), "--out", "/somewhere/else"]).out == "/somewhere/else"
    path.write_text(json.dumps({**NOWHERE, "out": str(folder / "run")}))
    assert from_arguments([str(path)]).out == str(folder / "run")


@settings(settings.get_profile("fuzz"))
@given(st.data())
def test_a_damaged_recipe_is_refused_or_right(tmp_path, damage_json, data):
    path = tmp_path / "recipe.json"
    recipe = data.draw(st.sampled_from(sorted(SHIPPED)))
    path.write_bytes(damage_json(data, json.loads(TrainConfig(**load_recipe(recipe)).to_json())))
    try:
        config = from_arguments([str(path), "--device", "cpu"])
    except ConfigError as error:
        message = str(error)
    else:
        assert TrainConfig(**json.loads(config.to_json())) == config
        assert config.criterion.terms
        return
    assert len(message) < 1000


def test_help_names_every_option_and_recipe(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "finelip, scenes" in text


@pytest.mark.parametrize("arguments", [["--batch-sise", "3"], ["--steps", "many"]])
def test_an_option_that_is_none_exits_with_2(arguments, capsys):
    assert cli.main(["train", *arguments]) == 2
    assert arguments[0] in capsys.readouterr().err
