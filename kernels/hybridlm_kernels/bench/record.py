"""Results as lines of JSON, one measurement each, and as a table.

python -m hybridlm_kernels.bench.record kernels/benchmarks/results.jsonl
"""

import datetime
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

PACKAGE = Path(__file__).parents[1]
COLUMNS = {  # of the table: heading, and how a row's value reads
    "static": (
        ("operation", "{op}"),
        ("pass", "{pass}"),
        ("shape", "{shape_text} {dtype}"),
        ("chip", "{device}"),
        ("implementation", "{impl}"),
        ("scheduled cycles / floor", "{ratio:.2f}"),
        ("with its own HBM traffic", "{estimate_ratio:.2f}"),
        ("us", "{estimate_us:.0f}"),
        ("VMEM MiB", "{vmem_mib:.1f}"),
        ("spills", "{spills:.0f}"),
    ),
    "compiled": (
        ("operation", "{op}"),
        ("pass", "{pass}"),
        ("shape", "{shape_text} {dtype}"),
        ("device", "{device}"),
        ("registers", "{registers}"),
        ("bytes spilled", "{spilled_bytes}"),
        ("shared memory KiB", "{shared_kib:.0f}"),
        ("blocks per multiprocessor", "{per_multiprocessor}"),
    ),
    "measured": (
        ("operation", "{op}"),
        ("pass", "{pass}"),
        ("shape", "{shape_text} {dtype}"),
        ("device", "{device}"),
        ("implementation", "{impl}"),
        ("ms", "{median_ms:.3f}"),
        ("GB/s", "{gb_per_s:.1f}"),
        ("of a copy", "{share_of_copy:.0%}"),
        ("time / best", "{over_best:.2f}"),
    ),
}


def default_file() -> Path | None:
    """results.jsonl of the checkout that the package is run from; None where it is installed."""
    folder = PACKAGE.parent / "benchmarks"
    return folder / "results.jsonl" if folder.is_dir() else None


def provenance() -> Row:
    """When and with what: date, versions, commit."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **{name: _version(name) for name in ("jax", "jaxlib", "libtpu")},
        **_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> Row:
    """Empty outside a checkout of this package, as in an environment that lies in another one's checkout."""
    try:
        _git("ls-files", "--error-unmatch", "__init__.py")
        commit = _git("rev-parse", "--short=12", "HEAD").strip()
        return {"commit": commit, "dirty": bool(_git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=PACKAGE, capture_output=True, text=True, check=True).stdout


def append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for row in rows:
            print(json.dumps(row), file=file)


def read(path: Path) -> list[Row]:
    """The newest row of every implementation, pass, shape, dtype and device, in the order of their first appearance."""
    newest: dict[tuple[Any, ...], Row] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        newest[tuple(str(row[key]) for key in ("op", "pass", "shape", "dtype", "method", "device", "impl"))] = row
    return list(newest.values())


def table(rows: Sequence[Row]) -> str:
    """Markdown: one table for each way of measuring."""
    tables = []
    for method, columns in COLUMNS.items():
        chosen = [row for row in rows if row["method"] == method]
        if chosen:
            lines = [[heading for heading, _ in columns], ["---"] * len(columns)]
            lines += [[_cell(form, row) for _, form in columns] for row in chosen]
            tables.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(tables)


def _cell(form: str, row: Row) -> str:
    """ "-" for a number that a failed row does not have."""
    try:
        return form.format(**row, shape_text="x".join(map(str, row["shape"])))
    except KeyError:
        return "-"


def main() -> int:
    """Prints the table of the file named on the command line; 2 where there is none to read."""
    try:
        [name] = sys.argv[1:]
        print(table(read(Path(name))))
    except (OSError, ValueError, KeyError) as error:  # of JSON or columns, when it is another kind of file
        print(f"record: name one file of the bench's results: {error!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
