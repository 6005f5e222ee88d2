"""Two processes act as one: a step over both equals the step of one process over all their pairs.

Started by ``torchrun``, this file is the program of the two processes: it reads the cases and writes results for the tests.
"""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import tarfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from finelip_fast.config import PRESETS, FineLIPConfig
from finelip_fast.training.config import TrainConfig
from finelip_fast.training.distributed import gather, process_group
from finelip_fast.training.train import Trainer, parameter_groups, train

TINY = FineLIPConfig(
    embed_dim=32,
    image_size=32,
    patch_size=8,
    vision_width=64,
    vision_layers=1,
    vision_heads=1,
    text_width=32,
    text_layers=1,
    text_heads=1,
    context_length=24,
)
PAIRS = 16

# Two steps each: leftovers of one step (gradients, the wrapper's state) must not reach the next.
LOSSES = {
    "contrastive": ["contrastive:global", "contrastive:fine"],
    "triplet": ["triplet:fine"],
    "hardest triplet": ["hardest_triplet:combined"],
    "adaptive margin": ["adaptive_margin:fine:0.5"],
}
CASES = {
    **{name: {"loss": loss, "batch_size": 4} for name, loss in LOSSES.items()},
    "contrastive, cached": {"loss": LOSSES["contrastive"], "batch_size": 2, "accumulation_steps": 2},
    "triplet, cached": {"loss": LOSSES["triplet"], "batch_size": 2, "accumulation_steps": 2},
    "contrastive, frozen": {"loss": LOSSES["contrastive"], "batch_size": 4, "freeze_positions": 3},
    "contrastive, on features": {"loss": LOSSES["contrastive"], "batch_size": 4, "unfreeze": "none", "features": "x"},
}


