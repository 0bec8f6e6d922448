"""`hybridlm plan --search`: meshes, remat policies and batches, ranked by the tokens per second that they could reach.

All of them are ranked by a formula; the best few are compiled, and what the compiler made of them ranks those. Letters:
b batch, t time, d model width.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import jax

from hybridlm.config import Config, Mesh, MoE
from hybridlm.config_check import ConfigError
from hybridlm.model import build
from hybridlm.plan.chips import HARDWARE, Hardware
from hybridlm.plan.compile import compile_step, mesh_on
from hybridlm.plan.report import Report, make_report
from hybridlm.plan.roofline import others_share
from hybridlm.plan.topology import Topology
from hybridlm.sharding import check_batch
from hybridlm.train.capacity import bytes_per_device
from hybridlm.train.mesh_choice import divisors
from hybridlm.train.program import step_program
from hybridlm.train.teacher import step_flops

AXES = ("data", "fsdp", "expert", "context", "tensor")
MICROBATCHES = (1, 2, 4, 8)
BATCHES = (0.5, 1, 2)
"""Times the config's own."""
LEAST_TIME = 1024
"""Tokens of a sequence that a device of the axis context should have at least."""
PER_MESH = 2
"""Variants of one mesh among those that are compiled."""

RECOMPUTED = {"none": 0.0, "block_outputs": 0.9, "dots": 0.1, "full": 1.0}
"""Share of the forward pass that is run twice."""
KEPT = {"none": 34, "dots": 18, "block_outputs": 6, "full": 2}
"""Bytes of activations per token, layer and channel of the model's width that wait for the backward pass, roughly."""


@dataclass(frozen=True)
class Candidate:
    """A config, the flags that make it of the one that was given, and what the formula says of it."""

    config: Config
    flags: tuple[str, ...]
    tokens_per_second: float
    bytes: float


@dataclass(frozen=True)
class Ranked:
    """A candidate that was compiled."""

    flags: str
    report: Report


@dataclass(frozen=True)
class Sizes:
    """Of the model that is searched for, once for all candidates."""

    parameters: int
    flops: float
    """Of a token, forward and backward, with a teacher's."""

    @property
    def state_bytes(self) -> int:
        """Of parameters and two moments in float32, as they are before they are spread."""
        return 12 * self.parameters


def search(config: Config, topology: Topology, *, compiles: int, say: Callable[[str], None]) -> list[Ranked]:
    """The `compiles` candidates that promise most, those that fit first, the fastest first.

    Raises ConfigError where nothing can be compared, or nothing works on these devices.
    """
    hardware = HARDWARE[topology.kind]
    if not (hardware.peak_flops and hardware.link_bandwidth and hardware.hbm_bandwidth):
        raise ConfigError("--search", f": the rates of {topology.kind} are not known, so that nothing can be ranked")
    ranked: list[Ranked] = []
    for candidate in promising(config, topology, hardware, compiles):
        report = make_report(compile_step(candidate.config, topology))
        ranked.append(Ranked(" ".join(candidate.flags), report))
        rate = f"{report.tokens_per_second:,.0f} tokens/s" if report.fits else "does not fit"
        say(f"{len(ranked)} of {compiles}: {ranked[-1].flags}: {rate}")
    if not ranked:
        raise ConfigError("--search", f": no mesh of {topology.name} works with this model and batch")
    return sorted(ranked, key=lambda found: (not found.report.fits, -(found.report.tokens_per_second or 0.0)))


def promising(config: Config, topology: Topology, hardware: Hardware, limit: int) -> Iterator[Candidate]:
    """The first `limit` by the formula that make a step; those that seem too large for the memory come last."""
    sizes = sizes_of(config)
    memory = topology.memory or math.inf
    found = [estimated(each, flags, topology, hardware, sizes) for each, flags in variants(config, topology)]
    found.sort(key=lambda each: (each.bytes > memory, -each.tokens_per_second, len(each.flags)))
    taken: dict[Mesh, int] = {}
    states: dict[Mesh, float] = {}
    for candidate in found:
        mesh = candidate.config.sharding.mesh
        if sum(taken.values()) == limit:
            return
        if taken.get(mesh, 0) == PER_MESH or not _batch_fits(candidate.config, topology):
            continue
        if mesh not in states:
            states[mesh] = _state_bytes(candidate.config, topology)
        if states[mesh] <= memory:
            taken[mesh] = taken.get(mesh, 0) + 1
            yield candidate


def variants(config: Config, topology: Topology) -> Iterator[tuple[Config, tuple[str, ...]]]:
    """Every mesh, remat policy, number of microbatches and batch size that pass the config's own checks."""
    remats = dict.fromkeys((config.model.remat, "none", "dots", "block_outputs", "full"))
    batches = sorted({int(config.train.batch_size * factor) for factor in BATCHES})
    models = [replace(config.model, remat=remat) for remat in remats]
    trains = []
    for micro, batch in product(sorted({config.train.num_microbatches, *MICROBATCHES}), batches):
        with contextlib.suppress(ConfigError):
            trains.append(replace(config.train, num_microbatches=micro, batch_size=batch))
    for mesh in meshes(config, topology):
        with contextlib.suppress(ConfigError):
            on_mesh = replace(config, sharding=replace(config.sharding, mesh=mesh, auto=False))
            for model, train in product(models, trains):
                changed = replace(on_mesh, model=model, train=train)
                yield changed, _flags(config, changed)


