"""Train FineLIP: ``python training/train.py --help``, ``torchrun --nproc-per-node N training/train.py``, ``finelip train``.

A run lives in its ``--out`` folder: ``best/`` and ``last/`` are checkpoints for :func:`finelip_fast.load`, ``log.jsonl`` has
a line for each logged step and validation, and an interrupted run resumes from ``state.pt`` with bit-identical results. It may
also resume with more steps, other learning rates or another number of processes: each pair of the epoch is still used once,
but the weights differ from those of a run that had these settings from its start.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, whose seconds count as part of the command
    from finelip_fast._command_line import run_script

    raise SystemExit(run_script("train"))

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from finelip_fast import checkpoint
from finelip_fast._files import remove_unfinished, write_error, write_text_whole
from finelip_fast._terminal import printable
from finelip_fast.checkpoint.building import not_finite
from finelip_fast.checkpoint.foreign import shortened
from finelip_fast.checkpoint.weight_files import read_weights
from finelip_fast.datasets import open_dataset
from finelip_fast.errors import CheckpointError, ConfigError, TrainingError
from finelip_fast.kernels.cpu import LinearPrecision
from finelip_fast.model import FineLIP
from finelip_fast.training.batch import Batch
from finelip_fast.training.config import TrainConfig
from finelip_fast.training.data import TrainingData, identity_of
from finelip_fast.training.distributed import gather, process_group
from finelip_fast.training.features import Features, compute
from finelip_fast.training.log import Log
from finelip_fast.training.optimizer import freeze, parameter_groups, schedule
from finelip_fast.training.start import autocast, choose_device, has_bfloat16, start_model
from finelip_fast.training.state import check_resumable, damage_explained, write_state
from finelip_fast.training.step import Step
from finelip_fast.training.validation import mean_recall, validate

_logger = logging.getLogger(__name__)

# Number of pairs read before the share of broken ones is compared with the limit.
_BROKEN_AFTER = 200

# CLIP's upper bound of exp(logit_scale).
_MAX_LOGIT_SCALE = math.log(100)


def train(config: TrainConfig, *, progress: bool = True) -> dict[str, float]:
    """Start or resume the training run that ``config`` describes.

    Args:
        config: Configuration, whose ``out`` is the folder of the run.
        progress: Whether to show progress bars.

    Returns:
        Metrics of the best validation, with its ``step``.

    Raises:
        ConfigError: The folder holds a run with another configuration, or one on data that has changed since.
        CheckpointError: The folder's ``state.pt`` is damaged or does not belong to a run.
        TrainingError: Loss or weights are no longer finite (the message gives the step), or too many pairs cannot be read.
        WriteError: The disk is full; the same command resumes from the last saved state.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    device = choose_device(config.device)
    with process_group(device) as (rank, world):
        if rank == 0 and config.precision == "bf16" and not has_bfloat16(device):
            _logger.warning("no bfloat16 instructions on %s: precision auto or fp32 trains much faster", device)
        return Trainer(config, device, rank, world, progress=progress and rank == 0).run()


