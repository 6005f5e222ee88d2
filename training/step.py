"""The computation of a training step: forward and backward passes over its batches.

Gradient accumulation affects losses that compare the pairs of a batch. With ``accumulation="cached"``, the embeddings of all
passes are computed first without a graph, then the loss and its gradient with respect to them, and a second forward pass
carries that gradient into the weights. The step equals one over the whole batch. With ``"separate"``, each pass has only its
own negatives, which is cheaper by a third, but a different loss.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from finelip_fast.model import FineLIP, TrainingOutput
from finelip_fast.training.batch import Batch
from finelip_fast.training.config import TrainConfig
from finelip_fast.training.distributed import gather
from finelip_fast.training.losses import contextual_alignment_loss, grounding_loss
from finelip_fast.training.start import autocast


class Step:
    """Compute the losses and gradients of training steps.

    Attributes:
        criterion: Loss over the pairs of all processes.

    Args:
        model: Model to train, on ``device``.
        config: Configuration of the run.
        device: Device that trains.
        world: Number of processes.
    """

    def __init__(self, model: FineLIP, config: TrainConfig, device: torch.device, world: int) -> None:
        self.config, self.device, self.world = config, device, world
        self.criterion = config.criterion
        self.forward: Any = torch.compile(model, dynamic=True) if config.compile else model
        if world > 1:
            self.forward = DistributedDataParallel(self.forward)

    def backward(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Add the gradients of a step's batches to the parameters, and return the loss and its terms."""
        cached = len(batches) > 1 and self.config.accumulation == "cached"
        with self._attention():
            return self._cached_backward(batches) if cached else self._plain_backward(batches)

    def _plain_backward(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Backpropagate each pass with its own negatives; exact for a single pass."""
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(batches):
            with self._sync(index == len(batches) - 1):
                output, batch = self._forward(batch)
                loss, terms = self._loss(output.images, output.texts, batch.image_ids, output.logit_scale)
                for name, (weight, value) in self._local_terms(output, batch).items():
                    loss = loss + weight * value
                    terms[name] = value.detach()
                (loss / len(batches)).backward()
            for name, value in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums.get(name, 0) + value / len(batches)
        return sums

    def _cached_backward(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Backpropagate all passes as one batch: embeddings first, then their gradient through a second forward pass each."""
        with torch.no_grad():
            embedded = [self._forward(batch)[0][:3] for batch in batches]
        images, texts = (torch.cat([pair[side] for pair in embedded]).requires_grad_() for side in (0, 1))
        scale = embedded[0][2].clone().requires_grad_()
        image_ids = torch.cat([batch.image_ids for batch in batches]).to(self.device)
        loss, terms = self._loss(images, texts, image_ids, scale)
        grad_images, grad_texts, grad_scale = torch.autograd.grad(loss, (images, texts, scale))
        size = len(batches[0].pixels)
        for index, batch in enumerate(batches):
            rows = slice(index * size, (index + 1) * size)
            last = index == len(batches) - 1
            with self._sync(last):
                outputs = self._forward(batch)[0][:3]
                gradients = (grad_images[rows], grad_texts[rows], grad_scale if last else torch.zeros_like(scale))
                torch.autograd.backward(outputs, gradients)
        return {"loss": loss.detach(), **terms}

    def _forward(self, batch: Batch) -> tuple[TrainingOutput, Batch]:
        """Return the model's output, and the batch on the model's device."""
        batch = batch.map(lambda tensor: tensor.to(self.device, non_blocking=True))
        with autocast(self.device, self.config.precision):
            return self.forward(batch.pixels, batch.ids, batch.tokens), batch

    def _local_terms(self, output: TrainingOutput, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Loss terms, with their weights, whose negatives come from this process only, since it has many."""
        terms, scale = {}, output.logit_scale
        if weight := self.config.grounding:
            phrases = batch.owners, batch.spans, batch.boxes, batch.labels
            terms["grounding"] = weight, grounding_loss(output.patches, output.tokens, *phrases, scale)
        if weight := self.config.contextual:
            parts = output.texts[:, 0], batch.part_owners, batch.parts, batch.image_ids
            value = contextual_alignment_loss(output.patches, output.tokens, *parts, scale, beta=self.config.beta)
            terms["contextual"] = weight, value
        return terms

    def _loss(
        self, images: Tensor, texts: Tensor, image_ids: Tensor, scale: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss over the pairs of all processes; every process computes the same one (see ``gather``)."""
        loss, terms = self.criterion(gather(images), gather(texts), gather(image_ids), scale)
        # Give the scale a zero gradient even if no loss uses it: neither autograd.backward nor DistributedDataParallel accepts
        # a missing one.
        return loss + 0.0 * scale, terms

    def _attention(self) -> Any:
        """Use plain matrix products on a CPU, where the fused attention's backward pass is slower at short lengths."""
        return sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext()

    def _sync(self, last: bool) -> Any:
        """Average gradients over the processes only in the last pass of a step."""
        return nullcontext() if last or self.world == 1 else self.forward.no_sync()