def meshes(config: Config, topology: Topology) -> list[Mesh]:
    """Those whose axes multiply to the devices, and divide what the config says they divide."""
    has_experts = any(isinstance(block.ffn, MoE) for block in config.model.blocks())
    slices = topology.num_slices if topology.chip.platform == "tpu" else max(config.sharding.mesh.slices, 1)
    devices = topology.num_devices // slices
    sizes = divisors(devices)
    found = []
    for expert, context, tensor in product(sizes if has_experts else [1], sizes, sizes):
        rest, left_over = divmod(devices, expert * context * tensor)
        if left_over or (context > 1 and config.data.seq_len // context < LEAST_TIME):
            continue
        for fsdp in divisors(rest):
            sized = {"data": rest // fsdp, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
            found.append(Mesh(slices=config.sharding.mesh.slices, **sized))
    return found


def sizes_of(config: Config) -> Sizes:
    """Without a mesh: nothing of it depends on one."""
    init, _ = build(config.model, config.kernels)
    params = jax.eval_shape(lambda: init(jax.random.key(0)))
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    return Sizes(parameters, step_flops(config))


def estimated(
    config: Config, flags: tuple[str, ...], topology: Topology, hardware: Hardware, sizes: Sizes
) -> Candidate:
    """Half of the communication is taken to hide behind the compute.

    Per microbatch fsdp gathers the parameters for the forward and the backward pass in bfloat16 and reduces gradients;
    per layer tensor reduces activations four times; data reduces gradients once.
    """
    mesh, train, model = config.sharding.mesh, config.train, config.model
    tokens = train.batch_size * config.data.seq_len
    micro = train.num_microbatches
    local = tokens / micro * mesh.tensor / topology.num_devices  # tokens of a device in a microbatch
    sharded = mesh.fsdp * mesh.expert * mesh.context
    work = sizes.flops * (1 + RECOMPUTED[model.remat] / 3) * tokens
    assert hardware.peak_flops and hardware.link_bandwidth and hardware.hbm_bandwidth
    traffic = micro * (sizes.parameters * 2 * 3 / mesh.tensor + model.num_layers * local * model.width * 2 * 20)
    compute = max(
        work / topology.num_devices / hardware.peak_flops,
        (traffic + 3 * sizes.state_bytes / sharded / mesh.tensor) / hardware.hbm_bandwidth,
    )
    links = 2 * hardware.link_bandwidth if hardware.torus_dims else hardware.link_bandwidth
    gathered = 3 * micro * 2 * sizes.parameters / mesh.tensor * others_share(sharded)
    reduced = 2 * 4 * sizes.parameters / mesh.tensor / sharded * others_share(mesh.data)
    exchanged = 8 * model.num_layers * micro * local * model.width * 2 * others_share(mesh.tensor)
    network = hardware.network_bandwidth or links
    between = 2 * 4 * sizes.parameters / mesh.tensor / sharded * others_share(topology.num_slices) / network
    seconds = compute + 0.5 * ((gathered + reduced + exchanged) / links + between)
    state = sizes.state_bytes / sharded / mesh.tensor
    gradients = 4 * sizes.parameters / sharded / mesh.tensor
    kept = model.num_layers * local * model.width * KEPT[model.remat] / mesh.tensor**0.5
    return Candidate(config, flags, tokens / seconds, state + gradients + kept)


def _flags(config: Config, changed: Config) -> tuple[str, ...]:
    """What makes `changed` of `config` on the command line."""
    fields: dict[str, tuple[Any, Any]] = {
        f"sharding.mesh.{axis}": (config.sharding.mesh, changed.sharding.mesh) for axis in AXES
    }
    fields["sharding.auto"] = config.sharding, changed.sharding
    fields["model.remat"] = config.model, changed.model
    fields["train.num_microbatches"] = fields["train.batch_size"] = config.train, changed.train
    flags = []
    for path, (old, new) in fields.items():
        name = path.rpartition(".")[2]
        if getattr(old, name) != getattr(new, name):
            flags.append(f"--{path}={getattr(new, name)}")
    return tuple(flags)


def _batch_fits(config: Config, topology: Topology) -> bool:
    try:
        mesh: Any = topology.abstract_mesh(config.sharding.mesh)
        check_batch(config, mesh)
    except ConfigError:
        return False
    return True


def _state_bytes(config: Config, topology: Topology) -> float:
    """Of a device; infinite where the model and the mesh do not go together."""
    try:
        mesh = mesh_on(config, topology)
        with jax.set_mesh(mesh):
            program = step_program(config, mesh)
            return bytes_per_device((program.state, program.frozen))
    except ConfigError:
        return math.inf
