"""The training loop: what a step changes, what a run leaves behind, and that an interrupted run loses nothing."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import finelip_fast
from finelip_fast import checkpoint
from finelip_fast.checkpoint import UntrainedAggregatorsWarning
from finelip_fast.checkpoint.weight_files import read_weights
from finelip_fast.cli import main as finelip
from finelip_fast.config import PRESETS, FineLIPConfig
from finelip_fast.errors import CheckpointError, ConfigError, TrainingError, WriteError
from finelip_fast.model import FineLIP
from finelip_fast.training import train as training
from finelip_fast.training import validation
from finelip_fast.training.config import TrainConfig
from finelip_fast.training.optimizer import parameter_groups, schedule
from finelip_fast.training.train import Trainer, train

TINY = FineLIPConfig(
    embed_dim=16,
    image_size=32,
    patch_size=8,
    vision_width=32,
    vision_layers=1,
    vision_heads=1,
    text_width=16,
    text_layers=1,
    text_heads=1,
    context_length=24,
)
CPU = torch.device("cpu")
PAIRS = 16

OPTIONS = {
    "preset": "tiny",
    "context_length": 24,
    "loss": ["contrastive:global", "contrastive:fine"],
    "batch_size": 8,
    "steps": 6,
    "encoder_lr": 3e-3,
    "aggregator_lr": 3e-3,
    "warmup_steps": 0,
    "freeze_positions": 0,
    "precision": "fp32",
    "workers": 0,
    "log_every": 1,
    "tensorboard": False,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Small pictures of coloured blocks, each with a unique caption."""
    folder = tmp_path_factory.mktemp("pairs")
    generator = np.random.default_rng(0)
    words = ["red", "green", "blue", "house", "tree", "river", "old", "small", "bright"]
    lines = []
    for index in range(PAIRS):
        blocks = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blocks.resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{index}.png")
        caption = " ".join(generator.choice(words, size=3 + index % 5))
        lines.append(json.dumps({"image": f"{index}.png", "caption": caption}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return f"jsonl:{folder / 'pairs.jsonl'}"


@pytest.fixture(scope="module", autouse=True)
def _tiny():
    """A preset small enough to train here, with one thread, because rounding depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def configure(data, tmp_path):
    def build(**changes):
        places = {"out": str(tmp_path / "run"), "train": data, "validation": data}
        return TrainConfig(**(OPTIONS | places | changes))

    return build


def steps(trainer, count):
    """Run the trainer's first steps without the surrounding loop; yield the logged values of each."""
    batches = iter(trainer.data)
    for _ in range(count):
        yield trainer._train_step([next(batches) for _ in range(trainer.config.accumulation_steps)])
        trainer.step += 1


def stepped(config, count=1, *, plain=False):
    """Return weights before and after some steps; `plain` uses gradient descent, which has no small denominators."""
    trainer = Trainer(config, CPU)
    if plain:
        trainer.optimizer = torch.optim.SGD(parameter_groups(trainer.model, config), lr=0.0)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for _ in steps(trainer, count):
        pass
    return before, trainer.model.state_dict()


def distance(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


def log_of(out, *, without=("pairs_per_second",)):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in without} for line in lines]


# --- One step ----------------------------------------------------------------------------------------------------


def test_the_schedule_reaches_every_group(configure):
    trainer = Trainer(configure(steps=10, warmup_steps=4, aggregator_lr=2e-4), CPU)
    for number, _ in enumerate(steps(trainer, 3)):
        rates = {(group["peak_lr"], group["lr"]) for group in trainer.optimizer.param_groups}
        assert rates == {(peak, peak * (number + 1) / 4) for peak in (3e-3, 2e-4)}


def test_frozen_positions_stay_to_the_bit_while_the_others_move(configure):
    config = configure(freeze_positions=4, weight_decay=0.5, accumulation_steps=2, batch_size=4, ema_decay=0.5)
    before, after = stepped(config, 3)
    name = "text.positional_embedding"
    assert torch.equal(before[name][:4], after[name][:4])
    moved = (before[name] != after[name]).any(dim=1)
    assert moved.tolist() == [False] * 4 + [True] * 5 + [False] * 15  # captions have 5 to 9 tokens
    _, free = stepped(configure(), 3)
    assert (before[name] != free[name]).any(dim=1)[:9].all()


@pytest.mark.parametrize(
    "loss", [OPTIONS["loss"], ["triplet:fine"], ["hardest_triplet:combined", "adaptive_margin:fine"]]
)
def test_a_cached_step_equals_one_over_the_whole_batch(configure, loss):
    fixed = {"loss": loss, "encoder_lr": 0.1, "aggregator_lr": 0.1, "weight_decay": 0.0}
    before, expected = stepped(configure(**fixed, batch_size=16), 2, plain=True)
    for passes in (2, 4):
        _, cached = stepped(configure(**fixed, batch_size=16 // passes, accumulation_steps=passes), 2, plain=True)
        for name, value in expected.items():
            torch.testing.assert_close(
                cached[name], value, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert distance(before, expected) > 1e-3
    assert (expected["logit_scale"] == before["logit_scale"]) == (loss == ["triplet:fine"])


def test_a_separate_step_is_another_one(configure):
    """Negatives come from each pass alone: this is documented as another loss, and must stay different."""
    fixed = {"encoder_lr": 0.1, "aggregator_lr": 0.1, "weight_decay": 0.0}
    _, joint = stepped(configure(**fixed, batch_size=16), plain=True)
    _, separate = stepped(configure(**fixed, batch_size=8, accumulation_steps=2, accumulation="separate"), plain=True)
    assert distance(joint, separate) > 1e-4


def test_gradient_checkpointing_gives_the_same_step(configure):
    before, expected = stepped(configure(), 2, plain=True)
    trainer = Trainer(configure(gradient_checkpointing=True), CPU)
    assert trainer.model.visual.transformer.grad_checkpointing
    assert trainer.model.text.transformer.grad_checkpointing
    _, recomputed = stepped(configure(gradient_checkpointing=True, accumulation_steps=2, batch_size=4), 2, plain=True)
    assert distance(expected, recomputed) < 1e-6 < 1e-4 < distance(before, expected)


def test_parts_of_captions_and_what_they_attend_to_add_to_the_loss(configure):
    scenes = {"train": "scenes:train:16", "context_length": 256, "steps": 1}
    plain, contextual = (Trainer(configure(**scenes, contextual=weight), CPU) for weight in (0.0, 0.5))
    batch = next(iter(plain.data))
    assert len(batch.parts) > 8 * 5
    without, values = (trainer._train_step([batch]) for trainer in (plain, contextual))
    torch.testing.assert_close(values["loss"], without["loss"] + 0.5 * values["contextual"])
    assert values["contextual"] > 1


def test_phrases_and_their_places_add_to_the_loss(configure):
    scenes = {"train": "scenes:train:16", "context_length": 256, "steps": 1}
    plain, grounded = (Trainer(configure(**scenes, grounding=weight), CPU) for weight in (0.0, 0.5))
    batch = next(iter(plain.data))
    assert len(batch.spans) > 8 * 7
    without, values = (trainer._train_step([batch]) for trainer in (plain, grounded))
    assert "grounding" not in without
    assert values["grounding"] > 1
    torch.testing.assert_close(values["loss"], without["loss"] + 0.5 * values["grounding"])


def test_the_average_follows_the_weights(configure):
    trainer = Trainer(configure(ema_decay=0.75), CPU)
    expected = None
    for _ in steps(trainer, 4):
        weights = {name: value.double() for name, value in trainer.model.state_dict().items()}
        expected = expected or weights
        expected = {name: 0.75 * expected[name] + 0.25 * value for name, value in weights.items()}
    averaged = trainer.ema.module.state_dict()
    assert distance(averaged, expected) < 1e-6
    assert distance(averaged, trainer.model.state_dict()) > 1e-4


def test_half_precision_keeps_weights_and_loss_in_float32(configure):
    trainer = Trainer(configure(precision="bf16"), CPU)
    (values,) = steps(trainer, 1)
    (exact,) = steps(Trainer(configure(), CPU), 1)
    assert values["loss"].dtype == torch.float32
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert float(values["loss"]) == pytest.approx(float(exact["loss"]), rel=2e-2)
    assert float(values["loss"]) != float(exact["loss"])


@pytest.mark.parametrize("instructions", [True, False])
def test_a_processor_without_bfloat16_instructions_trains_in_float32(configure, monkeypatch, caplog, instructions):
    monkeypatch.setattr("finelip_fast.kernels.cpu.has_bfloat16", lambda: instructions)
    (chosen,), (expected,) = (
        steps(Trainer(configure(precision=precision), CPU), 1)
        for precision in ("auto", "bf16" if instructions else "fp32")
    )
    assert chosen["loss"] == expected["loss"]
    train(configure(precision="bf16", stop_at=1))
    warning = "no bfloat16 instructions on cpu: precision auto or fp32 trains much faster"
    assert (warning in caplog.messages) is not instructions


def test_a_run_goes_on_in_another_precision(configure, caplog):
    train(configure(precision="fp32", stop_at=1))
    train(configure(precision="auto", stop_at=2))
    assert caplog.messages[0].startswith("resumes with {'precision': 'auto'} instead of {'precision': 'fp32'}")


def test_the_scale_stays_in_its_bounds(configure):
    trainer = Trainer(configure(), CPU)
    for start, bound in ((9.0, float(np.log(100))), (-3.0, 0.0)):
        trainer.model.logit_scale.data.fill_(start)
        (values,) = steps(trainer, 1)
        assert trainer.model.logit_scale.item() == pytest.approx(bound)
        assert float(values["logit_scale"]) == pytest.approx(np.exp(bound), rel=1e-5)


def test_a_loss_that_is_no_number_stops_the_run(configure):
    with pytest.raises(TrainingError, match=r"the loss is nan.* at step \d: lower --encoder-lr, now 1e\+30, and --ag"):
        train(configure(encoder_lr=1e30))


def test_a_gradient_that_is_no_number_stops_the_run_before_the_weights_take_it(configure):
    trainer = Trainer(configure(), CPU)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.model.visual.proj.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(TrainingError, match=r"its gradient's norm (nan|inf), at step 0"):
        next(steps(trainer, 1))
    assert distance(before, trainer.model.state_dict()) == 0


@pytest.mark.parametrize("option", ["save_every", "eval_every", "steps"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.5])
def test_weights_that_are_no_numbers_are_not_kept(configure, monkeypatch, option, ema_decay):
    """A finite loss and gradient can produce them in a step; the next loss would reveal it only after they were saved."""
    plain_step = Trainer._train_step

    def diverging_step(trainer, batches):
        values = plain_step(trainer, batches)
        if trainer.step == 2:
            averaged = trainer.ema.module if trainer.ema else trainer.model
            averaged.visual.proj.data[0, 0] = torch.inf
        return values

    monkeypatch.setattr(Trainer, "_train_step", diverging_step)
    config = configure(
        **{"steps": 6, "save_every": 6, "eval_every": 6} | {option: 3 if option == "steps" else 1}, ema_decay=ema_decay
    )
    with pytest.raises(
        TrainingError, match=r"infinity in visual\.proj after step 3, which is not saved: lower"
    ) as caught:
        train(config)
    out = Path(config.out)
    assert not (out / "last").exists()
    assert (out / "state.pt").exists() == (option == "save_every")
    if option == "save_every":
        assert read_weights(out / "state.pt")["step"] == 2
    if option == "eval_every":  # the advice works
        monkeypatch.undo()
        start = re.search(r"from the best weights by --init (.*)$", str(caught.value))
        train(configure(init=start[1], out=str(out.with_name("again")), encoder_lr=1e-3, steps=1))


def test_a_state_whose_weights_are_no_numbers_is_refused(configure, tmp_path, uninterrupted):
    state = torch.load(uninterrupted[0] / "state.pt", weights_only=True)
    state["model"]["visual.proj"][0, 0] = torch.nan
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "state.pt")
    with pytest.raises(
        CheckpointError, match=r"state\.pt: expected finite weights, .*visual\.proj; lower the learning rates"
    ):
        train(configure(**LASTING))


# --- The start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "trained"), [(["contrastive:global"], False), (["triplet:fine"], True)])
@pytest.mark.parametrize("from_clip", [False, True], ids=["from nothing", "from CLIP"])
def test_aggregators_count_as_trained_when_a_loss_reaches_them(configure, tmp_path, from_clip, loss, trained):
    if from_clip:
        checkpoint.save(FineLIP(TINY.replace(trained_aggregators=False)), tmp_path / "clip")
    model = Trainer(configure(loss=loss, init=str(tmp_path / "clip") if from_clip else ""), CPU).model
    assert model.config.trained_aggregators is trained
    assert model.alpha == (0.8 if trained else 1.0)


def test_the_alpha_of_the_best_validation_is_the_checkpoints(configure, monkeypatch):
    """This includes averaged weights; a given alpha is kept, and no weight depends on it."""
    tried = []

    def validate(model, pairs, *, name, alphas, features):
        tried.append(alphas)
        return {"val_alpha": alphas[5 % len(alphas)], "val_i2t_recall@1": 0.5, "val_t2i_recall@1": 0.5}

    monkeypatch.setattr(training, "validate", validate)
    runs = {}
    for alpha in ("validation", "0.6"):
        config = configure(steps=2, eval_every=2, alpha=alpha, ema_decay=0.5)
        train(config)
        train(config)  # has nothing left to do
        runs[alpha] = [finelip_fast.load(Path(config.out) / name) for name in ("best", "last")]
        shutil.rmtree(config.out)
    assert [len(alphas) for alphas in tried] == [21, 1]
    assert [model.alpha for models in runs.values() for model in models] == [0.25, 0.25, 0.6, 0.6]
    assert distance(*(models[1].state_dict() for models in runs.values())) == 0


@pytest.mark.parametrize("accumulation", ["cached", "separate"])
def test_frozen_weights_stay_and_the_others_learn(configure, monkeypatch, tmp_path, accumulation):
    monkeypatch.setitem(PRESETS, "tiny", TINY.replace(vision_layers=2, text_layers=2))
    options = {"batch_size": 4, "accumulation_steps": 2, "accumulation": accumulation, "freeze_positions": 3}
    start = Trainer(configure(out=str(tmp_path / "start"), **options), CPU).model.state_dict()
    for unfreeze, ahead in (("last:1", r"resblocks\.0|conv1|embedding|ln_pre"), ("none", r"^(visual|text)\.")):
        out = tmp_path / unfreeze.replace(":", "-")
        train(configure(out=str(out), unfreeze=unfreeze, **options))
        last = finelip_fast.load(out / "last").state_dict()
        for name, value in start.items():
            assert torch.equal(last[name], value) is bool(re.search(ahead, name)), name


def test_a_run_on_changed_captions_goes_on_to_the_bit(configure, tmp_path):
    options = {**LASTING, "augment": ["sentences:0.5", "words:0.5", "foreign:0.5", "typos:0.5"]}
    best = train(configure(**options, out=str(tmp_path / "whole")))
    train(configure(**options, stop_at=3))
    assert_same_run(tmp_path / "run", train(configure(**options)), (tmp_path / "whole", best))


def test_a_loss_of_the_global_row_alone_leaves_no_alpha_to_choose(configure):
    config = configure(loss=["contrastive:global"], steps=2, eval_every=2)
    assert train(config)["val_alpha"] == 1.0


def test_untrained_aggregators_are_trained_from_where_they_wait(configure, tmp_path):
    """Embeddings have one row before training, and all rows afterwards."""
    start = FineLIP(TINY.replace(trained_aggregators=False))
    checkpoint.save(start, tmp_path / "clip")
    config = configure(loss=["contrastive:global", "contrastive:fine"], init=str(tmp_path / "clip"), steps=2)
    train(config, progress=False)
    model = finelip_fast.load(Path(config.out) / "last")
    assert (start.config.tokens, model.config.tokens) == (1, TINY.tokens)
    before, after = (dict(checked.image_aggregator.named_parameters()) for checked in (start, model))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_run_starts_from_a_checkpoint_with_a_longer_context(configure, tmp_path):
    start = FineLIP(TINY)
    checkpoint.save(start, tmp_path / "start")
    model = Trainer(configure(init=str(tmp_path / "start"), context_length=40, preset="ViT-B-32"), CPU).model
    assert model.config.context_length == 40
    assert torch.equal(model.visual.conv1.weight, start.visual.conv1.weight)
    assert torch.equal(model.text.positional_embedding[:20], start.text.positional_embedding[:20])


def test_the_seed_decides_the_weights(configure):
    first, second, reseeded = (Trainer(configure(seed=seed), CPU).model.state_dict() for seed in (1, 1, 2))
    assert distance(first, second) == 0
    assert distance(first, reseeded) > 0


# --- A whole run -------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_its_files(configure):
    config = configure(steps=100, eval_every=50, log_every=5, tensorboard=True, warmup_steps=5, label_smoothing=0.0)
    best = train(config)
    out = Path(config.out)
    log = log_of(out, without=())

    steps_logged = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps_logged] == list(range(5, 101, 5))
    assert steps_logged[-1]["loss"] < 0.5 * steps_logged[0]["loss"]
    expected = {"step", "loss", "grad_norm", "encoder_lr", "logit_scale", "captions_cut", "pairs_per_second"}
    assert set(steps_logged[0]) == expected | {"contrastive:global:1", "contrastive:fine:1"}
    terms = steps_logged[0]["contrastive:global:1"] + steps_logged[0]["contrastive:fine:1"]
    assert steps_logged[0]["loss"] == pytest.approx(terms, rel=1e-5)

    validations = [line for line in log if "val_i2t_recall@1" in line]
    assert [line["step"] for line in validations] == [50, 100]
    assert best in [{**line, "step": float(line["step"])} for line in validations]
    assert best["val_i2t_recall@1"] > 0.5

    assert json.loads((out / "config.json").read_text()) == json.loads(config.to_json())
    assert not list(out.glob("*.partial"))
    state = torch.load(out / "state.pt", weights_only=True)
    last = finelip_fast.load(out / "last")
    assert distance(last.state_dict(), state["model"]) == 0
    assert last.config == TINY.replace(alpha=validations[-1]["val_alpha"])
    assert finelip_fast.load(out / "best").config == TINY.replace(alpha=best["val_alpha"])
    metadata = json.loads((out / "best" / "config.json").read_text())["metadata"]
    assert metadata["step"] == best["step"]
    assert metadata["validation"] == {name: value for name, value in best.items() if name != "step"}
    assert metadata["training"]["loss"] == list(config.loss)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [line["step"] for line in steps_logged]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in steps_logged], rel=1e-5
    )
    assert [event.step for event in events.Scalars("val_t2i_recall@1")] == [50, 100]


