"""examples/run_all.py: every experiment, shortened, and how results are published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import example_runs
import pytest
import run_all  # type: ignore[import-not-found]  # beside the trainer
from dlops_examples import experiments

pytestmark = pytest.mark.example


def test_every_experiment_shortened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_all.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {*run_all.RECIPES, *run_all.STUDIES}
    for name in run_all.RECIPES:
        (row,) = example_runs.history(tmp_path / f"{name}-dlops")
        assert 0 < row["train_loss"] < 30
        assert f"| {row['test_accuracy']:.4f} |" in results[name]["row"]
    for name, result in results.items():
        assert bool(result["pictures"]) == (name != "exercises")
        for picture in result["pictures"].values():
            assert (tmp_path / picture).stat().st_size < 100_000
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out


def test_failed_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others run all the same; the exit code and the last line say what failed."""
    run = experiments.Runner(tmp_path, quick=True, threads=1, timed=True)
    assert run._run("good", lambda: 0) is not None
    assert run._run("bad", lambda: 1) is None
    assert run._run("worse", lambda: int("x")) is None
    run.save()
    assert run.failed == ["bad", "worse"]
    assert capsys.readouterr().out.endswith("failed: bad, worse\n")
    with pytest.raises(KeyboardInterrupt):
        run._run("interrupted", lambda: 130)


def test_publishing(tmp_path: Path) -> None:
    """Tables go to their places in README.md, pictures beside it; other runs' results stay."""
    out, examples = tmp_path / "out", tmp_path / "examples"
    (examples / "results").mkdir(parents=True)
    out.mkdir()
    (out / "a.png").write_bytes(b"picture")
    place = "before\n<!-- results: a b -->\nold\n<!-- end of results -->\nafter\n"
    (examples / "README.md").write_text(place)

    def publish(**accuracies: str) -> None:
        results = {
            name: {
                "row": f"| `{name}` | {accuracy} |\n",
                "pictures": {"a.png": "a.png"} if name == "a" else {},
                "measured": f"machine {name}",
            }
            for name, accuracy in accuracies.items()
        }
        (out / "results.json").write_text(json.dumps(results))
        experiments.publish(out, examples)

    publish(a="0.5", b="0.6")
    publish(b="0.7")
    text = (examples / "README.md").read_text()
    assert text.startswith("before\n<!-- results: a b -->\n| recipe |")
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert "| `a` | 0.5 |\n| `b` | 0.7 |\n" in text
    assert "Run with machine a.\n\nRun with machine b.\n" in text
    assert "old" not in text
    assert (examples / "results" / "a.png").read_bytes() == b"picture"


def test_published_tables_are_those_of_the_results(tmp_path: Path) -> None:
    """Nobody typed into README.md: rendering it from results.json changes nothing."""
    readme = example_runs.EXAMPLES / "README.md"
    shutil.copyfile(readme, tmp_path / "README.md")
    shutil.copytree(example_runs.EXAMPLES / "results", tmp_path / "results")
    experiments.publish(tmp_path / "nothing", tmp_path)
    assert (tmp_path / "README.md").read_text() == readme.read_text()
    assert "<!-- results: " in readme.read_text()
