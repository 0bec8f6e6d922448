"""The smallest change that makes a step fit, found by compiling it with each change in turn."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import jax

from hybridlm.config import Config, Sharding
from hybridlm.config_check import ConfigError
from hybridlm.config_io import override
from hybridlm.plan.compile import compile_step, mesh_on
from hybridlm.plan.report import Report, make_report
from hybridlm.plan.text import verdict
from hybridlm.plan.topology import Topology
from hybridlm.train.capacity import bytes_per_device
from hybridlm.train.program import step_program

REMAT = ("none", "dots", "block_outputs", "full")
"""What the backward pass recomputes, less to more."""
FACTORS = (2, 4, 8)
"""By which microbatches become more, and batches smaller."""


@dataclass(frozen=True)
class Change:
    """Assignments to fields of the config, and other devices where it names them."""

    assignments: tuple[str, ...]
    topology: Topology | None = None

    @property
    def flags(self) -> str:
        """As the command line spells it."""
        fields = [f"--{assignment}" for assignment in self.assignments]
        return " ".join(fields + ([f"--topology {self.topology.name}"] if self.topology else []))

    def __add__(self, other: "Change") -> "Change":
        return Change(self.assignments + other.assignments, other.topology or self.topology)


def smallest_change(
    config: Config, topology: Topology, refused: Report, say: Callable[[str], None]
) -> tuple[Change, Report] | None:
    """The first in `families` that fits; None where none does. `say` is told what is tried."""
    limit = refused.available_bytes
    for family in families(config, topology, refused.mesh):
        possible = [change for change in family if _is_possible(config, topology, change, limit)]
        if not possible:
            continue
        # The strongest of a family first: where that does not fit, no other does, and it is compiled but once.
        strongest = _with(config, topology, possible[-1], say)
        if not strongest.fits:
            continue
        for change in possible[:-1]:
            report = _with(config, topology, change, say)
            if report.fits:
                return change, report
        return possible[-1], strongest
    return None


def _with(config: Config, topology: Topology, change: Change, say: Callable[[str], None]) -> Report:
    report = make_report(compile_step(override(config, change.assignments), change.topology or topology))
    say(f"with {change.flags} it {verdict(report)}")
    return report


def families(config: Config, topology: Topology, mesh: Mapping[str, int]) -> Iterator[tuple[Change, ...]]:
    """Changes of one kind, weaker to stronger; the kinds from those that change a run least to those that change most.

    `mesh` is what the step was compiled for. Recomputing and microbatches leave the numbers as they are and cost time;
    so does sharding parameters. A smaller batch is another run, and more chips cost money.
    """
    train = config.train
    remat = tuple(Change((f"model.remat={name}",)) for name in REMAT[REMAT.index(config.model.remat) + 1 :])
    micro = tuple(Change((f"train.num_microbatches={factor * train.num_microbatches}",)) for factor in FACTORS)
    fsdp = () if mesh["data"] == 1 else (_without_replicas(config.sharding, mesh),)
    most = (remat[-1:] or (Change(()),))[0]
    yield remat
    yield micro
    if remat:
        yield tuple(most + change for change in micro)
    yield fsdp
    for change in fsdp:
        if remat:
            yield tuple(change + weaker for weaker in remat)
        yield tuple(change + most + smaller for smaller in micro)
    strongest = (fsdp[0] if fsdp else Change(())) + most
    sizes = [train.batch_size // factor for factor in FACTORS if train.batch_size % factor == 0]
    yield tuple(strongest + Change((f"train.batch_size={size}",)) for size in sizes)
    larger = topology.larger()
    for _ in range(3):
        if larger is None:
            return
        on_larger = Change((), larger)
        yield (on_larger,)
        yield (strongest + on_larger,)
        larger = larger.larger()


def _without_replicas(sharding: Sharding, mesh: Mapping[str, int]) -> Change:
    """`fsdp` in place of `data`. Where `sharding.auto` chose `mesh`, the other axes stay as it chose them."""
    wanted = sharding.mesh
    if not sharding.auto:
        fsdp = -1 if -1 in (wanted.data, wanted.fsdp) else wanted.data * wanted.fsdp
        return Change((f"sharding.mesh.fsdp={fsdp}", "sharding.mesh.data=1"))
    chosen = [axis for axis in ("expert", "context", "tensor") if mesh[axis] != getattr(wanted, axis)]
    kept = [f"sharding.mesh.{axis}={mesh[axis]}" for axis in chosen]
    return Change(("sharding.auto=False", *kept, "sharding.mesh.fsdp=-1", "sharding.mesh.data=1"))


def _is_possible(config: Config, topology: Topology, change: Change, limit: int | None) -> bool:
    """Whether it makes a step, whose state alone is not too large already."""
    try:
        changed = override(config, change.assignments)
        mesh = mesh_on(changed, change.topology or topology)
        with jax.set_mesh(mesh):
            state = bytes_per_device(step_program(changed, mesh).state)
    except ConfigError:
        return False
    return limit is None or state <= limit
