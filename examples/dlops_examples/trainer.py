"""The training loop: epochs, metrics, checkpoints and resuming."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from . import batches, builders, data, files, impl, logs, networks, progress, runs
from .distributed import Processes
from .errors import UsageError
from .logs import History
from .metrics import Tally
from .recipes import Recipe
from .settings import Settings

EVALUATION_BATCH = 500


class Trainer:
    """Trains ``recipe`` as ``settings`` say; ``history`` holds one row of metrics an epoch.

    ``images`` take the place of the recipe's data, ``folder`` that of ``<out>/<recipe>-<impl>``,
    which receives metrics.json, metrics.csv, last.pt and best.pt after every epoch. Each epoch
    draws its random numbers from a seed of its own, so a run that was killed and resumed ends with
    the bits of one that was not.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: Settings,
        images: data.Images | None = None,
        folder: Path | None = None,
    ) -> None:
        settings.apply()
        self.recipe, self.settings = recipe, settings
        self.folder = folder or runs.folder(recipe, settings)
        self.processes = Processes(settings.device)
        self.device = self.processes.device
        self.images = images or self._load_images()
        if settings.limit:
            self.images = self.images.limited(settings.limit)
        self.augment = builders.transforms(recipe.augment, "augment")
        self.normalize = builders.transforms(recipe.normalize, "normalize")
        self.layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self._build_model()
        counts = self.images.train.tensors[1].bincount(minlength=len(self.images.classes))
        self.loss = impl.build_loss(settings.impl, counts.tolist(), self.device, **recipe.loss)
        self.optimizer = builders.build(
            torch.optim, recipe.optimizer, "optimizer", self.model.parameters()
        )
        self.schedule = recipe.schedule and builders.build(
            torch.optim.lr_scheduler, recipe.schedule, "schedule", self.optimizer
        )
        self.leave_bars = True  # on the screen, when their epoch is over
        self.history: History = []
        self.confusion = torch.zeros(0)  # (label, prediction) of the test images, after each epoch

    def _load_images(self) -> data.Images:
        def load() -> data.Images:
            root, download = self.settings.root, self.settings.download
            return data.load(**self.recipe.data, root=root, download=download)

        return self.processes.first_then_others(load)

    def _build_model(self) -> None:
        channels, size = self.images.train.tensors[0].shape[1:3]
        torch.manual_seed(self.settings.seed)
        classes = len(self.images.classes)
        model = networks.build(channels=channels, size=size, classes=classes, **self.recipe.network)
        model = self.processes.synchronised(impl.place(model, self.settings.impl))
        self.model = model.to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        # The same model twice: as it is for evaluation, wrapped for training on several processes.
        self.infer: Any = self.model
        if self.settings.compile:
            self.infer = torch.compile(self.model)
        self.forward = self.processes.parallel(self.infer)

    def fit(self) -> History:
        """Train until ``recipe.epochs`` epochs are done, and return the history."""
        if self.settings.resume:
            self._restore()
        first = len(self.history) + 1
        board = None
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.settings.tensorboard:
                board = logs.TensorBoard(self.folder / "tensorboard", first)
            if not self.settings.resume:
                self._save()  # an interrupt during the first epoch leaves a checkpoint, too
        for epoch in range(first, self.recipe.epochs + 1):
            self.history.append(self._epoch(epoch))
            if self.processes.first:
                self._save()
            if board:
                board.add(self.history[-1])
        if board:
            board.close()
        return self.history

    @property
    def best(self) -> dict[str, Any]:
        """The row of the first epoch with the highest test accuracy."""
        return max(self.history, key=lambda row: row["test_accuracy"])

    def predict(self, split: TensorDataset) -> Tensor:
        """Logits (N, C) for the images of ``split`` in order, on the CPU; not shared out."""
        self.model.eval()
        dataset = batches.Augmented(split, None, self.normalize, 0)
        order = batches.order(len(split), EVALUATION_BATCH, None)
        with torch.no_grad():
            found = [self._logits(part, self.infer).cpu() for part in batches.parts(dataset, order)]
        return torch.cat(found)

    def _epoch(self, epoch: int) -> dict[str, Any]:
        seed = self.settings.seed * 100_003 + epoch
        torch.manual_seed(seed + 1_000_000_007 * self.processes.rank)  # dropout differs by process
        count = len(self.images.train)
        lr = self.optimizer.param_groups[0]["lr"]
        title = f"epoch {epoch}/{self.recipe.epochs}"
        with progress.bar(count, title, self.processes.first, self.leave_bars) as bar:
            start = time.perf_counter()
            try:
                train_loss, train_accuracy = self._train(seed, bar)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UsageError(
                    "batch norm cannot train on the last batch, of 1 image: change --batch-size"
                ) from None
            seconds = time.perf_counter() - start
            self.processes.share_buffers(self.model)
            tally = self._evaluate(self.images.test)
            test_loss, test_accuracy = tally.mean()
            progress.describe(bar, train_loss, train_accuracy, test_accuracy)
        if not math.isfinite(train_loss):
            raise UsageError(f"the loss became {train_loss} in epoch {epoch}: try a smaller --lr")
        if self.schedule:
            self.schedule.step()
        self.confusion = tally.confusion.cpu()
        return {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "lr": lr,
            "seconds": seconds,
            "images_per_second": count / seconds,
            "test_class_accuracy": tally.class_accuracy(),
        }

    def _train(self, seed: int, bar: Any) -> tuple[float, float]:
        self.model.train()
        tally = self._tally()
        dataset = batches.Augmented(self.images.train, self.augment, self.normalize, seed)
        order = batches.order(len(dataset), self.recipe.batch_size, seed)
        for step, part in enumerate(self._parts(dataset, order)):
            losses, logits, labels = self._score(part, self.forward)
            self.optimizer.zero_grad()
            # The processes' gradients are averaged: this makes the average that of the whole batch.
            (losses.sum() * (self.processes.count / part.size)).backward()
            self.optimizer.step()
            tally.add(losses, logits, labels)
            bar.update(part.size)
            if step % 10 == 0 and not bar.disable:
                progress.describe(bar, *tally.mean())
        return tally.reduce(self.processes).mean()

    @torch.no_grad()
    def _evaluate(self, split: TensorDataset) -> Tally:
        self.model.eval()
        tally = self._tally()
        dataset = batches.Augmented(split, None, self.normalize, 0)
        for part in self._parts(dataset, batches.order(len(split), EVALUATION_BATCH, None)):
            tally.add(*self._score(part, self.infer))
        return tally.reduce(self.processes)

    def _tally(self) -> Tally:
        return Tally(len(self.images.classes), self.device)

    def _parts(self, dataset: batches.Augmented, order: list[Tensor]) -> Any:
        rank, count = self.processes.rank, self.processes.count
        cuda = self.device.type == "cuda"
        return batches.parts(dataset, order, rank, count, self.settings.workers, pin_memory=cuda)

    def _score(self, part: batches.Part, forward: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Losses (N), logits (N, C) and labels (N) of this process's own images."""
        logits = self._logits(part, forward)[: part.own]
        labels = part.labels.to(self.device, non_blocking=True)[: part.own]
        return self.loss(logits, labels), logits, labels

    def _logits(self, part: batches.Part, forward: Any) -> Tensor:
        images = part.images.to(self.device, memory_format=self.layout, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16"):
            return forward(images).float()

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else {},
            "history": self.history,
            "identity": runs.identity(self.recipe, self.settings),
        }
        files.save_checkpoint(self.folder / "last.pt", state)
        if self.history and self.best is self.history[-1]:
            files.save_checkpoint(self.folder / "best.pt", state)
        logs.save(self.folder, self.metrics())

    def _restore(self) -> None:
        path = self.folder / "last.pt"
        state = files.load_checkpoint(path, self.device)
        mine = runs.identity(self.recipe, self.settings)
        if differing := runs.differences(state["identity"], mine):
            raise UsageError(f"{path} was trained otherwise, cannot resume: {differing}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        self.history = state["history"]

    def metrics(self) -> dict[str, Any]:
        return {
            "identity": runs.identity(self.recipe, self.settings),
            "settings": asdict(self.settings),
            "processes": self.processes.count,
            "versions": impl.versions(self.settings.impl),
            "parameters": networks.parameter_count(self.model),
            "history": self.history,
            "test_accuracy": self.history[-1]["test_accuracy"] if self.history else None,
            "best_test_accuracy": self.best["test_accuracy"] if self.history else None,
            "confusion": self.confusion.tolist(),
        }