def test_small_rates_are_logged_as_they_are(configure):
    config = configure(encoder_lr=1e-6, steps=2, warmup_steps=8)
    train(config)
    assert [line["encoder_lr"] for line in log_of(config.out) if "loss" in line] == pytest.approx([1.25e-7, 2.5e-7])


def test_the_best_validation_is_kept_not_the_last(configure, monkeypatch):
    values = iter([0.2, 0.9, 0.9, 0.7])
    embeddings = []

    def summary(ranks):
        value = next(values)
        return {name: value for way in ("i2t", "t2i") for name in (f"{way}_recall@1", f"{way}_mrr")}

    tiled_ranks = validation.tiled_ranks
    monkeypatch.setattr(
        validation, "tiled_ranks", lambda *arrays: [embeddings.append(arrays[:2]), *tiled_ranks(*arrays)][1:]
    )
    monkeypatch.setattr(validation, "pair_summary", summary)
    config = configure(eval_every=2, steps=8, ema_decay=0.5, alpha="0.8")
    best = train(config)
    assert best == {"val_alpha": 0.8, "val_i2t_recall@1": 0.9, "val_t2i_recall@1": 0.9, "step": 4.0}
    best_model, last = (finelip_fast.load(Path(config.out) / name) for name in ("best", "last"))
    assert distance(best_model.state_dict(), last.state_dict()) > 1e-4
    averaged = torch.load(Path(config.out) / "state.pt", weights_only=True)["ema"]
    assert all(torch.equal(averaged[f"module.{name}"], value) for name, value in last.state_dict().items())

    pairs = training.open_dataset(config.validation, image_size=32)
    with torch.no_grad():
        images = best_model.encode_image(best_model.preprocess.batch(pairs[index].image for index in range(PAIRS)))
        texts = best_model.encode_text(finelip_fast.tokenize([pairs[index].caption for index in range(PAIRS)], 24))
        for expected, measured in zip((images, texts), embeddings[1], strict=True):
            torch.testing.assert_close(measured, expected)


