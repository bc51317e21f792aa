"""Many threads at once, thread counts that change, forks, DataLoader workers, exceptions.

What holds is what holds for torch's own ops. One limit is shared with them: a process forked after
its parent ran on several OpenMP threads must stay on one (`torch.set_num_threads(1)`, which
DataLoader sets in its workers), or it hangs in the OpenMP runtime.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import distinct
from checks import normal, threads, values_and_gradients
from process import run
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import dlops.functional as F

pytestmark = pytest.mark.concurrency

IMAGE = distinct((4, 8, 33, 35)).float()
LABELS = torch.arange(257) % 11

# Large enough for several threads each.
CALLS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "conv2d": (F.conv2d, [IMAGE, normal((16, 8, 3, 3)).float(), normal((16,)).float()]),
    "conv2d channels_last": (
        F.conv2d,
        [IMAGE.contiguous(memory_format=torch.channels_last), normal((16, 8, 3, 3)).float()],
    ),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), [IMAGE]),
    "unfold": (lambda x: F.unfold(x, 3), [IMAGE]),
    "fold": (lambda x: F.fold(x, (33, 35), 3), [normal((4, 72, 31 * 33)).float()]),
    "sigmoid_focal_loss": (
        lambda x, t: F.sigmoid_focal_loss(x, t, reduction="mean"),
        [normal((99, 257)).float(), (normal((99, 257), 1) > 0).float()],
    ),
    "focal_loss": (lambda x: F.focal_loss(x, LABELS), [normal((257, 11)).float()]),
}


def everything() -> dict[str, Tensor]:
    """Values and gradients of every op."""
    return {
        f"{name} {what}": result
        for name, (function, inputs) in CALLS.items()
        for what, result in values_and_gradients(function, inputs).items()
    }


def check_same(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert torch.equal(result, expected[name]), f"{name} differs"


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    with threads(1):
        return everything()


# ---------------------------------------------------------------------------------------------
# Threads


def test_many_threads_agree_bit_for_bit(expected: dict[str, Tensor]) -> None:
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(lambda _: everything(), range(24)):
            check_same(results, expected)


def test_thread_counts_change_between_and_during_calls(expected: dict[str, Tensor]) -> None:
    before = torch.get_num_threads()
    stop = threading.Event()

    def change() -> None:
        count = 0
        while not stop.is_set():
            count = count % 4 + 1
            torch.set_num_threads(count)
            time.sleep(0.001)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            for results in pool.map(lambda _: everything(), range(9)):
                check_same(results, expected)
    finally:
        stop.set()
        changer.join()
        torch.set_num_threads(before)


def test_backward_of_one_graph_in_another_thread(expected: dict[str, Tensor]) -> None:
    """Forward here, backward in threads that have never called an op before."""
    for name, (function, inputs) in CALLS.items():
        leaf = inputs[0].clone().requires_grad_()
        output = function(leaf, *inputs[1:])
        grad_output = normal(output.shape, 99).to(output)
        gradients: list[Tensor] = []

        def backward(
            output: Tensor = output,
            leaf: Tensor = leaf,
            grad_output: Tensor = grad_output,
            gradients: list[Tensor] = gradients,
        ) -> None:
            gradients += torch.autograd.grad(output, leaf, grad_output, retain_graph=True)

        workers = [threading.Thread(target=backward) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(gradients) == 4
        for gradient in gradients:
            assert torch.equal(gradient, expected[f"{name} gradient 0"]), name


def test_other_threads_run_while_a_kernel_does() -> None:
    """The GIL is released: a thread that counts every millisecond goes on counting."""
    image, weight = normal((4, 32, 128, 128)).float(), normal((64, 32, 5, 5)).float()
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        with threads(1):
            for _ in range(20):
                start = time.perf_counter()
                torch.ops.dlops.conv2d(image, weight, None, [1, 1], [0] * 4, [1, 1], 1)
                end = time.perf_counter()
                # A thread that holds the GIL gives way only before and after.
                inside = sum(start + 0.005 < t < end - 0.005 for t in ticks)
                if inside >= 5:
                    break
    finally:
        stop.set()
        ticker.join()
    assert inside >= 5, f"{inside} ticks in a kernel of {end - start:.3f} s"


SHORT_LIVED = """
import gc, threading, torch, dlops.functional as F
torch.set_num_threads({count})
image, weight = torch.ones(2, 16, 64, 64, requires_grad=True), torch.ones(16, 16, 3, 3)
logits, labels = torch.ones(300, 100), torch.arange(300) % 100