def write_pairs(folder):
    generator = np.random.default_rng(0)
    words = ["red", "green", "blue", "house", "tree", "river", "old", "small", "bright"]
    lines = []
    for index in range(PAIRS):
        blocks = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        blocks.resize((32, 32), Image.Resampling.NEAREST).save(folder / f"{index}.png")
        caption = " ".join(generator.choice(words, size=3 + index % 5))
        # Two pairs share a picture, whose id must be compared across processes, too.
        lines.append(json.dumps({"image": f"{index // 2 * 2 if index < 8 else index}.png", "caption": caption}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return f"jsonl:{folder / 'pairs.jsonl'}"


def parameters_after_two_steps(options, rank, world):
    """Take two steps of plain gradient descent; Adam would take a full step even if a gradient were only rounding noise."""
    fixed = {"preset": "tiny", "context_length": 24, "precision": "fp32", "device": "cpu", "workers": 0, "steps": 100}
    fixed |= {"encoder_lr": 0.3, "aggregator_lr": 0.3, "weight_decay": 0.0, "warmup_steps": 0, "freeze_positions": 0}
    options = fixed | options
    if "features" in options:
        options["features"] = f"{options['out']} features"
    config = TrainConfig(**options, tensorboard=False)
    trainer = Trainer(config, torch.device("cpu"), rank, world)
    trainer.optimizer = torch.optim.SGD(parameter_groups(trainer.model, config), lr=0.0)
    trainer.model.logit_scale.data.fill_(1.0)  # away from its bounds
    batches = iter(trainer.data)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    for trainer.step in range(2):
        trainer._train_step([next(batches) for _ in range(config.accumulation_steps)])
    return start, trainer.model.state_dict()


def gathered_gradients(rank):
    """Return gradients of a loss that both processes compute, with terms that share their gradient's memory."""
    left, right = (torch.full((2, 3), float(rank + 1 + side), requires_grad=True) for side in (0, 1))
    factors = torch.arange(12.0).view(4, 3)
    together = gather(left) + gather(right)
    (together * factors).sum().backward()
    return {"gathered": gather(left).detach(), "left": left.grad, "right": right.grad}


def run_noting_pictures(config):
    """Run a training, and write the ids of the pictures that this process sees."""
    take_step, met = Trainer._train_step, []

    def noting(self, batches):
        met.append([image_id for batch in batches for image_id in batch.image_ids.tolist()])
        return take_step(self, batches)

    Trainer._train_step = noting
    try:
        train(config)
    finally:
        Trainer._train_step = take_step
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    (Path(config.out) / f"met-{world}-{rank}.json").write_text(json.dumps(met))


def main(folder):
    """Run one of the two processes."""
    PRESETS["tiny"] = TINY
    if (folder / "recipe.json").exists():
        return run_noting_pictures(TrainConfig(**json.loads((folder / "recipe.json").read_text())))
    with process_group(torch.device("cpu")) as (rank, world):
        results = {"world": world, "gather": gathered_gradients(rank), "after": {}}
        for name, options in json.loads((folder / "cases.json").read_text()).items():
            _, results["after"][name] = parameters_after_two_steps(options, rank, world)
            dist.barrier()
        torch.save(results, folder / f"rank{rank}.pt")


def run_two_processes(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    process = subprocess.run(
        [*command, str(folder)], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stderr


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of each of the two processes, for every case."""
    folder = tmp_path_factory.mktemp("distributed")
    data = write_pairs(folder)
    cases = {
        name: {"train": data, "validation": data, "out": str(folder / f"run {name}"), **options}
        for name, options in CASES.items()
    }
    (folder / "cases.json").write_text(json.dumps(cases))
    run_two_processes(folder)
    return folder, [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.fixture
def alone(ranks, monkeypatch):
    """Two steps of one process over the pairs of both; weights before and after."""
    monkeypatch.setitem(PRESETS, "tiny", TINY)

    def run(name, **changes):
        folder, _ = ranks
        data = f"jsonl:{folder / 'pairs.jsonl'}"
        options = CASES[name] | {"batch_size": 8, "accumulation_steps": 1} | changes
        return parameters_after_two_steps(
            {"train": data, "validation": data, "out": str(folder / "alone"), **options}, 0, 1
        )

    return run


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_one_process_is_a_world_of_its_own(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with process_group(torch.device("cpu")) as (rank, world):
        assert (rank, world) == (0, 1)
        local = torch.ones(2)
        assert gather(local) is local


def test_a_validation_of_hours_does_not_end_the_run(monkeypatch):
    """The other processes wait for the first."""
    environment = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in (environment | {"GLOO_SOCKET_IFNAME": "lo"}).items():
        monkeypatch.setenv(name, value)
    with process_group(torch.device("cpu")) as (rank, world):
        assert (rank, world) == (0, 1)
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout >= timedelta(hours=12)


def test_gather_joins_rows_by_rank_and_sums_what_the_processes_ask(ranks):
    _, results = ranks
    assert [result["world"] for result in results] == [2, 2]
    expected = torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None].expand(4, 3)
    factors = torch.arange(12.0).view(4, 3)
    for rank, result in enumerate(results):
        assert torch.equal(result["gather"]["gathered"], expected)
        for side in ("left", "right"):
            assert torch.equal(result["gather"][side], 2 * factors[2 * rank :][:2])


@pytest.mark.parametrize("name", CASES)
def test_two_processes_step_as_one(ranks, alone, name):
    _, results = ranks
    before, expected = alone(name)
    first, second = (result["after"][name] for result in results)
    for key, value in expected.items():
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")
    moved = {key for key, value in expected.items() if (value - before[key]).abs().max() > 1e-5}
    assert "image_aggregator.hidden.weight" in moved
    encoders = {"text.token_embedding.weight", "visual.conv1.weight"}
    assert encoders & moved == (set() if "features" in CASES[name] else encoders)
    assert ("logit_scale" in moved) == ("triplet" not in name)


def test_negatives_of_other_processes_count(alone):
    """A step without the other process's negatives differs; otherwise the comparison above would be meaningless."""
    _, joint = alone("contrastive")
    _, separate = alone("contrastive", batch_size=4, accumulation_steps=2, accumulation="separate")
    assert max((joint[key] - separate[key]).abs().max().item() for key in joint) > 1e-3


def write_shards(folder):
    """Write the pairs as four shards."""
    pytest.importorskip("webdataset")
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    for shard in range(4):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for index in range(shard * 4, shard * 4 + 4):
                for suffix, content in (
                    ("png", (folder / f"{index}.png").read_bytes()),
                    ("txt", lines[index]["caption"].encode()),
                ):
                    info = tarfile.TarInfo(f"{index}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return f"webdataset:{folder}/{{0..3}}.tar"


@pytest.mark.parametrize(("kind", "two_first"), [("files", True), ("shards", False)])
def test_a_run_goes_on_with_another_number_of_processes_with_the_rest_of_the_epoch(
    tmp_path, monkeypatch, kind, two_first
):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    pairs = write_pairs(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    lines = [line | {"image": f"{index}.png"} for index, line in enumerate(lines)]  # each has a picture of its own
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"preset": "tiny", "context_length": 24, "precision": "fp32", "device": "cpu", "workers": 0, "threads": 1}
    options |= {"train": write_shards(tmp_path) if kind == "shards" else pairs, "validation": pairs, "batch_size": 2}
    options |= {"steps": 99, "freeze_positions": 0, "tensorboard": False, "out": str(tmp_path / "run")}
    epoch_batches = {1: 8, 2: 4}
    met = []
    for world, stop_at in (
        ((2, 2), (1, 6)) if two_first else ((1, 4), (2, 6))
    ):  # two processes take as many pairs in two steps
        config = TrainConfig(**options, stop_at=stop_at, epoch_batches=epoch_batches[world] if kind == "shards" else 0)
        if world == 1:
            run_noting_pictures(config)
        else:
            (tmp_path / "recipe.json").write_text(config.to_json())
            log = run_two_processes(tmp_path)
            assert log.count("resumes with {") == (not two_first)
        for rank in range(world):
            steps = json.loads((tmp_path / "run" / f"met-{world}-{rank}.json").read_text())
            met += [image_id for step in steps for image_id in step]
    assert len(met) == len(set(met)) == PAIRS


if __name__ == "__main__":
    main(Path(sys.argv[1]))