def test_signal_handlers_are_given_back(configure):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(configure(steps=1))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_validation_without_pairs_is_refused_at_once(configure, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    config = configure(validation=f"jsonl:{tmp_path / 'none.jsonl'}")
    with pytest.raises(ConfigError, match="expected pairs to validate on, got none from validation='jsonl:"):
        train(config)
    assert not (tmp_path / "run" / "state.pt").exists()


# --- Broken pictures ---------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(data, tmp_path):
    """The pairs, with two unreadable pictures."""
    source = Path(data.removeprefix("jsonl:"))
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    for index in (3, 9):
        lines[index]["image"] = str(tmp_path / f"missing-{index}.png")
    (tmp_path / "damaged.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"train": f"jsonl:{tmp_path / 'damaged.jsonl'}", "root": str(source.parent)}


def test_broken_pictures_are_named_and_counted(configure, damaged, capsys):
    config = configure(**damaged, max_broken_share=0.5)
    train(config)
    state = torch.load(Path(config.out) / "state.pt", weights_only=True)
    assert (state["seen"], state["broken"]) == (48, 6)  # two of 16 in each of three epochs
    error = capsys.readouterr().err
    for index in (3, 9):
        assert error.count(f"missing-{index}.png") == 3
    assert error.count("skipped: ") == 6


def test_too_many_broken_pictures_stop_the_run(configure, damaged, monkeypatch):
    monkeypatch.setattr(training, "_BROKEN_AFTER", 16)
    with pytest.raises(
        TrainingError, match=r"2 of 1[0-9] pairs cannot be read, more than the share of 0.1 that --max-"
    ):
        train(configure(**damaged, max_broken_share=0.1))
    monkeypatch.setattr(training, "_BROKEN_AFTER", 200)
    train(configure(**damaged, max_broken_share=0.1))  # too early to judge


def test_a_broken_validation_picture_is_left_out(configure, damaged, capsys):
    best = train(configure(validation=damaged["train"], root=damaged["root"], eval_every=6))
    assert best["val_t2i_recall@10"] * 14 == pytest.approx(round(best["val_t2i_recall@10"] * 14))  # 14 of 16 remain
    error = capsys.readouterr().err
    assert "missing-3.png" in error
    assert "missing-9.png" in error
    assert error.count("skipped in validation: ") == 2


# --- Resuming after an interruption ------------------------------------------------------------------------------

# Everything with a state: averaged weights, both cached passes, an epoch of two steps, six steps in all.
LASTING = {"steps": 6, "save_every": 2, "eval_every": 3, "ema_decay": 0.9, "accumulation_steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted")
    config = TrainConfig(**(OPTIONS | LASTING), out=str(out), train=data, validation=data)
    return out, train(config)


def assert_same_run(out, best, uninterrupted):
    expected_out, expected_best = uninterrupted
    state, expected = (torch.load(folder / "state.pt", weights_only=True) for folder in (out, expected_out))
    for part in ("model", "ema"):
        for name, value in expected[part].items():
            assert torch.equal(state[part][name], value), f"{part} {name}"
    for index, moments in expected["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(state["optimizer"]["state"][index][name], value)
    assert (state["step"], state["seen"]) == (expected["step"], expected["seen"]) == (6, 48)
    for name in ("best", "last"):
        assert checkpoint.fingerprint(out / name) == checkpoint.fingerprint(expected_out / name)
    assert best == expected_best
    assert log_of(out) == log_of(expected_out)


def test_a_stopped_run_saves_and_goes_on_to_the_bit(configure, tmp_path, uninterrupted, monkeypatch):
    take_step = Trainer._train_step

    def stopping(self, batches):
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return take_step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", stopping)
    with pytest.raises(TrainingError, match="stopped at step 3; the same command resumes from there"):
        train(configure(**LASTING))
    monkeypatch.undo()
    assert not (tmp_path / "run" / "last").exists()
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 3
    best = train(configure(**LASTING, workers=1))
    assert_same_run(tmp_path / "run", best, uninterrupted)


def test_a_run_that_ends_early_goes_on_to_the_bit(configure, tmp_path, uninterrupted):
    train(configure(**LASTING, stop_at=3))
    assert finelip_fast.load(tmp_path / "run" / "last").config.replace(alpha=0.8) == TINY
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 3
    assert_same_run(tmp_path / "run", train(configure(**LASTING)), uninterrupted)


def test_a_run_whose_state_has_former_names_goes_on_to_the_bit(configure, tmp_path, uninterrupted):
    train(configure(**LASTING, stop_at=3))
    path = tmp_path / "run" / "state.pt"
    state = torch.load(path, weights_only=True)
    for old, name in (("val", "validation"), ("image_root", "root"), ("accumulate", "accumulation_steps")):
        state["config"][old] = state["config"].pop(name)
    del state["config"]["augment"], state["config"]["alpha"]  # unknown to that version
    torch.save(state, path)
    assert_same_run(tmp_path / "run", train(configure(**LASTING)), uninterrupted)


KILLED_IN_STEP_4 = """
import json, os, signal, sys
from finelip_fast.config import PRESETS, FineLIPConfig
from finelip_fast.training import train

take_step = train.Trainer._train_step

def dying(self, batches):
    if self.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self, batches)

train.Trainer._train_step = dying
PRESETS["tiny"] = FineLIPConfig(**json.loads(sys.argv[1]))
from finelip_fast.cli import main

main(["train", *sys.argv[2:]])
"""


def test_a_killed_run_goes_on_from_its_last_state_to_the_bit(configure, tmp_path, uninterrupted):
    config = configure(**LASTING, tensorboard=True)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(config.to_json())
    command = [sys.executable, "-c", KILLED_IN_STEP_4, json.dumps(TINY.to_dict()), str(recipe)]
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert process.returncode == -signal.SIGKILL, process.stderr[-4000:]
    out = Path(config.out)
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 3]  # step 3 is behind the state: it will be taken again
    assert torch.load(out / "state.pt", weights_only=True)["step"] == 2
    (events,) = (out / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.1.killed"))  # read in the order of names, which hold the second
    with (out / "log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')  # what a full disk or a lost machine leaves

    best = train(config)
    assert_same_run(out, best, uninterrupted)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_stays_as_it_is(data, uninterrupted):
    out, best = uninterrupted
    before = {path: path.read_bytes() for name in ("best", "last") for path in (out / name).iterdir()}
    assert len(before) == 4
    log = log_of(out)
    assert train(TrainConfig(**(OPTIONS | LASTING), out=str(out), train=data, validation=data)) == best
    assert {path: path.read_bytes() for path in before} == before
    assert log_of(out) == log


@pytest.fixture
def copied(uninterrupted, tmp_path, data):
    """A run of six steps to resume."""
    shutil.copytree(uninterrupted[0], tmp_path / "copied")
    places = {"out": str(tmp_path / "copied"), "train": data, "validation": data}
    return lambda **changes: TrainConfig(**(OPTIONS | LASTING | places | changes))


@pytest.mark.parametrize(
    "changes", [{"steps": 5}, {"loss": ["triplet:fine"]}, {"batch_size": 8, "accumulation_steps": 1}, {"seed": 3}]
)
def test_going_on_differently_is_refused(copied, changes):
    config = copied(**changes)
    with pytest.raises(ConfigError, match="resumes only with the same options: pass them, or another --out") as caught:
        train(config)
    for name in changes:
        assert f"'{name}': {getattr(config, name)!r}" in str(caught.value)
    former, requested = str(caught.value).split(", got ")
    assert former.count("':") == requested.count("':") == len(changes)


def test_a_run_goes_on_with_more_steps_by_the_schedule_of_the_new_length(copied, uninterrupted, caplog):
    config = copied(steps=9)
    train(config)
    log = log_of(config.out)
    assert log[: len(log_of(uninterrupted[0]))] == log_of(uninterrupted[0])
    rates = {line["step"]: line["encoder_lr"] for line in log if "loss" in line}
    expected = {step + 1: 3e-3 * schedule(step, config) for step in range(6, 9)}
    assert {step: rates[step] for step in expected} == pytest.approx(expected, rel=1e-5)
    assert rates[7] > rates[6]
    (message,) = caplog.messages
    assert message.startswith(
        "resumes with {'steps': 9} instead of {'steps': 6}; its weights will differ from those of a run with these options"
    )
    assert message.endswith("; the learning rate follows the schedule of the new length")
    assert json.loads((Path(config.out) / "config.json").read_text())["steps"] == 9
    caplog.clear()
    train(config)
    assert not caplog.messages


def test_a_run_goes_on_with_other_rates(configure, caplog):
    train(configure(**LASTING, stop_at=2))
    trainer = Trainer(configure(**LASTING, encoder_lr=1e-4), CPU)
    assert {group["peak_lr"] for group in trainer.optimizer.param_groups} == {1e-4, 3e-3}
    assert trainer.optimizer.state
    assert caplog.messages[0].startswith("resumes with {'encoder_lr': 0.0001} instead of {'encoder_lr': 0.003}")


def test_going_on_with_other_processes_meets_the_rest_of_the_epoch(configure, monkeypatch, caplog):
    monkeypatch.setattr("finelip_fast.training.step.DistributedDataParallel", lambda model: model)
    train(configure(**LASTING, stop_at=1))  # 8 of 16 pairs
    batches = iter(Trainer(configure(**LASTING), CPU).data)
    trainers = [Trainer(configure(**LASTING), CPU, rank, 2) for rank in range(2)]
    rest = [next(iter(trainer.data)).image_ids for trainer in trainers]
    assert torch.equal(torch.cat(rest), torch.cat([next(batches).image_ids for _ in range(2)]))
    assert [trainer.data.state_dict() for trainer in trainers] == [{"epoch": 0, "pairs": 16}] * 2
    (message,) = caplog.messages  # from the first process
    assert message.startswith("resumes with {'processes': 2} instead of {'processes': 1}")


def test_going_on_may_change_what_the_weights_do_not_depend_on(copied, uninterrupted, caplog):
    free = {"log_every": 5, "save_every": 9, "eval_every": 4, "workers": 1, "max_broken_share": 0.5}
    assert train(copied(**free)) == uninterrupted[1]
    assert not caplog.messages


# --- The command line --------------------------------------------------------------------------------------------


def run_script(arguments, monkeypatch):
    """Run ``python training/train.py`` in this process."""
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(training.__file__, run_name="__main__")
    return caught.value.code


@pytest.fixture(params=["finelip train", "training/train.py"])
def command(request, monkeypatch):
    return {
        "finelip train": lambda arguments: finelip(["train", *arguments]),
        "training/train.py": lambda arguments: run_script(arguments, monkeypatch),
    }[request.param]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["scenes", "--precision", "fp8"], "error: expected precision auto, bf16 or fp32, got 'fp8'"),
        (["scene"], "error: expected one of the recipes ablation, "),
        (
            ["scenes-start", "--train", "imagenet:x", "--grounding", "0", "--out", "OUT"],
            "error: expected scenes:SPLIT, jsonl:FILE or sharegpt4v:FILE",
        ),
    ],
)
def test_what_is_wrong_is_said_with_exit_code_2(command, arguments, reason, tmp_path, capsys):
    arguments = [str(tmp_path / "run") if argument == "OUT" else argument for argument in arguments]
    assert command(arguments) == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_the_command_trains_and_prints_the_best(configure, tmp_path, capsys):
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(dataclasses.asdict(configure())))
    assert (
        finelip(["train", str(recipe), "--json", "--steps", "2", "--no-tensorboard", "--out", str(tmp_path / "run")])
        == 0
    )
    best = json.loads(capsys.readouterr().out)
    assert best["step"] == 2.0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 2