def work():
    F.max_pool2d(F.conv2d(image, weight), 3, 2).sum().backward()
    F.focal_loss(logits, labels)

def resident():
    gc.collect()
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return int(line.split()[1])

def run(count):
    for _ in range(count):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    return resident()

first = run(100)
print(run({threads}) - first)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_short_lived_threads_leave_no_memory(tmp_path: Path) -> None:
    """What a thread keeps between calls is freed with it: 1000 threads keep less than 20 KB each,
    of about 1 MB that each works with."""
    result = run("-c", SHORT_LIVED.format(count=1, threads=1000), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    grown = int(result.stdout)
    assert grown < 20_000, f"1000 threads left {grown} KB"


# ---------------------------------------------------------------------------------------------
# Exceptions


def test_an_exception_in_a_hook_leaves_everything_usable(expected: dict[str, Tensor]) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(_: Tensor) -> None:
        raise Interrupted

    for name, (function, inputs) in CALLS.items():
        leaf = inputs[0].clone().requires_grad_()
        inner = leaf * 1  # its gradient is on the way when the hook is called
        inner.register_hook(interrupt)
        output = function(inner, *inputs[1:])
        with pytest.raises(Interrupted):
            output.sum().backward()
        assert leaf.grad is None, name
    check_same(everything(), expected)


# ---------------------------------------------------------------------------------------------
# Processes

FORK = """
import os, sys, time, torch, dlops.functional as F
parent_threads, child_threads = map(int, sys.argv[1:])

def work():
    image = torch.arange(4 * 8 * 64 * 64.0).reshape(4, 8, 64, 64).requires_grad_()
    output = F.max_pool2d(F.conv2d(image, torch.ones(8, 8, 3, 3)), 3, 2)
    output.sum().backward()
    return output.detach(), image.grad

torch.set_num_threads(parent_threads)
expected = work()
child = os.fork()
if child == 0:
    torch.set_num_threads(child_threads)
    same = all(map(torch.equal, work(), expected))
    os._exit(0 if same else 1)
for _ in range(600):
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        again = all(map(torch.equal, work(), expected))
        sys.exit(os.waitstatus_to_exitcode(status) or not again)
    time.sleep(0.05)
os.kill(child, 9)
sys.exit("the child hangs")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
@pytest.mark.parametrize(("parent", "child"), [(2, 1), (1, 2)], ids=["parent_of_2", "child_of_2"])
def test_after_fork(parent: int, child: int, tmp_path: Path) -> None:
    result = run("-c", FORK, str(parent), str(child), cwd=tmp_path)
    assert result.returncode == 0, result.stderr


class Pooled(Dataset[Tensor]):
    """Works in the worker process."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return pooled(index)


def pooled(index: int) -> Tensor:
    image = torch.arange(3 * 40 * 40.0).view(3, 40, 40).roll(index)
    return F.max_pool2d(F.conv2d(image, torch.ones(4, 3, 3, 3)), 2)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_in_data_loader_workers(context: str) -> None:
    everything()  # the parent has used its threads
    loader: Any = DataLoader(
        Pooled(), batch_size=2, num_workers=2, multiprocessing_context=context, timeout=60
    )
    batches: Iterator[Tensor] = iter(loader)
    assert torch.equal(torch.cat(list(batches)), torch.stack([pooled(i) for i in range(6)]))
