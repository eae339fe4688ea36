"""The loop: batches, steps, looks at the validation windows, states on disk; the best weights win.

Nothing random is carried from step to step: the order of the windows follows from the seed and the round, the
dropout of a step from the seed and the step. So a resumed run needs no state of a generator.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.calibration.backward import next_token_loss
from secateur.calibration.windows import Windows
from secateur.core.errors import NumericsError
from secateur.core.progress import SILENT, Progress, Task
from secateur.recovery.base import Training
from secateur.recovery.losses import block_outputs, divergence, hidden_distance
from secateur.recovery.saved import TrainingState
from secateur.recovery.student import Student

__all__ = ["Curve", "Look", "Teacher", "Trainer", "steps_of"]

EVALUATION_WINDOWS_AT_ONCE = 4


def steps_of(tokens: int, batch_size: int, length: int) -> int:
    """Steps that see so many tokens, at least."""
    return -(-tokens // (batch_size * length))


@dataclass(frozen=True)
class Look:
    """One look at the validation windows.

    Attributes:
        step: how many were done.
        loss: mean training loss since the look before; None at the first.
        validation_loss: mean cross-entropy of the next token.
        learning_rate: of the last step.
    """

    step: int
    loss: float | None
    validation_loss: float
    learning_rate: float


@dataclass
class Curve:
    """How a training went.

    Attributes:
        looks: in order.
        step: how many were done.
        best_step: after which the weights are that were kept.
        stopped: it ended early because nothing got better.
        seconds: in all, those of interrupted runs included.
    """

    looks: list[Look] = field(default_factory=list)
    step: int = 0
    best_step: int = 0
    stopped: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Teacher:
    """The dense model.

    Attributes:
        model: in eval mode, without gradients.
        blocks: those of its blocks whose outputs match the student's, in the student's order; empty where
            none do.
    """

    model: PreTrainedModel
    blocks: Sequence[nn.Module] = ()


class Trainer:
    """Trains a student and leaves it with the weights that were best on the validation windows.

    Args:
        student: to train.
        teacher: to learn from, or None.
        method: the options.
        training, validation: windows of one length.
        batch_size: windows a step.
        steps: to do.
        seed: of the order of the windows and of dropout.
        saved: where the state of an interrupted run is, and goes.
        autocast: dtype to compute in where weights are float32; None for theirs.

    Raises:
        NumericsError: a loss that is not finite.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher | None,
        method: Training,
        training: Windows,
        validation: Windows,
        *,
        batch_size: int,
        steps: int,
        seed: int,
        saved: Path,
        device: torch.device,
        autocast: torch.dtype | None = None,
        progress: Progress = SILENT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.student, self.teacher, self.method = student, teacher, method
        self.windows, self.validation = training, validation
        self.batch_size, self.steps, self.seed = batch_size, steps, seed
        self.device, self.autocast, self.progress, self._clock = device, autocast, progress, clock
        self.curve = Curve()
        self._optimizer = torch.optim.AdamW(
            student.parameters.values(), lr=method.learning_rate, weight_decay=method.weight_decay
        )
        self._state = TrainingState(saved, student.parameters, self._optimizer)
        self._sum, self._since = torch.zeros((), device=device), 0
        self._every = max(1, round(steps / method.evaluations))
        if method.gradient_checkpointing:
            student.save_memory()

    def run(self) -> Curve:
        """Train from the start, or from the state that is there."""
        self._resume()
        started = kept = self._clock()
        before = self.curve.seconds
        with apart(self.device), self.progress.task("training", self.steps) as task:
            task.advance(self.curve.step)
            if not self.curve.looks:
                self._look()
            while self.curve.step < self.steps and not self.curve.stopped:
                self._step()
                if self.curve.step % self._every == 0 or self.curve.step == self.steps:
                    self._look()
                self._tell(task)
                if self._clock() - kept >= self.method.checkpoint_seconds:
                    self.curve.seconds = before + self._clock() - started
                    self._keep()
                    kept = self._clock()
        self.curve.seconds = before + self._clock() - started
        self._keep()
        self._state.take_best()
        return self.curve

    def _step(self) -> None:
        step = self.curve.step
        torch.manual_seed(_mixed(self.seed, 1, step))
        for group in self._optimizer.param_groups:
            group["lr"] = self.method.rate(step, self.steps)
        batch = self._batch(step)
        self.student.training(True)
        for part in batch.batches(self.method.micro_batch or len(batch)):
            loss = self._loss(part) * (len(part) / len(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            self._sum += loss.detach().to(self._sum.device)
        self.student.training(False)
        self.student.mask_gradients()
        torch.nn.utils.clip_grad_norm_(self.student.parameters.values(), self.method.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.curve.step += 1
        self._since += 1

    def _loss(self, batch: Windows) -> Tensor:
        """Cross-entropy; with a teacher mixed with the divergence, plus the distance of hidden states."""
        teacher, method = self.teacher, self.method
        with block_outputs(self.student.blocks if teacher and teacher.blocks else ()) as ours:
            logits = self._logits(self.student.model, batch)
        if teacher is None:
            return next_token_loss(logits, batch)
        with torch.no_grad(), block_outputs(teacher.blocks) as theirs:
            target = self._logits(teacher.model, batch)
        at, loss = batch.predicting, logits.new_zeros((), dtype=torch.float32)
        if method.kl_weight:
            loss = loss + method.kl_weight * divergence(logits, target, at, method.temperature)
        if method.kl_weight < 1:
            loss = loss + (1 - method.kl_weight) * next_token_loss(logits, batch)
        if theirs:
            loss = loss + method.hidden_weight * hidden_distance(ours, theirs, at, method.hidden)
        return loss

    def _logits(self, model: PreTrainedModel, batch: Windows) -> Tensor:
        """(B, T, vocabulary)."""
        mask = None if batch.mask is None else batch.mask.to(self.device, torch.int64)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            ids = batch.ids.to(self.device)
            logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits

    def _look(self) -> None:
        """Judge the weights as they are; keep them if they are the best."""
        losses, weights = [], []
        with torch.no_grad():
            for part in self.validation.batches(EVALUATION_WINDOWS_AT_ONCE):
                losses.append(next_token_loss(self._logits(self.student.model, part), part).double().cpu())
                weights.append(float(part.predicting.sum()))
        weight = torch.tensor(weights, dtype=torch.float64)
        found = float((torch.stack(losses) * weight).sum() / weight.sum())
        loss = float(self._sum) / self._since if self._since else None
        if not math.isfinite(found) or not math.isfinite(loss or 0.0):
            raise NumericsError(
                f"the loss is {found} after {self.curve.step} steps: "
                + ("lower --learning-rate" if self.curve.step else "the model predicts nothing finite")
            )
        rate = self.method.rate(self.curve.step - 1, self.steps) if self.curve.step else 0.0
        best = min((look.validation_loss for look in self.curve.looks), default=math.inf)
        self.curve.looks.append(Look(self.curve.step, loss, found, rate))
        if found < best:
            self.curve.best_step = self.curve.step
            self._state.hold_best()
        worse = sum(look.step > self.curve.best_step for look in self.curve.looks)
        self.curve.stopped = 0 < self.method.patience <= worse
        self._sum, self._since = torch.zeros_like(self._sum), 0

    def _tell(self, task: Task) -> None:
        last = self.curve.looks[-1]
        loss = "" if last.loss is None else f"loss {last.loss:.4f}, "
        task.advance(1, f"{loss}validation {last.validation_loss:.4f}")

    def _batch(self, step: int) -> Windows:
        """The windows of a step: each round sees all windows once, in an order of its own."""
        count = len(self.windows)
        places = [divmod(step * self.batch_size + number, count) for number in range(self.batch_size)]
        orders = {epoch: self._order(epoch) for epoch in dict(places)}
        return self.windows.chosen([int(orders[epoch][at]) for epoch, at in places])

    def _order(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(_mixed(self.seed, 0, epoch))
        return torch.randperm(len(self.windows), generator=generator)

    def _keep(self) -> None:
        """Make the state durable."""
        record = {**asdict(self.curve), "sum": float(self._sum), "since": self._since}
        self._state.save(record)

    def _resume(self) -> None:
        record = self._state.load()
        if record is None:
            return
        self._sum = torch.tensor(record.pop("sum"), device=self.device)
        self._since = record.pop("since")
        looks = [Look(**look) for look in record.pop("looks")]
        self.curve = Curve(looks=looks, **record)


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """The caller's random state is as it was afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _mixed(seed: int, purpose: int, number: int) -> int:
    """A seed for every purpose and number."""
    return (seed * 2_654_435_761 + purpose * 40_503 + number * 2_246_822_519 + 12_345) % (1 << 63)
