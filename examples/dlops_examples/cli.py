"""The command line of examples/train.py."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import impl, networks, recipes
from .errors import UsageError
from .plots import learning_curves
from .settings import Settings
from .trainer import Trainer, other_history, run_folder

# Options that are short for --set KEY=VALUE, in the order in which they are applied.
SHORTHANDS = {
    "epochs": ("epochs", int),
    "batch_size": ("batch_size", int),
    "lr": ("optimizer.lr", float),
    "loss": ("loss.name", str),
    "gamma": ("loss.gamma", float),
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without the usage


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="train.py", description="Train a CNN on dlops' or torch's kernels.")
    add = parser.add_argument
    add("--recipe", default="digits_cnn", help=f"{', '.join(recipes.names())}, or a .toml file")
    for name, (key, kind) in SHORTHANDS.items():
        add(
            f"--{name.replace('_', '-')}",
            type=kind,
            metavar=name.upper(),
            help=f"the recipe's {key}",
        )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="any value of the recipe")
    add("--impl", choices=impl.IMPLS, default="dlops", help="whose kernels (default: dlops)")
    add("--seed", type=int, default=0, help="of weights, batches and dropout (default: 0)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--amp", choices=["bf16"], help="train under autocast")
    add("--channels-last", action="store_true", help="images and weights as N, H, W, C in memory")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--deterministic", action="store_true", help="refuse operations that vary from run to run")
    add("--limit", type=int, help="train and test on at most so many images each")
    add("--resume", action="store_true", help="continue from last.pt of the same recipe and --impl")
    add("--out", type=Path, default=Path("runs"), help="parent of the run's folder (default: runs)")
    return parser


def overrides(options: dict[str, Any]) -> dict[str, Any]:
    """Take the recipe's options out of ``options``, as dotted keys."""
    given = dict(recipes.parse_override(text) for text in options.pop("set"))
    for name, (key, _) in SHORTHANDS.items():
        if (value := options.pop(name)) is not None:
            given[key] = value
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit code."""
    parser = build_parser()
    options = vars(parser.parse_args(arguments))
    try:
        recipe = recipes.load(options.pop("recipe"), overrides(options))
        trainer = Trainer(recipe, Settings(**options))
        announce(trainer)
        trainer.fit()
    except (UsageError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; {trainer.folder / 'last.pt'} holds the state after epoch "
            f"{len(trainer.history)}: the same command with --resume continues from there",
            file=sys.stderr,
        )
        return 130
    report(trainer)
    return 0


def announce(trainer: Trainer) -> None:
    images, recipe, settings = trainer.images, trainer.recipe, trainer.settings
    print(
        f"{recipe.name} on {settings.impl} ({settings.device}): "
        f"{networks.parameter_count(trainer.model):,} parameters, {len(images.train):,} training "
        f"and {len(images.test):,} test images of {recipe.data['name']}"
    )


def report(trainer: Trainer) -> None:
    """Draw the curves, laid over the other implementation's if it ran, and say what is where."""
    recipe, settings, history = trainer.recipe, trainer.settings, trainer.history
    picture = trainer.folder / "curves.png"
    other, theirs, missing = other_history(recipe, settings)
    curves = {settings.impl: history} | ({other: theirs} if theirs else {})
    learning_curves(picture, f"{recipe.name}, seed {settings.seed}", curves)
    last, best = history[-1], trainer.best
    seconds = sum(row["seconds"] for row in history)
    print(
        f"test accuracy    {last['test_accuracy']:.4f} after {seconds:.1f} s of training "
        f"(best {best['test_accuracy']:.4f}, epoch {best['epoch']})\n"
        f"learning curves  {picture}\n"
        f"metrics          {trainer.folder / 'metrics.json'}\n"
        f"checkpoints      {trainer.folder / 'last.pt'}, best.pt"
    )
    if theirs:
        print(
            f"beside {run_folder(recipe, settings, other)}: {largest_difference(history, theirs)}"
        )
    else:
        print(f"not compared with --impl {other}: {missing}")


def largest_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    def largest(key: str) -> float:
        return max(abs(a[key] - b[key]) for a, b in zip(ours, theirs, strict=False))

    return (
        f"train loss differs by at most {largest('train_loss'):.2g}, "
        f"test accuracy by at most {largest('test_accuracy'):.2g}"
    )
