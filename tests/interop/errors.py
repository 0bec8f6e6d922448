"""Largest error of our logits against published models: `python -m tests.interop.errors [FAMILY ...]`."""

import sys
import tempfile
from pathlib import Path

from tests.interop.published import FAMILIES, largest_errors, publish


def main() -> None:
    print(f"{'family':16}{'at once':>12}{'cached':>12}{'largest':>10}")
    for family in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            at_once, cached, largest = largest_errors(publish(family, Path(directory) / "model"))
        print(f"{family:16}{at_once:12.1e}{cached:12.1e}{largest:10.2f}", flush=True)


if __name__ == "__main__":
    main()