def test_a_model_without_trained_aggregators_says_so_when_it_is_loaded(configure):
    config = configure(loss=["contrastive:global"], steps=1)
    train(config)
    with pytest.warns(UntrainedAggregatorsWarning):
        assert finelip_fast.load(Path(config.out) / "last").alpha == 1.0


# --- What is left when the disk is full, and what is taken from it -------------------------------------------------------


def test_a_full_disk_is_an_error_and_the_run_goes_on(configure, tmp_path, uninterrupted, monkeypatch, capsys):
    save_state, full = training.torch.save, [False]

    def save(state, path):
        if full[0] and state["step"] == 4:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_state(state, path)

    monkeypatch.setattr(training.torch, "save", save)
    config, full[0] = configure(**LASTING), True
    with pytest.raises(WriteError, match=r"cannot write .*state\.pt: No space left on device"):
        train(config)
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert read_weights(tmp_path / "run" / "state.pt")["step"] == 2
    full[0] = False
    assert_same_run(tmp_path / "run", train(config), uninterrupted)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_log_that_cannot_be_written_is_an_error_of_the_command(configure, tmp_path, capsys):
    config = configure(**LASTING)
    Path(config.out).mkdir()
    (Path(config.out) / "log.jsonl").symlink_to("/dev/full")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(config.to_json())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training.Log, "__init__", lambda self, folder, *_: vars(self).update(path=folder / "log.jsonl", events=None)
        )
        assert finelip(["train", str(recipe), "--out", config.out]) == 2
    assert re.search(r"error: cannot write .*log\.jsonl: No space left on device", capsys.readouterr().err)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 600 KiB."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path / "disk")]
    if os.name != "posix" or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a file system here")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def test_a_disk_that_is_really_full(configure, small_disk, tmp_path, capsys):
    config = dataclasses.replace(configure(**LASTING), out=str(small_disk / "run"))
    (tmp_path / "recipe.json").write_text(config.to_json())
    assert finelip(["train", str(tmp_path / "recipe.json"), "--out", config.out]) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: cannot write .*: .*; \d+\.\d MiB are needed, 0\.\d MiB are free at .*disk/run", error)
    assert not list(small_disk.rglob("*.tmp"))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("model"),
        lambda state: state.update(step="x"),
        lambda state: state.update(best=[1]),
        lambda state: state.update(optimizer={}),
        lambda state: state.update(rng=torch.zeros(3)),
        lambda state: state["model"].pop("logit_scale"),
        lambda state: state.update(config=5),
        lambda state: state.update(code=os.getcwd),
    ],
)
def test_a_state_of_something_else_is_refused(configure, tmp_path, uninterrupted, change):
    state = torch.load(uninterrupted[0] / "state.pt", weights_only=True)
    change(state)
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run" / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt: expected .*"):
        train(configure(**LASTING))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_state_is_an_error_that_says_how_to_begin_again(configure, tmp_path, share, capsys):
    config = configure(**LASTING, stop_at=3)
    train(config)
    capsys.readouterr()
    state = tmp_path / "run" / "state.pt"
    content = state.read_bytes()
    state.write_bytes(content[: int(share * len(content))])
    (tmp_path / "recipe.json").write_text(config.to_json())
    command = ["train", str(tmp_path / "recipe.json"), "--quiet", "--out"]
    assert finelip([*command, config.out]) == 2
    error = capsys.readouterr().err
    advice = re.search(
        r"start again with another --out with (--init) (\S+), or remove the file and start again in this one\n", error
    )
    assert error.startswith(f"error: {state}: expected the state of a run, found ")
    assert "Traceback" not in error
    assert finelip([*command, str(tmp_path / "another"), *advice.groups()]) == 0
    state.unlink()
    assert finelip([*command, config.out]) == 0


