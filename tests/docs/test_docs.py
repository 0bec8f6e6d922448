"""What the documentation shows is run, and the links, options and files it names exist.

On a page, blocks run in order in one directory: ```bash in a shell whose exports last, ```python in one namespace. A
block with a title is written to the file of that name instead. A ```text block is what the block before it prints: its
lines appear in this order, `...` standing for anything. `<!-- no-test: reason -->` above a block leaves it out.
"""

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import pytest

from hybridlm import cli, config_io
from hybridlm.config import Config, Finetune, LoRA
from hybridlm.config_check import ConfigError

ROOT = Path(__file__).parents[2]
EXECUTED = [ROOT / "README.md", ROOT / "docs/tutorial.md", *sorted((ROOT / "docs/how-to").glob("*.md"))]
DOCUMENTS = sorted({*EXECUTED, *ROOT.glob("docs/**/*.md"), *ROOT.glob("[!.]*/README.md"), ROOT / "CHANGELOG.md"})
MAX_NOT_RUN = 6

FENCE = re.compile(
    r"(?:^<!-- no-test: (?P<reason>[^\n]+) -->\n)?"
    r'^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<text>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(r"(?:hybridlm|kernels|configs|docs|tests|launch)/[\w./-]*")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Fence:
    language: str
    text: str
    title: str | None
    reason: str | None
    """Why it is not run."""


def fences(page: Path) -> list[Fence]:
    found = FENCE.finditer(page.read_text(encoding="utf-8"))
    return [Fence(m["language"], m["text"], m["title"], m["reason"]) for m in found]


@pytest.mark.slow
@pytest.mark.parametrize("page", EXECUTED, ids=name_of)
def test_page_does_what_it_shows(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    shell, namespace, output = Shell(tmp_path / "exports"), {"__name__": "__main__"}, ""
    for fence in fences(page):
        match fence:
            case Fence(reason=str()):
                output = None
            case Fence(title=str(title)):
                (work / title).write_text(fence.text, encoding="utf-8")
            case Fence(language="bash"):
                output = shell.run(fence.text)
            case Fence(language="python"):
                output = run_python(fence.text, namespace)
            case Fence(language="text") if output is not None:
                assert_shows(output, fence.text)


@dataclass(frozen=True)
class Shell:
    """Bash, with the variables that earlier blocks exported."""

    exports: Path

    def run(self, commands: str) -> str:
        """What `commands` print, errors included. Asserts that they succeed."""
        script = f"set -e\n[ ! -e {self.exports} ] || . {self.exports}\n{commands}\nexport -p > {self.exports}\n"
        done = subprocess.run(
            ["bash", "-c", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            env=os.environ
            | {
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir or self.exports.parent / "xla"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
        )
        assert done.returncode == 0, f"exit code {done.returncode} of\n{commands}\n{done.stdout}"
        return done.stdout


def run_python(source: str, namespace: dict[str, Any]) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, "<page>", "exec"), namespace)
    return printed.getvalue()


def assert_shows(output: str, shown: str) -> None:
    lines = iter(output.splitlines())
    for expected in shown.splitlines():
        pattern = re.compile(".*".join(map(re.escape, expected.split("..."))))
        assert any(pattern.fullmatch(line.rstrip()) for line in lines), (
            f"{expected!r} is not in, or not after, \n{output}"
        )


@pytest.mark.parametrize("page", EXECUTED, ids=name_of)
def test_every_block_is_found(page: Path) -> None:
    marks = re.findall(r"^```", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert 2 * len(fences(page)) == len(marks)
    assert {fence.language for fence in fences(page)} <= {"bash", "python", "text"}, "only these are run or compared"


def test_few_blocks_are_not_run() -> None:
    reasons = [fence.reason for page in EXECUTED for fence in fences(page) if fence.reason is not None]
    assert len(reasons) <= MAX_NOT_RUN, reasons


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{name_of(page)}: {target}"
        assert not anchor or anchor in anchors(file), f"{name_of(page)}: {target}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    for code in INLINE_CODE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        if FILE.fullmatch(code):
            assert (ROOT / code).exists() or (ROOT / "kernels" / code).exists(), f"{name_of(page)}: `{code}`"


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_commands_and_options_exist(page: Path) -> None:
    for line in commands(page):
        words = shlex.split(line, comments=True)
        known = options_of(words[1]) if words[0] == "hybridlm" else set().union(*map(options_of, subcommands()))
        if "--" in words[:-1]:  # and behind it another command
            known |= options_of(words[words.index("--") + 1])
        for word in words:
            option, _, value = word.partition("=")
            if not re.match(r"--\w", word) or option in known:
                continue
            assert "." in option, f"{name_of(page)}: {option} in `{line}`"
            assert sets_a_field(option, value), f"{name_of(page)}: {option} in `{line}`"


def commands(page: Path) -> Iterator[str]:
    """Command lines of ours on a page, and options it names alone; not those that show what a mistake does."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    shell = "\n".join(m["text"] for m in FENCE.finditer(text) if m["language"] == "bash")
    for line in [*shell.splitlines(), *INLINE_CODE.findall(FENCE.sub("", text))]:
        if "exit code" in line:
            continue
        if match := re.search(r"(?:^|\s|/)(hybridlm [a-z]+.*)", line):
            yield re.split(r"[|&<>;]", match[1])[0]
        elif re.match(r"--[a-z]", line):
            yield line


def subcommands() -> dict[str, Any]:
    """Parsers by name. argparse has no public way to them."""
    groups = cli.make_parser()._subparsers
    assert groups is not None
    choices = groups._group_actions[0].choices
    assert isinstance(choices, dict)
    return choices


def options_of(subcommand: str) -> set[str]:
    assert subcommand in subcommands(), f"hybridlm {subcommand}"
    return set(subcommands()[subcommand]._option_string_actions)


@functools.cache
def recipes() -> list[Config]:
    """All of them, and one with what `--lora` adds."""
    found = [config for _, _, config in config_io.list_recipes()]
    return [*found, replace(found[0], finetune=Finetune(lora=LoRA()))]


def sets_a_field(option: str, value: str) -> bool:
    """Whether one of `recipes` has the field and takes the value (for `--a.b VALUE`, the field alone)."""
    for config in recipes():
        try:
            if value:
                config_io.override(config, [f"{option}={value}"])
                return True
            if option.removeprefix("--").replace("-", "_") in dict(config_io.leaves(config)):
                return True
        except ConfigError:
            continue
    return False


def test_architecture_names_every_module() -> None:
    page = (ROOT / "docs/explanation/architecture.md").read_text(encoding="utf-8")
    packages = (ROOT / "hybridlm", ROOT / "kernels/hybridlm_kernels")
    modules = [path.relative_to(root.parent).as_posix() for root in packages for path in sorted(root.rglob("*.py"))]
    modules = [name for name in modules if not name.endswith("__init__.py")]
    # Alone, or by its package.
    missing = [name for name in modules if f"`{name}`" not in page and f"`{name.rpartition('/')[0]}/`" not in page]
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in sorted(ROOT.glob("docs/**/*.md"))]
    assert [page for page in pages if not re.search(rf"\b{re.escape(page)}$", navigation, re.MULTILINE)] == []
