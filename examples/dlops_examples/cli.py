"""The command line of examples/train.py."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from . import data, distributed, impl, networks, recipes, runs
from .errors import UsageError
from .plots import learning_curves
from .settings import Settings
from .trainer import Trainer

# Options that are short for --set KEY=VALUE, in the order in which they are applied.
SHORTHANDS = {
    "data": ("data.name", str),
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
    parser.add_argument(
        "--recipe", default="digits_cnn", help=f"{', '.join(recipes.names())}, or a .toml file"
    )
    for name, (key, kind) in SHORTHANDS.items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=kind, metavar=name.upper(), help=f"the recipe's {key}")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any value of the recipe"
    )
    add_settings(parser)
    return parser


def add_settings(parser: argparse.ArgumentParser) -> None:
    """The options that say how a recipe is run: the fields of Settings."""
    add = parser.add_argument
    add("--impl", choices=impl.IMPLS, default="dlops", help="whose kernels (default: dlops)")
    add("--seed", type=int, default=0, help="of weights, batches and dropout (default: 0)")
    add("--device", default="cpu", help="cpu, cuda or cuda:N; under torchrun, cuda is one for each")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--amp", choices=["bf16"], help="train under autocast")
    add("--channels-last", action="store_true", help="images and weights as N, H, W, C in memory")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--deterministic", action="store_true", help="refuse operations that vary from run to run")
    add("--limit", type=int, help="train and test on at most so many images each")
    add("--workers", type=int, default=0, help="processes that augment images (default: 0)")
    add(
        "--root",
        type=Path,
        default=Path("data"),
        help="folder of mnist and cifar10 (default: data)",
    )
    add("--download", action="store_true", help="fetch mnist or cifar10 into --root if missing")
    add("--tensorboard", action="store_true", help="write TensorBoard events, too")
    add("--resume", action="store_true", help="continue from last.pt of the same recipe and --impl")
    add("--out", type=Path, default=Path("runs"), help="parent of the run's folder (default: runs)")


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
        train(Trainer(recipe, Settings(**options)))
    except UsageError as error:
        if distributed.is_first_here():  # all processes of a machine refuse the same
            parser.error(str(error))
        return 2
    except OSError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    finally:
        distributed.close()
    return 0


def train(trainer: Trainer) -> None:
    first = trainer.processes.first
    if first:
        announce(trainer)
    if trainer.recipe.overfit and not trainer.settings.resume:
        overfit(trainer)
    try:
        trainer.fit()
    except KeyboardInterrupt:
        if first:
            print(
                f"\ninterrupted; {trainer.folder / 'last.pt'} holds the state after epoch "
                f"{len(trainer.history)}: the same command with --resume continues from there",
                file=sys.stderr,
            )
        raise
    if first:
        report(trainer)


def overfit(trainer: Trainer) -> None:
    """Whether the network can learn a few images by heart: if not, something is wrong with it."""
    images, epochs, batch_size = (trainer.recipe.overfit[k] for k in recipes.OVERFIT)
    recipe = replace(trainer.recipe, epochs=epochs, batch_size=batch_size, augment=[], overfit={})
    train = trainer.images.limited(images).train
    few = data.Images(train, train, trainer.images.classes)
    settings = replace(trainer.settings, tensorboard=False)
    accuracy = Trainer(recipe, settings, few, trainer.folder / "overfit").fit()[-1]["test_accuracy"]
    if trainer.processes.first:
        verdict = "as it should be" if accuracy == 1 else "which should be 1: try another --lr"
        print(f"overfitting {len(train)} images: accuracy on them {accuracy:.4f}, {verdict}")


def announce(trainer: Trainer) -> None:
    images, recipe, settings = trainer.images, trainer.recipe, trainer.settings
    print(networks.layer_table(trainer.model, images.train.tensors[0][:1].to(trainer.device)))
    processes = trainer.processes.count
    print(
        f"{recipe.name} on {settings.impl} ({settings.device}"
        f"{f', {processes} processes' if processes > 1 else ''}): "
        f"{networks.parameter_count(trainer.model):,} parameters, {len(images.train):,} training "
        f"and {len(images.test):,} test images of {recipe.data['name']}"
    )


def report(trainer: Trainer) -> None:
    """Draw the curves, laid over the other implementation's if it ran, and say what is where."""
    recipe, settings, history = trainer.recipe, trainer.settings, trainer.history
    picture = trainer.folder / "curves.png"
    other, theirs, missing = runs.other_history(recipe, settings)
    curves = {settings.impl: history} | ({other: theirs} if theirs else {})
    learning_curves(picture, f"{recipe.name}, seed {settings.seed}", curves)
    last, best = history[-1], trainer.best
    seconds = sum(row["seconds"] for row in history)
    print(
        f"test accuracy    {last['test_accuracy']:.4f} after {seconds:.1f} s of training "
        f"(best {best['test_accuracy']:.4f}, epoch {best['epoch']})\n"
        f"learning curves  {picture}\n"
        f"metrics          {trainer.folder / 'metrics.json'}, metrics.csv\n"
        f"checkpoints      {trainer.folder / 'last.pt'}, best.pt"
    )
    if theirs:
        beside = runs.folder(recipe, settings, other)
        print(f"beside {beside}: {runs.largest_difference(history, theirs)}")
    else:
        print(f"not compared with --impl {other}: {missing}")
