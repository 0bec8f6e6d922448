"""`hybridlm report`: its options, and what it prints."""

import argparse
from pathlib import Path

from hybridlm.cli.words import check_file
from hybridlm.config_check import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the subcommand."""
    parser.epilog = "Several runs are compared. The file needs no network and no other file."
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="default: RUN/report.html; of several runs report.html, here"
    )
    parser.add_argument(
        "--plan", type=Path, metavar="FILE", help="of `hybridlm plan --json` (default: RUN/plan.json, if it is there)"
    )


def report(args: argparse.Namespace, overrides: list[str]) -> int:
    if overrides:
        raise ConfigError(overrides[0], ": `hybridlm report` has no config to set fields of")
    if len(args.runs) > 1 and args.plan is not None:
        raise ConfigError(
            f"--plan {args.plan}", f": is about one run, not {len(args.runs)}; put each run's plan.json into it"
        )
    for n, run in enumerate(args.runs):
        if run.resolve() in [before.resolve() for before in args.runs[:n]]:
            raise ConfigError(str(run), ": is named twice; name each run once")
    check_file("--out", args.out)

    from hybridlm.report.page import write_report

    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    runs = write_report(args.runs, out, args.plan)
    told = ", ".join(f"{run.name} at step {run.last_step:,}" for run in runs)
    print(f"{out}: {told}; {out.stat().st_size / 1e3:,.0f} kB")
    return 0
