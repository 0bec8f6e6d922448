"""Which mixers learn a synthetic task within its recipe's steps, as published.

Recall: Arora et al., 2023, arXiv:2312.04927. Parity: Grazzi et al., 2024, arXiv:2411.12537.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "kernels/benchmarks/synthetic_tasks.py"


def accuracies(task: str, mixer: str, steps: int) -> list[float]:
    """At each of the task's lengths, after at most so many steps."""
    words = [sys.executable, BENCHMARK, task, "--mixer", mixer, "--steps", str(steps)]
    # With XLA's optimisations, which the other tests do without: here it is the steps that take the time.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    printed = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    name, *numbers = printed.splitlines()[-1].split(" | ")
    assert name == mixer
    return [float(number) for number in numbers[:-2]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "mixer", "steps"),
    [("mqar", "RG-LRU, then attention", 600), ("parity", "DeltaNet, beta in (0, 2)", 150)],
)
def test_these_learn(task: str, mixer: str, steps: int) -> None:
    assert min(accuracies(task, mixer, steps)) >= 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "mixer", "steps", "chance"),
    [("mqar", "RG-LRU", 300, 0.25), ("parity", "DeltaNet, beta in (0, 1)", 150, 0.5)],
)
def test_these_guess(task: str, mixer: str, steps: int, chance: float) -> None:
    assert max(accuracies(task, mixer, steps)) == pytest.approx(chance, abs=0.05)
