"""Shell scripts: how they are checked, and the loop that starts a run again."""

import shlex
import subprocess

from hybridlm.config_check import ConfigError
from launch.run_spec import Run


def check_script(script: str, option: str = "script") -> None:
    """Let bash parse, and not run, what came from an option or was made of all of them. Raises ConfigError."""
    parsed = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if parsed.returncode:
        reason = parsed.stderr.strip().partition("\n")[0]
        raise ConfigError(option, f": bash cannot read it: {reason}")


def newest_checkpoint(run: Run) -> str:
    """A command that prints the newest saved step; what is being written has another name."""
    return f"ls {shlex.quote(run.directory)}/checkpoints 2>/dev/null | grep -xE '[0-9]+' | sort -n | tail -1"


def restart_policy(restarts: int) -> str:
    """A function of bash, which counts failures in a row without a new checkpoint, and ends the script with the
    failure's exit code after more than `restarts` of them. Exit code 2, a wrong config, is never tried again.
    """
    return f"""\
failures=0
count_failure() {{  # exit code, newest step before, newest step now
    if [ "$1" = 2 ]; then exit 2; fi
    if [ "$2" = "$3" ]; then failures=$((failures + 1)); else failures=0; fi
    if [ "$failures" -gt {restarts} ]; then
        echo "exit code $1, $failures times in a row without a new checkpoint: giving up" >&2
        exit "$1"
    fi
    echo "exit code $1: starting again" >&2
}}
"""
