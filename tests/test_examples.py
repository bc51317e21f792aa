"""The example trainer: what it learns, writes and refuses, on a small part of its data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import example_runs
import pytest
import torch
from dlops_examples import networks, recipes, runs, trainer
from dlops_examples.errors import UsageError
from dlops_examples.settings import Settings

import dlops

pytestmark = pytest.mark.example

AUGMENT = 'augment=[{name="RandomCrop", size=28, padding=1}, {name="GaussianNoise", sigma=0.05}]'
QUICK = ("--limit", "320", "--epochs", "2", "--set", AUGMENT)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both implementations, trained in turn on the same recipe."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("torch", "dlops"):
        example_runs.train(out, *QUICK, "--impl", name)
    return out


def test_metrics(both: Path) -> None:
    metrics = example_runs.metrics(both / "digits_cnn-dlops")
    history = metrics["history"]
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[1]["lr"] == pytest.approx(1e-3 * 0.85)
    assert history[1]["train_loss"] < 0.8 * history[0]["train_loss"]
    assert metrics["test_accuracy"] == history[1]["test_accuracy"] > 0.2
    assert metrics["parameters"] < 1_000_000
    assert metrics["versions"]["dlops"] == dlops.__version__


def test_metrics_agree_with_predictions(both: Path) -> None:
    """Accuracies, confusion matrix and CSV say what the model predicts."""
    recipe = recipes.load("digits_cnn", dict([recipes.parse_override(AUGMENT)]))
    settings = Settings(resume=True, limit=320, out=both)
    trained = trainer.Trainer(recipe, settings)
    trained._restore()
    labels = trained.images.test.tensors[1]
    right = trained.predict(trained.images.test).argmax(1) == labels
    metrics = example_runs.metrics(both / "digits_cnn-dlops")
    last = metrics["history"][-1]
    assert last["test_accuracy"] == pytest.approx(right.double().mean().item())
    confusion = torch.tensor(metrics["confusion"])
    assert confusion.sum(1).tolist() == labels.bincount(minlength=10).tolist()
    assert confusion.trace() == right.sum()
    classes = [right[labels == label].double().mean().item() for label in range(10)]
    assert last["test_class_accuracy"] == pytest.approx(classes)
    header, *rows = (both / "digits_cnn-dlops" / "metrics.csv").read_text().splitlines()
    assert header.startswith("epoch,train_loss,train_accuracy,test_loss,test_accuracy,lr")
    assert [float(row.split(",")[4]) for row in rows][-1] == last["test_accuracy"]


def test_picture_and_checkpoints(both: Path) -> None:
    folder = both / "digits_cnn-dlops"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    names = {"best.pt", "curves.png", "last.pt", "metrics.csv", "metrics.json"}
    assert {path.name for path in folder.iterdir()} == names
    model = networks.build("mnist_cnn", channels=1, size=28, classes=10)
    model.load_state_dict(example_runs.weights(folder))  # from dlops' layers to torch.nn's


def test_curves_agree(both: Path) -> None:
    ours, theirs = (
        example_runs.history(both / f"digits_cnn-{name}") for name in ("dlops", "torch")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=2e-3)
        assert a["test_accuracy"] == pytest.approx(b["test_accuracy"], abs=0.02)


def test_other_implementation(both: Path) -> None:
    def other(*arguments: Any) -> tuple[str, Any, str]:
        overrides = dict([recipes.parse_override(AUGMENT), *arguments])
        return runs.other_history(
            recipes.load("digits_cnn", overrides), Settings(limit=320, out=both)
        )

    name, history, missing = other(("epochs", 7))
    assert (name, len(history), missing) == ("torch", 2, "")
    _, history, missing = other(("optimizer.lr", 0.5))
    assert history == []
    assert "optimizer.lr was 0.001, now 0.5" in missing
    path = both / "digits_cnn-torch" / "metrics.json"
    content = path.read_text()
    path.write_text("{}")
    assert other()[2] == f"{path} is not of this trainer"
    path.write_text(content)


def test_interrupted_and_resumed(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run stopped within its second epoch ends, resumed, with the bits of one that was not."""
    command = [*QUICK, "--impl", "dlops", "--threads", "1", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_score", interrupt_at_call(15))  # 11 calls an epoch
        assert example_runs.main(command) == 130
    assert "after epoch 1: the same command with --resume" in capsys.readouterr().err
    resumed = example_runs.train(tmp_path, *QUICK, "--resume")
    expected = example_runs.weights(both / "digits_cnn-dlops")
    assert example_runs.different(example_runs.weights(resumed), expected) == []


def interrupt_at_call(number: int) -> Callable[..., Any]:
    score, calls = trainer.Trainer._score, iter(range(1, number + 1))

    def interrupting(*arguments: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return score(*arguments)

    return interrupting


def test_other_options(tmp_path: Path) -> None:
    options = ["--amp", "bf16", "--channels-last", "--deterministic", "--loss", "sigmoid_focal"]
    run = example_runs.train(tmp_path, "--limit", "96", "--epochs", "1", "--seed", "3", *options)
    assert 0.5 < example_runs.history(run)[0]["train_loss"] < 10


def test_compiled(tmp_path: Path) -> None:
    """torch.compile changes no more than rounding."""
    quick = ("--recipe", "vanilla", "--limit", "64", "--epochs", "1", "--batch-size", "32")
    plain, compiled = (
        example_runs.history(example_runs.train(tmp_path / name, *quick, *options))
        for name, options in (("plain", ()), ("compiled", ("--compile",)))
    )
    for key in ("train_loss", "test_loss"):
        assert compiled[0][key] == pytest.approx(plain[0][key], rel=1e-5)


def test_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every scalar of every epoch is handed on; without the package there is one clear line."""
    quick = ("--recipe", "vanilla", "--limit", "32", "--tensorboard")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    line = example_runs.refusal(capsys, *quick, "--out", str(tmp_path))
    assert line.endswith("--tensorboard needs tensorboard: pip install tensorboard")

    written: list[tuple[str, float, int]] = []
    writer = SimpleNamespace(
        add_scalar=lambda *event: written.append(event), flush=lambda: None, close=lambda: None
    )
    events = SimpleNamespace(SummaryWriter=lambda folder, purge_step: writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", events)
    run = example_runs.train(tmp_path, *quick, "--epochs", "2")
    last = example_runs.history(run)[1]
    assert ("loss/train", last["train_loss"], 2) in written
    assert ("accuracy/test", last["test_accuracy"], 2) in written
    assert len(written) == 2 * 7


def test_overfitting_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`scratch` knows 50 images by heart after 10 epochs of batches of 10, before it trains."""
    run = example_runs.train(tmp_path, "--recipe", "scratch", "--epochs", "1", "--limit", "100")
    few = example_runs.metrics(run / "overfit")
    assert few["identity"]["recipe"]["batch_size"] == 10
    assert len(few["history"]) == 10
    assert few["test_accuracy"] == 1.0
    assert sum(map(sum, few["confusion"])) == 50
    assert "overfitting 50 images: accuracy on them 1.0000, as it should" in capsys.readouterr().out
    assert sum(map(sum, example_runs.metrics(run)["confusion"])) == 100


def test_batch_of_one_image_with_batch_norm(tmp_path: Path) -> None:
    recipe, settings = recipes.load("deep_bn", {"batch_size": 3}), Settings(limit=4, out=tmp_path)
    with pytest.raises(UsageError, match="last batch, of 1 image: change --batch-size"):
        trainer.Trainer(recipe, settings).fit()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "jax"], "invalid choice: 'jax'"),
        (["--recipe", "alexnet"], "no recipe 'alexnet'"),
        (["--epochs", "0"], "epochs must be a whole number of at least 1, got 0"),
        (["--lr", "-1"], "[optimizer] Adam: Invalid learning rate: -1.0"),
        (["--loss", "hinge"], "no loss 'hinge'; known: focal"),
        (["--loss", "cross_entropy", "--gamma", "1"], "[loss] cross_entropy takes no gamma"),
        (["--loss", "class_balanced_softmax", "--set", "loss.beta=1"], "[loss] class_balanced"),
        (["--data", "imagenet"], "no data set 'imagenet'; known: digits, mnist, cifar10"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "CUDA devices; use --device cpu"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--workers", "-1"], "--workers must be at least 0, got -1"),
        (["--set", "network.dropout=2"], "[network] mnist_cnn: dropout probability"),
        (["--set", "network.name=vgg"], "no network 'vgg'; known: one_conv"),
        (["--set", "optimizer.name=Adamm"], "[optimizer] torch.optim has no class 'Adamm'"),
        (["--set", "data.size=0"], "[data] digits: size must be"),
        (["--set", "augment=crop"], "augment must be a list of tables"),
        (["--set", "overfit.images=3"], "[overfit] takes images, epochs, batch_size"),
        (["--set", "epochs"], "--set takes key=value"),
        (["--resume"], "last.pt to resume from: train once without --resume"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in example_runs.refusal(capsys, *arguments, "--out", str(tmp_path))


def test_checkpoint_of_another_recipe(both: Path) -> None:
    recipe = recipes.load("digits_cnn", {"batch_size": 64})
    with pytest.raises(UsageError, match=r"trained otherwise, cannot resume: .*batch_size was 32"):
        trainer.Trainer(recipe, Settings(resume=True, limit=320, out=both)).fit()


@pytest.mark.parametrize(("switch", "starts"), [("1", 2), ("0", 1)])
def test_allocator_settings(switch: str, starts: int, tmp_path: Path) -> None:
    """The process starts anew once, with glibc's settings, unless that is switched off."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(example_runs.EXAMPLES)!r})\n"
        "from dlops_examples import allocator\n"
        "print('start', flush=True)\n"
        "allocator.keep_freed_memory()\n"
        "print(sorted(allocator.SETTINGS.keys() & os.environ.keys()), sys.argv[1])\n"
    )
    result = subprocess.run(
        [sys.executable, str(script), "argument"],
        env={"DLOPS_KEEP_FREED_MEMORY": switch},
        capture_output=True,
        text=True,
        check=True,
    )
    names = ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_"]
    expected = ["start"] * starts + [f"{names if starts == 2 else []} argument"]
    assert result.stdout.splitlines() == expected


def test_train_script_help() -> None:
    command = [sys.executable, str(example_runs.EXAMPLES / "train.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--channels-last" in result.stdout
