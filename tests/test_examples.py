"""The example trainer: what it learns, writes and refuses, on a small part of its data."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("the examples are not beside these tests", allow_module_level=True)
pytest.importorskip("sklearn", reason="the examples' data is scikit-learn's")
sys.path.insert(0, str(EXAMPLES))

from dlops_examples import files, impl, networks, recipes, trainer  # noqa: E402
from dlops_examples.cli import main  # noqa: E402
from dlops_examples.errors import UsageError  # noqa: E402
from dlops_examples.settings import Settings  # noqa: E402

import dlops  # noqa: E402

pytestmark = pytest.mark.example

QUICK = ("--limit", "320", "--epochs", "2", "--threads", "1")


@pytest.fixture(autouse=True)
def _process_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both implementations, trained in turn on the same recipe."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("torch", "dlops"):
        assert main([*QUICK, "--impl", name, "--out", str(out)]) == 0
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    return files.load_checkpoint(folder / "last.pt", torch.device("cpu"))["model"]


def test_metrics(runs: Path) -> None:
    metrics = json.loads((runs / "digits_cnn-dlops" / "metrics.json").read_text())
    assert [row["epoch"] for row in metrics["history"]] == [1, 2]
    assert metrics["history"][1]["lr"] == pytest.approx(1e-3 * 0.85)
    assert metrics["history"][1]["train_loss"] < 0.8 * metrics["history"][0]["train_loss"]
    assert metrics["test_accuracy"] == metrics["history"][1]["test_accuracy"] > 0.2
    assert metrics["parameters"] < 1_000_000
    assert metrics["versions"]["dlops"] == dlops.__version__


def test_picture_and_checkpoints(runs: Path) -> None:
    folder = runs / "digits_cnn-dlops"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir()} == {
        "best.pt",
        "curves.png",
        "last.pt",
        "metrics.json",
    }
    model = networks.build("mnist_cnn", channels=1, size=28, classes=10)
    model.load_state_dict(weights(folder))  # a model trained on dlops loads into torch.nn's


def test_curves_agree(runs: Path) -> None:
    ours, theirs = (
        json.loads((runs / f"digits_cnn-{name}" / "metrics.json").read_text())["history"]
        for name in ("dlops", "torch")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=2e-3)
        assert a["test_accuracy"] == pytest.approx(b["test_accuracy"], abs=0.02)


def test_other_implementation(runs: Path) -> None:
    def other(*arguments: Any) -> tuple[str, trainer.History, str]:
        recipe = recipes.load("digits_cnn", dict(arguments))
        return trainer.other_history(recipe, Settings(limit=320, out=runs))

    name, history, missing = other(("epochs", 7))
    assert (name, len(history), missing) == ("torch", 2, "")
    _, history, missing = other(("optimizer.lr", 0.5))
    assert history == []
    assert "optimizer.lr was 0.001, now 0.5" in missing


def test_interrupted_and_resumed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run stopped within its second epoch ends, resumed, with the bits of one that was not."""
    command = [*QUICK, "--impl", "dlops", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_score", interrupt_at_call(15))  # 11 calls an epoch
        assert main(command) == 130
    assert "after epoch 1: the same command with --resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    resumed, uninterrupted = (
        weights(tmp_path / "digits_cnn-dlops"),
        weights(runs / "digits_cnn-dlops"),
    )
    assert resumed.keys() == uninterrupted.keys()
    assert [k for k in resumed if not torch.equal(resumed[k], uninterrupted[k])] == []


def interrupt_at_call(number: int) -> Callable[..., Any]:
    score, calls = trainer.Trainer._score, iter(range(1, number + 1))

    def interrupting(*arguments: Any) -> Any:
        if next(calls) == number:
            raise KeyboardInterrupt
        return score(*arguments)

    return interrupting


def test_failed_write_keeps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    files.save_json(path, {"epoch": 1})

    def fail(partial: Path) -> None:
        partial.write_text("{")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files._replace(path, fail)
    assert json.loads(path.read_text()) == {"epoch": 1}


def test_other_options(tmp_path: Path) -> None:
    options = ["--amp", "bf16", "--channels-last", "--deterministic", "--loss", "sigmoid_focal"]
    arguments = ["--limit", "96", "--epochs", "1", "--threads", "1", "--seed", "3", *options]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    metrics = json.loads((tmp_path / "digits_cnn-dlops" / "metrics.json").read_text())
    assert 0.5 < metrics["history"][0]["train_loss"] < 10