class Trainer:
    """One process's part of a run."""

    def __init__(
        self, config: TrainConfig, device: torch.device, rank: int = 0, world: int = 1, *, progress: bool = True
    ) -> None:
        self.config, self.device, self.rank, self.world, self.progress = config, device, rank, world, progress
        self.out = Path(config.out)
        torch.manual_seed(config.seed)
        self.model = self._start_model().to(device).train()
        freeze(self.model, config.unfreeze)
        self.model.gradient_checkpointing(config.gradient_checkpointing)
        # SigLIP's table is never stretched, so none of its rows is newer than the others.
        freezes_positions = config.freeze_positions and self.model.config.family == "clip"
        if freezes_positions and self.model.text.positional_embedding.requires_grad:
            self.model.text.positional_embedding.register_hook(self._zero_frozen_positions)
        # CLIP's betas: the second moment's shorter memory settles sooner after a jump in the gradient.
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config), lr=0.0, betas=(0.9, 0.98), eps=1e-6, fused=True
        )
        average = get_ema_multi_avg_fn(config.ema_decay)
        self.ema = AveragedModel(self.model, multi_avg_fn=average) if config.ema_decay else None
        self.preprocess = self.model.preprocess
        self.step = self.seen = self.broken = 0
        self.best: dict[str, float] = {}
        self.data = self._resume()
        self.computation = Step(self.model, config, device, world)
        self._stop = False

    # The loop ------------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, float]:
        """Train to the last step; an interrupt saves the state first."""
        handlers = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        log = Log(self.out, self.step, self.config.tensorboard) if self.rank == 0 else None
        try:
            with logging_redirect_tqdm():
                return self._run(log)
        finally:
            if log:
                log.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _run(self, log: Log | None) -> dict[str, float]:
        validation = self._open(self.config.validation) if self.rank == 0 else None
        if validation is not None and len(validation) == 0:
            raise ConfigError(f"expected pairs to validate on, got none from validation={self.config.validation!r}")
        features = self._features(validation, "validation", 1) if validation is not None else None
        hidden = not self.progress
        progress = tqdm(total=self.config.last_step, initial=self.step, unit="step", disable=hidden, mininterval=2)
        batches = self._readable_batches()
        started, first = time.monotonic(), self.step
        while self.step < self.config.last_step:
            values = self._train_step([next(batches) for _ in range(self.config.accumulation_steps)])
            self.step += 1
            progress.update()
            finished = self.step == self.config.last_step
            validates = finished or self.step % self.config.eval_every == 0
            keeps = finished or self.step % self.config.save_every == 0
            if validates or keeps:
                self._check_weights()
            if log and (finished or self.step % self.config.log_every == 0):
                pairs = (self.step - first) * self.config.batch_size * self.config.accumulation_steps * self.world
                values["pairs_per_second"] = pairs / (time.monotonic() - started)
                log.write(self.step, {name: float(value) for name, value in values.items()})
                progress.set_postfix(loss=f"{float(values['loss']):.3f}")
            if log and validates:
                metrics = self._validate(validation, features)
                log.write(self.step, metrics)
                progress.set_postfix(recall=f"{mean_recall(metrics):.3f}")
            stop = self._anyone_stops()
            if stop and not keeps:
                self._check_weights()
            if keeps or stop:
                self._save_state()
            if stop and not finished:
                raise TrainingError(f"stopped at step {self.step}; the same command resumes from there")
        if self.rank == 0:
            checkpoint.save(self._averaged(), self.out / "last", metadata=self._metadata({}))
        return self.best

    def _train_step(self, batches: list[Batch]) -> dict[str, Tensor | float]:
        share = schedule(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        values = self.computation.backward(batches)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm or math.inf)
        if not bool(values["loss"].isfinite() & norm.isfinite()):
            raise TrainingError(
                f"the loss is {float(values['loss'])}, its gradient's norm {float(norm)}, at step {self.step}: {self._advice}"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, _MAX_LOGIT_SCALE)
        if self.ema:
            self.ema.update_parameters(self.model)
        scale = self.model.logit_scale.detach().exp()
        return {
            **values,
            "grad_norm": norm,
            "encoder_lr": self.config.encoder_lr * share,
            "logit_scale": scale,
            "captions_cut": sum(batch.captions_cut for batch in batches),
        }

    # Validation and saving ---------------------------------------------------------------------------------------------

    def _validate(self, pairs: Any, features: Features | None) -> dict[str, float]:
        """Measure recall on the validation pairs, store the alpha chosen there in the model, and save the best so far."""
        model = self._averaged().eval()
        with autocast(self.device, self.config.precision):
            metrics = validate(model, pairs, name=self.config.validation, alphas=self.config.alphas, features=features)
        self._take_alpha(metrics["val_alpha"])
        self.model.train()
        if mean_recall(metrics) > mean_recall(self.best):
            self.best = {**metrics, "step": float(self.step)}
            checkpoint.save(model, self.out / "best", metadata=self._metadata(metrics))
        return metrics

    def _take_alpha(self, alpha: float) -> None:
        for model in (self.model, self._averaged()):
            model.config = model.config.replace(alpha=alpha)

    def _check_weights(self) -> None:
        """Refuse to continue with weights that a step has made NaN or infinite; every process has the same weights."""
        models = [self.model, self._averaged()] if self.ema else [self.model]
        if broken := {name: None for model in models for name in not_finite(model.state_dict())}:
            raise TrainingError(
                f"NaN or infinity in {shortened(broken)} after step {self.step}, which is not saved: {self._advice}"
            )

    @property
    def _advice(self) -> str:
        """Advice on how to end a divergence of this run, which resumes from its last state."""
        rates = f"--encoder-lr, now {self.config.encoder_lr:g}, and --aggregator-lr, now {self.config.aggregator_lr:g}"
        return (
            f"lower {rates}; with the same --out the run resumes from its last state, with another it starts "
            f"again{self._from_the_best}"
        )

    @property
    def _from_the_best(self) -> str:
        return f", from the best weights by --init {self.out / 'best'}" if self.best else ""

    def _metadata(self, metrics: dict[str, float]) -> dict[str, Any]:
        # A checkpoint travels; the folders of the machine that made it do not.
        training = {**dataclasses.asdict(self.config), "out": self.out.name, "root": ""}
        for name, value in training.items():
            # A path may not be UTF-8, JSON must be.
            training[name] = printable(value) if isinstance(value, str) else value
        return {"step": self.step, "training": training, "validation": metrics}

    def _averaged(self) -> FineLIP:
        return cast("FineLIP", self.ema.module) if self.ema else self.model

    def _save_state(self) -> None:
        """Save the state that a run resumes from; every process takes part, and the first one writes."""
        place = self.data.state_dict()
        if "places" in place:
            place["places"] = gather(place["places"].to(self.device)[None]).amax(dim=0).cpu()
        if self.rank:
            return
        state: dict[str, Any] = {
            "step": self.step,
            "seen": self.seen,
            "broken": self.broken,
            "best": self.best,
            "alpha": self.model.alpha,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "data": self.data_identity,
            "place": place,
            "config": {**dataclasses.asdict(self.config), "processes": self.world},
        }
        write_state(self.out / "state.pt", state)

    def _resume(self) -> TrainingData:
        """Restore the folder's state, if it has one.

        Returns:
            The training data, at the position of the run.
        """
        if self.rank == 0:
            for folder in (self.out, self.out / "best", self.out / "last"):
                remove_unfinished(folder)
        source = self._training_source()
        self.data_identity = identity_of(source, remote=self.config.remote_data)
        path = self.out / "state.pt"
        if path.exists():
            with damage_explained(self.out):
                state = read_weights(path)
                warning = check_resumable(state, self.config, processes=self.world, identity=self.data_identity)
                if warning and self.rank == 0:
                    _logger.warning("%s", warning)
                data = self._open_data(source)
                self._restore(state, data)
        else:
            data = self._open_data(source)
        if self.rank == 0:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise write_error(self.out, error) from error
            write_text_whole(self.out / "config.json", self.config.to_json())
        return data

    def _restore(self, state: Mapping[str, Any], data: TrainingData) -> None:
        self.step, self.seen, self.broken = (int(state[name]) for name in ("step", "seen", "broken"))
        self.best = {name: float(value) for name, value in state["best"].items()}
        if broken := not_finite(state["model"]):
            raise CheckpointError(
                f"{self.out / 'state.pt'}: expected finite weights, found NaN or infinity in {shortened(broken)}; "
                f"lower the learning rates, and use another --out{self._from_the_best}"
            )
        self.model.load_state_dict(state["model"])
        peaks = [group["peak_lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["peak_lr"] = peak
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        # An earlier version kept only that of the best validation.
        self._take_alpha(float(state.get("alpha", self.best.get("val_alpha", self.model.alpha))))
        torch.set_rng_state(state["rng"].cpu())
        if "place" in state:
            data.load_state_dict(state["place"])
        else:  # saved by an earlier version
            data.skip(self.step * self.config.accumulation_steps, processes=int(state["config"]["processes"]))

    # Small parts -------------------------------------------------------------------------------------------------------

    def _start_model(self) -> FineLIP:
        """The model to train; the ablation's trainer makes its variant of it."""
        return start_model(self.config)

    def _open(self, spec: str) -> Any:
        return open_dataset(spec, image_size=self.model.config.image_size, root=self.config.root or None)

    def _training_source(self) -> Any:
        """Pairs to train on, or the pattern of shards."""
        kind, _, pattern = self.config.train.partition(":")
        return pattern if kind == "webdataset" else self._open(self.config.train)

    def _open_data(self, source: Any) -> TrainingData:
        return TrainingData(
            source,
            self.preprocess,
            self.model.config.context_length,
            tokenizer=self.model.tokenizer,
            batch_size=self.config.batch_size,
            group=self.config.group,
            epoch_batches=self.config.epoch_batches,
            seed=self.config.seed,
            workers=self.config.workers,
            rank=self.rank,
            world=self.world,
            pin_memory=self.device.type == "cuda",
            max_broken_share=self.config.max_broken_share,
            remote=self.config.remote_data,
            augmentation=self.config.augmentation,
            features=self._features(source, "train", self.world),
        )

    def _features(self, pairs: Any, part: str, world: int) -> Features | None:
        """Features of the pairs from the frozen encoders; ``world`` processes share the work and wait for each other."""
        if not self.config.features:
            return None
        folder = Path(self.config.features) / part
        precision = cast("LinearPrecision", self.config.feature_precision)
        share = {"rank": self.rank, "world": world}
        features = compute(self.model, pairs, folder, precision=precision, **share, progress=self.progress)
        if world > 1:
            gather(torch.zeros(1, device=self.device))
        return features

    def _readable_batches(self) -> Iterator[Batch]:
        """Yield batches with pairs, counting broken pairs on the way."""
        for batch in self.data:
            self._count_broken(batch)
            if len(batch):
                yield batch

    def _count_broken(self, batch: Batch) -> None:
        self.seen += len(batch)
        self.broken += len(batch.broken)
        for message in batch.broken:
            _logger.warning("skipped: %s", printable(message))
        met = self.seen + self.broken
        if met >= _BROKEN_AFTER and self.broken > self.config.max_broken_share * met:
            raise TrainingError(
                f"{self.broken} of {met} pairs cannot be read, more than the share of "
                f"{self.config.max_broken_share:g} that --max-broken-share allows; raise --max-broken-share to resume "
                "from the last state, or repair the data"
            )

    def _zero_frozen_positions(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[: self.config.freeze_positions] = 0
        return gradient

    def _ask_to_stop(self, *_: Any) -> None:
        self._stop = True

    def _anyone_stops(self) -> bool:
        if self.world == 1:
            return self._stop
        return bool(gather(torch.tensor([self._stop], dtype=torch.int32, device=self.device)).any())