@pytest.mark.parametrize("change", ["shorter", "other"])
def test_data_that_changed_under_its_name_is_noticed(configure, tmp_path, data, change):
    source = Path(data.removeprefix("jsonl:"))
    lines = source.read_text().splitlines()
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(lines))
    options = {**LASTING, "train": f"jsonl:{pairs}", "root": str(source.parent)}
    train(configure(**options, stop_at=3))
    pairs.write_text("\n".join(lines[:-1] if change == "shorter" else [*lines[:-1], lines[0]]))
    present = f"now pairs {16 - (change == 'shorter')}"
    expected = f"the data of the run in .* have changed: .* had pairs 16, sha256 [0-9a-f]{{12}}, {present}"
    with pytest.raises(ConfigError, match=f"{expected}.*; restore them to resume, or pass another --out"):
        train(configure(**options))
    pairs.write_text("\r\n".join(lines))  # the same pairs
    train(configure(**options))


def test_a_run_of_an_earlier_version_does_not_know_its_data_and_goes_on(configure, tmp_path, uninterrupted):
    train(configure(**LASTING, stop_at=3))
    path = tmp_path / "run" / "state.pt"
    state = torch.load(path, weights_only=True)
    del state["data"], state["place"], state["alpha"]
    torch.save(state, path)
    assert_same_run(tmp_path / "run", train(configure(**LASTING)), uninterrupted)