@pytest.mark.parametrize("name", ["focal", "sigmoid_focal", "cross_entropy"])
def test_losses_of_both_implementations_agree(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 10, dtype=torch.float64, generator=generator, requires_grad=True)
    target = torch.randint(10, (32,), generator=generator)
    arguments = {} if name == "cross_entropy" else {"gamma": 1.5}
    results = []
    for implementation in impl.IMPLS:
        loss = impl.build_loss(implementation, name, **arguments)(logits, target)
        results.append((loss, *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[0], results[1])


def test_dlops_leaves_no_native_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = impl.place(networks.build("mnist_cnn", channels=1, size=28, classes=10), "dlops")
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(dlops.nn.Conv2d) == 4
    assert kinds.count(dlops.nn.MaxPool2d) == 2
    monkeypatch.setattr(dlops, "convert", lambda module: module)
    with pytest.raises(AssertionError, match=r"torch\.nn layers: 0"):
        impl.place(nn.Sequential(nn.Conv2d(1, 1, 1)), "dlops")


def test_overrides() -> None:
    recipe = recipes.load("digits_cnn", {"loss.name": "cross_entropy", "optimizer.lr": 0.1})
    assert recipe.loss == {"name": "cross_entropy"}  # gamma belonged to the focal loss
    assert recipe.optimizer == {"name": "Adam", "lr": 0.1}
    assert recipes.parse_override("network.widths=[8, 16]") == ("network.widths", [8, 16])
    assert recipes.parse_override("network.name=mnist_cnn") == ("network.name", "mnist_cnn")


def test_recipe_file(tmp_path: Path) -> None:
    text = (recipes.FOLDER / "digits_cnn.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert recipes.load(str(path)).as_dict() == recipes.load("digits_cnn").as_dict() | {
        "name": "mine"
    }
    path.write_text("epoch = 3\n" + text)
    with pytest.raises(UsageError, match="unknown epoch; known: batch_size, data, epochs"):
        recipes.load(str(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--impl", "jax"], "invalid choice: 'jax'"),
        (["--recipe", "alexnet"], "no recipe 'alexnet'"),
        (["--epochs", "0"], "epochs must be a whole number of at least 1, got 0"),
        (["--lr", "-1"], "[optimizer] Adam: Invalid learning rate: -1.0"),
        (["--loss", "hinge"], "no loss 'hinge'; known: focal"),
        (["--loss", "cross_entropy", "--gamma", "1"], "[loss] cross_entropy takes no gamma"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cuda:99"], "CUDA devices; use --device cpu"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--set", "network.dropout=2"], "[network] mnist_cnn: dropout probability"),
        (["--set", "network.name=vgg"], "no network 'vgg'; known: mnist_cnn"),
        (["--set", "optimizer.name=Adamm"], "[optimizer] torch.optim has no class 'Adamm'"),
        (["--set", "data.size=0"], "[data] digits: "),
        (["--set", "epochs"], "--set takes key=value"),
        (["--resume"], "last.pt to resume from: train once without --resume"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--out", str(tmp_path)])
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_bad_checkpoints(runs: Path, tmp_path: Path) -> None:
    def resume(out: Path, **overrides: Any) -> None:
        recipe = recipes.load("digits_cnn", overrides)
        trainer.Trainer(recipe, Settings(resume=True, limit=320, out=out)).fit()

    with pytest.raises(UsageError, match=r"trained otherwise, cannot resume: .*batch_size was 32"):
        resume(runs, batch_size=64)
    damaged = tmp_path / "digits_cnn-dlops" / "last.pt"
    damaged.parent.mkdir()
    damaged.write_bytes((runs / "digits_cnn-dlops" / "last.pt").read_bytes()[:10_000])
    with pytest.raises(UsageError, match="is no checkpoint of this trainer"):
        resume(tmp_path)


@pytest.mark.parametrize(("switch", "starts"), [("1", 2), ("0", 1)])
def test_allocator_settings(switch: str, starts: int, tmp_path: Path) -> None:
    """The process starts anew once, with glibc's settings, unless that is switched off."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
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
    command = [sys.executable, str(EXAMPLES / "train.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--channels-last" in result.stdout
