"""Eight fake CPU devices, a compilation cache for all runs, shapes checked at run time, a seed per test."""

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

from hybridlm.config import (
    RGLRU,
    AdamW,
    Attention,
    Block,
    Checkpoint,
    Config,
    Cosine,
    Data,
    Eval,
    GeGLU,
    Model,
    MoE,
    TopK,
    Train,
)
from tests import processes
from tests.corpora import write_corpus

# Compiling is most of what the tests do, and what they compile runs for milliseconds: LLVM's optimisations cost a third
# of a first run, XLA's fusion emitters another, and parts of a program that are compiled by themselves a twentieth. XLA
# reads this when it starts; flags that are set already stay.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11):  # behind it XLA ends the process at a flag that is gone
    FLAGS += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", FLAGS)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hybridlm-tests" / f"jax-{jax.__version__}"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

ARRAY_CODE = ("layers", "losses", "mixers", "ffns", "model", "train", "evaluation", "generate", "run")
# Before their first import: annotated shapes and types are checked in every call. Config and kernels check their own
# arguments, with errors that tests expect.
install_import_hook([f"hybridlm.{name}" for name in ARRAY_CODE], "beartype.beartype")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers that depend on the test's name alone, not on the order of the tests."""
    name, *_ = request.node.nodeid.split("@")  # behind it the group of tests that one process runs
    return np.random.default_rng(zlib.crc32(name.encode()))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine small text files."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), files=9, sentences=40)


@pytest.fixture(scope="session")
def tiny_config(corpus: Path) -> Config:
    """A run of seconds over every kind of mixer: 12 steps, a checkpoint each 4."""
    ffn = GeGLU(hidden=32)
    pattern = (
        Block(mixer=RGLRU(width=16, num_heads=2), ffn=ffn),
        Block(mixer=Attention(num_heads=2, num_kv_heads=1, window=8, rope_fraction=0.5), ffn=ffn),
        Block(mixer=Attention(num_heads=2, num_kv_heads=2), ffn=None),
    )
    return Config(
        model=Model(vocab_size=264, width=16, num_layers=3, pattern=pattern),
        data=Data(source="text", path=str(corpus), seq_len=32, validation_fraction=0.2),
        optimizer=AdamW(peak_lr=1e-2, schedule=Cosine(warmup_steps=3)),
        train=Train(steps=12, batch_size=8, log_every=1),
        eval=Eval(every=6, batches=2),
        checkpoint=Checkpoint(every=4, keep=3),
    )


@pytest.fixture(scope="session")
def trained_run(tiny_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of `tiny_config`'s finished run. Copy it to change it."""
    from hybridlm.train.loop import train

    directory = tmp_path_factory.mktemp("runs") / "trained"
    assert train(tiny_config, directory) == 0
    return directory


@pytest.fixture(scope="session")
def moe_config(tiny_config: Config) -> Config:
    """Layers 0, 1, 3 and 5 have experts, 4 or 6 of them; they lie in the prologue, the scanned part and the tail."""
    attention = Attention(num_heads=2, num_kv_heads=1, window=8)
    few = MoE(num_experts=4, hidden=12, router=TopK(k=1, renormalize=False), activation="GeGLU")
    many = MoE(num_experts=6, hidden=8, router=TopK(k=2), activation="GeGLU", shared_hidden=4)
    return replace(
        tiny_config,
        model=replace(
            tiny_config.model,
            num_layers=6,
            prologue=(Block(mixer=attention, ffn=few),),
            pattern=(Block(mixer=attention, ffn=many), Block(mixer=attention, ffn=GeGLU(hidden=8))),
        ),
    )


@pytest.fixture(scope="session")
def moe_run(moe_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of `moe_config` before its first step."""
    from hybridlm.model import build
    from hybridlm.train.derived import prepared, write_run

    directory = tmp_path_factory.mktemp("runs") / "moe"
    init, _ = build(moe_config.model, moe_config.kernels)
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    # Larger than at the start of training, so that experts differ in how often they are chosen.
    draw = np.random.default_rng(0).standard_normal
    params = jax.tree.map(lambda x: np.float32(0.5) * draw(x.shape, np.float32), shapes)
    mesh, corpus = prepared(moe_config)
    write_run(moe_config, directory, params, corpus, mesh, {"command": "test"})
    return directory


class Invoked(NamedTuple):
    """What a command ended with."""

    code: int
    out: str
    err: str

    def assert_refused(self, *parts: str) -> None:
        """Exit code 2 and one line, which holds all of `parts`."""
        assert self.code == 2, self.err
        assert self.err.startswith("hybridlm: ")
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n")
        for part in parts:
            assert part in self.err


@pytest.fixture
def invoke(capsys: pytest.CaptureFixture[str]) -> Callable[..., Invoked]:
    """`hybridlm WORDS` in this process."""
    from hybridlm import cli

    def run(*words: object) -> Invoked:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return Invoked(stopped.value.code, out, err)

    return run


@pytest.fixture(scope="session")
def process_environment() -> dict[str, str]:
    """For subprocesses: this checkout's packages, the CPU with as many devices as here, the same compilation cache."""
    return processes.environment(CACHE)


@pytest.fixture
def start(process_environment: dict[str, str], tmp_path: Path) -> Iterator[processes.Start]:
    """`start(num_processes, devices_per_process, *words)`: `hybridlm train WORDS` in so many processes."""
    with processes.starting(process_environment, tmp_path) as start:
        yield start


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A port of this machine that nobody listens on."""
    return processes.free_port