def test_names_that_are_no_utf8_are_trained_on_and_gone_on_with(configure, tmp_path, data, capsys):
    source = Path(data.removeprefix("jsonl:"))
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    for line in lines:
        shutil.copy(source.parent / line["image"], folder / ("\udce9" + line["image"]))
        line["image"] = "\udce9" + line["image"]
    (folder / "\udce95.png").unlink()
    (folder / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    places = {"train": f"jsonl:{folder / 'pairs.jsonl'}", "out": str(folder / "run")}
    for stop_at in (3, 6):
        best = train(configure(**LASTING, **places, validation=places["train"], stop_at=stop_at))
    assert best["val_t2i_recall@10"] > 0
    assert "caf\\udce9/\\udce95.png" in capsys.readouterr().err


def test_what_a_killed_writer_left_is_removed(configure, tmp_path):
    left = tmp_path / "run" / "best" / f".{'0' * 32}.tmp"
    left.parent.mkdir(parents=True)
    left.touch()
    train(configure(**LASTING, stop_at=1))
    assert not left.exists()


# --- What errors advise ------------------------------------------------------------------------------------------


@pytest.fixture
def advised(configure, tmp_path):
    """Return a function that provokes an error, and then follows its advice."""

    def follow(message, changes, **options):
        with pytest.raises((ConfigError, TrainingError), match=message) as caught:
            train(configure(**options))
        assert all(name in str(caught.value).replace("-", "_") for name in changes)
        return train(configure(**(options | changes)))

    return follow


@pytest.mark.parametrize("out", ["run", "anew"])
def test_a_loss_that_is_no_number_is_mended_by_lower_rates(advised, monkeypatch, tmp_path, out):
    take_step = Trainer._train_step

    def diverging(self, batches):
        if self.step == 3 and self.config.encoder_lr > 1e-3:
            self.model.visual.proj.register_hook(lambda gradient: gradient * torch.nan)
        return take_step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", diverging)
    changes = {"encoder_lr": 1e-4, "aggregator_lr": 1e-4, "out": str(tmp_path / out)}
    advised("its gradient's norm nan, at step 3: lower --encoder-lr", changes, **LASTING)
    steps = [line["step"] for line in log_of(tmp_path / out) if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert (log_of(tmp_path / out)[0]["encoder_lr"] == 3e-3) == (out == "run")


def test_a_share_of_broken_pairs_that_is_too_large_is_mended_by_allowing_it(advised, damaged, monkeypatch):
    monkeypatch.setattr(training, "_BROKEN_AFTER", 16)
    advised("raise --max-broken-share to resume", {"max_broken_share": 0.5}, **damaged)


def test_pictures_in_another_folder_are_found_by_root(advised, data, tmp_path):
    source = Path(data.removeprefix("jsonl:"))
    shutil.copy(source, tmp_path / "pairs.jsonl")
    moved, root = f"jsonl:{tmp_path / 'pairs.jsonl'}", {"root": str(source.parent)}
    advised("none of the 16 pairs tried, of 16, can be read.*, pass --root", root, train=moved)
    advised(
        "none of the 16 pictures of validation=.*, pass --root", root, validation=moved, out=str(tmp_path / "other")
    )


def test_a_batch_larger_than_the_data_is_mended_by_a_smaller_one(advised):
    advised("at least one global batch of 32 examples, got 16", {"batch_size": 8}, batch_size=32)


@pytest.mark.parametrize(
    ("options", "changes"), [({"batch_size": 8}, {"batch_size": 4}), ({"batch_size": 4, "workers": 2}, {"workers": 1})]
)
def test_shards_of_less_than_a_batch_are_mended_by_fewer_workers_or_a_smaller_one(
    advised, data, tmp_path, monkeypatch, options, changes
):
    pytest.importorskip("webdataset")
    source = Path(data.removeprefix("jsonl:"))
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    monkeypatch.chdir(tmp_path)
    for shard in range(2):  # of two and three samples
        with tarfile.open(f"ab:{shard}.tar", "w") as tar:
            for line in lines[shard * 2 : shard * 3 + 2]:
                (tmp_path / "caption.txt").write_text(line["caption"])
                tar.add(source.parent / line["image"], line["image"])
                tar.add("caption.txt", line["image"].replace("png", "txt"))
    with pytest.raises(ConfigError, match=r"a file whose name has a colon is written \./NAME"):
        TrainConfig(train="webdataset:ab:{0..1}.tar", epoch_batches=1, out="run", validation=data)
    shards = {"train": "webdataset:./ab:{0..1}.tar", "steps": 1}
    advised("expected epoch_batches ", {"epoch_batches": 1}, **shards, batch_size=2, out="first")
    advised("less than one batch per worker of a process", changes, **shards, epoch_batches=1, **options)


@pytest.mark.parametrize(
    ("message", "changes", "options"),
    [
        ("expected accumulation separate", {"accumulation": "separate"}, {"grounding": 0.1, "accumulation_steps": 2}),
        ("found none; use --device cpu", {"device": "cpu"}, {"device": "cuda"}),
        ("or pass --no-tensorboard", {"tensorboard": False}, {"tensorboard": True}),
    ],
)
def test_what_cannot_be_honoured_is_mended_as_the_error_says(advised, monkeypatch, message, changes, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    scenes = {"train": "scenes:train:16", "validation": "scenes:val:8", "context_length": 256, "steps": 1}
    advised(message, changes, **scenes, **options)
