"""The training loop: epochs, metrics, checkpoints and resuming."""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm  # type: ignore[import-untyped]

from . import data, files, impl, networks
from .errors import UsageError
from .plots import History
from .recipes import Recipe
from .settings import Settings

EVALUATION_BATCH = 500


def run_folder(recipe: Recipe, settings: Settings, implementation: str | None = None) -> Path:
    return settings.out / f"{recipe.name}-{implementation or settings.impl}"


def identity(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """What two runs share if their curves are to be compared, or one is to continue the other."""
    config = recipe.as_dict()
    del config["epochs"]
    return {"recipe": config, **{k: getattr(settings, k) for k in ("seed", "limit", "amp")}}


def from_torch(namespace: Any, table: dict[str, Any], key: str, *arguments: Any) -> Any:
    """A class of torch.optim or torch.optim.lr_scheduler, built from a recipe's table."""
    builder = getattr(namespace, table["name"], None)
    if not isinstance(builder, type):
        raise UsageError(f"[{key}] {namespace.__name__} has no class {table['name']!r}")
    try:
        return builder(*arguments, **{k: v for k, v in table.items() if k != "name"})
    except (TypeError, ValueError) as error:
        raise UsageError(f"[{key}] {table['name']}: {error}") from None


class Trainer:
    """Trains ``recipe`` as ``settings`` say; ``history`` holds one row of metrics an epoch.

    The folder ``<out>/<recipe>-<impl>`` receives metrics.json, last.pt and best.pt after every
    epoch. Each epoch draws its random numbers from a seed of its own, so a run that was killed and
    resumed ends with the bits of one that was not.
    """

    def __init__(self, recipe: Recipe, settings: Settings) -> None:
        settings.apply()
        self.recipe, self.settings = recipe, settings
        self.folder = run_folder(recipe, settings)
        self.device = torch.device(settings.device)
        self.images = data.load(**recipe.data)
        if settings.limit:
            self.images = self.images.limited(settings.limit)
        channels, size = self.images.train.tensors[0].shape[1:3]
        torch.manual_seed(settings.seed)
        model = networks.build(
            channels=channels, size=size, classes=len(self.images.classes), **recipe.network
        )
        self.layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.model = impl.place(model, settings.impl).to(self.device, memory_format=self.layout)  # type: ignore[call-overload]
        self.forward: Callable[[Tensor], Tensor] = self.model
        if settings.compile:
            self.forward = torch.compile(self.model)
        self.loss = impl.build_loss(settings.impl, **recipe.loss)
        self.optimizer = from_torch(
            torch.optim, recipe.optimizer, "optimizer", self.model.parameters()
        )
        self.schedule = recipe.schedule and from_torch(
            torch.optim.lr_scheduler, recipe.schedule, "schedule", self.optimizer
        )
        self.history: History = []

    def fit(self) -> History:
        """Train until ``recipe.epochs`` epochs are done, and return the history."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.settings.resume:
            self._restore()
        else:
            self._save()  # an interrupt during the first epoch leaves a checkpoint, too
        for epoch in range(len(self.history) + 1, self.recipe.epochs + 1):
            self.history.append(self._epoch(epoch))
            self._save()
        return self.history

    @property
    def best(self) -> dict[str, Any]:
        """The row of the first epoch with the highest test accuracy."""
        return max(self.history, key=lambda row: row["test_accuracy"])

    def _epoch(self, epoch: int) -> dict[str, Any]:
        seed = self.settings.seed * 100_003 + epoch
        torch.manual_seed(seed)
        count = len(self.images.train)
        lr = self.optimizer.param_groups[0]["lr"]
        with progress_bar(count, f"epoch {epoch}/{self.recipe.epochs}") as bar:
            start = time.perf_counter()
            train_loss, train_accuracy = self._train(seed, bar)
            seconds = time.perf_counter() - start
            test_loss, test_accuracy = self._evaluate(self.images.test)
            bar.set_postfix_str(_postfix(train_loss, train_accuracy, test_accuracy), refresh=False)
        if not math.isfinite(train_loss):
            raise UsageError(f"the loss became {train_loss} in epoch {epoch}: try a smaller --lr")
        if self.schedule:
            self.schedule.step()
        return {
            "epoch": epoch,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "lr": lr,
            "seconds": seconds,
            "images_per_second": count / seconds,
        }

    def _train(self, seed: int, bar: Any) -> tuple[float, float]:
        self.model.train()
        totals = torch.zeros(2, device=self.device)  # summed here: reading it waits for the device
        seen = 0
        for step, batch in enumerate(data.batches(self.images.train, self.recipe.batch_size, seed)):
            loss, correct, size = self._score(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            totals += torch.stack((loss.detach() * size, correct))
            seen += size
            bar.update(size)
            if step % 10 == 0:
                bar.set_postfix_str(_postfix(*(totals / seen).tolist()), refresh=False)
        return tuple((totals / seen).tolist())

    @torch.no_grad()
    def _evaluate(self, split: TensorDataset) -> tuple[float, float]:
        self.model.eval()
        totals = torch.zeros(2, device=self.device)
        for batch in data.batches(split, EVALUATION_BATCH):
            loss, correct, size = self._score(batch)
            totals += torch.stack((loss * size, correct))
        return tuple((totals / len(split)).tolist())

    def _score(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, int]:
        """Mean loss, number of correct predictions and size of a batch."""
        images = batch[0].to(self.device, memory_format=self.layout)
        labels = batch[1].to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16"):
            logits = self.forward(images)
        loss = self.loss(logits.float(), labels)
        return loss, (logits.argmax(1) == labels).sum(), len(labels)

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else {},
            "history": self.history,
            "identity": identity(self.recipe, self.settings),
        }
        files.save_checkpoint(self.folder / "last.pt", state)
        if self.history and self.best is self.history[-1]:
            files.save_checkpoint(self.folder / "best.pt", state)
        files.save_json(self.folder / "metrics.json", self.metrics())

    def _restore(self) -> None:
        path = self.folder / "last.pt"
        state = files.load_checkpoint(path, self.device)
        mine = identity(self.recipe, self.settings)
        if differing := differences(state["identity"], mine):
            raise UsageError(f"{path} was trained otherwise, cannot resume: {differing}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        self.history = state["history"]

    def metrics(self) -> dict[str, Any]:
        return {
            "identity": identity(self.recipe, self.settings),
            "settings": asdict(self.settings),
            "versions": impl.versions(self.settings.impl),
            "parameters": networks.parameter_count(self.model),
            "history": self.history,
            "test_accuracy": self.history[-1]["test_accuracy"] if self.history else None,
            "best_test_accuracy": self.best["test_accuracy"] if self.history else None,
        }


def differences(theirs: dict[str, Any], mine: dict[str, Any], prefix: str = "") -> str:
    """What differs between two nested configurations, as ``key: theirs, now mine``."""
    found = []
    for key in sorted(theirs.keys() | mine.keys()):
        a, b = theirs.get(key), mine.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found.append(differences(a, b, f"{prefix}{key}."))
        elif a != b:
            found.append(f"{prefix}{key} was {a!r}, now {b!r}")
    return "; ".join(filter(None, found))


def other_history(recipe: Recipe, settings: Settings) -> tuple[str, History, str]:
    """The other implementation's name, its history on the same recipe, and why there is none."""
    other = next(name for name in impl.IMPLS if name != settings.impl)
    path = run_folder(recipe, settings, other) / "metrics.json"
    if not path.is_file():
        return other, [], f"no {path}"
    metrics = json.loads(path.read_text())
    if differing := differences(metrics["identity"], identity(recipe, settings)):
        return other, [], f"{path} was trained otherwise: {differing}"
    return other, metrics["history"], ""


def progress_bar(total: int, description: str) -> Any:
    # A log file gets few lines, a terminal a live bar.
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=description, unit=" images", mininterval=interval)


def _postfix(loss: float, accuracy: float, test_accuracy: float | None = None) -> str:
    test = "" if test_accuracy is None else f", test {test_accuracy:.4f}"
    return f"loss {loss:.4f}, accuracy {accuracy:.4f}{test}"
