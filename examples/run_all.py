"""Run every experiment on its defaults and write one table of the results.

python examples/run_all.py                 # all of them, into runs/experiments
python examples/run_all.py --only scratch vanilla
python examples/run_all.py --publish       # and put tables and pictures into this folder
python examples/run_all.py --only --publish    # those of earlier runs
"""

import argparse
import sys
from pathlib import Path

from dlops_examples import allocator

if __name__ == "__main__":
    allocator.keep_freed_memory()  # may start this process anew, so it comes before importing torch

from dlops_examples import experiments

# The validation accuracy that a recipe is published with: a single run.
RECIPES = {
    "digits_cnn": "-",
    "scratch": "-",
    "vanilla": "-",
    "lenet_alexnet": "0.7857 on CIFAR-10",
    "deep_bn": "0.8005 on CIFAR-10",
    "two_block": "0.8209 on CIFAR-10",
    "adam_cnn": "0.8012 on CIFAR-10",
    "mnist_cnn": "0.9855 on MNIST (best 0.9895)",
    "resnet32": "-",
}
# Modules of dlops_examples.studies, and what makes each a matter of seconds with --quick. One has
# main(arguments) -> exit code with --out and --threads; it writes results.md, its table, and
# pictures into <out>/<name>/.
FEW = ["--limit", "64", "--epochs", "1"]
STUDIES: dict[str, list[str]] = {
    "long_tail": ["--epochs", "1", "--seeds", "1", "--head", "20", "--betas", "0.9"],
    "batch_norm": [*FEW, "--factors", "1"],
    "dropout": [*FEW, "--points", "2", "--sweep-epochs", "1", "--seeds", "1"],
    "depth_width": [*FEW, "--budgets", "100"],
    "feature_maps": [*FEW, "--images", "8"],
    "exercises": [],
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run_all.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = [*RECIPES, *STUDIES]
    add("--only", nargs="*", default=names, metavar="NAME", help=f"of {', '.join(names)}")
    add("--quick", action="store_true", help="seconds for each: to see that it runs")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--out", type=Path, default=Path("runs/experiments"))
    add("--publish", action="store_true", help="write results/ and the tables of README.md, too")
    add("--untimed", action="store_true", help="leave the time out: the machine is busy")
    add("--machine", default="", help='what the times were measured on: "an AMD EPYC (Zen 5)"')
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.only) - set(names)):
        parser.error(f"no experiment {', '.join(unknown)}; known: {', '.join(names)}")

    timed = not options.untimed
    run = experiments.Runner(options.out, options.quick, options.threads, timed, options.machine)
    for name in options.only:
        if name in RECIPES:
            run.recipe(name, RECIPES[name])
        else:
            run.study(name, STUDIES[name])
    run.save()
    if options.publish:
        experiments.publish(options.out, Path(__file__).parent)
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
