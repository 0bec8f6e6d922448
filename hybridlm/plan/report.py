"""What `hybridlm plan` says of a compiled step: whether it fits, what a device holds and does, how long that takes."""

from dataclasses import asdict, dataclass
from typing import Any

from hybridlm.plan.chips import HARDWARE
from hybridlm.plan.collectives import Collective, collectives
from hybridlm.plan.compile import CompiledStep
from hybridlm.plan.costs import Cost, costs, kernels_without_flops
from hybridlm.plan.memory import Memory, memory, overflow
from hybridlm.plan.roofline import Estimate, estimate
from hybridlm.train.teacher import step_flops


@dataclass(frozen=True)
class Report:
    """Of one step on one topology. Bytes and FLOPs are those of one device unless they say otherwise."""

    topology: str
    device_kind: str
    num_devices: int
    mesh: dict[str, int]
    batch_size: int
    seq_len: int
    num_microbatches: int
    remat: str
    trace_seconds: float
    compile_seconds: float
    fits: bool
    needed_bytes: int
    available_bytes: int | None
    """None where nobody tells."""
    memory: Memory
    model_flops: float
    """Of the model, and of a teacher, for one step of all devices, without what rematerialisation repeats."""
    costs: dict[str, Cost]
    unknown_kernels: tuple[str, ...]
    """Those whose FLOPs are not among the costs."""
    collectives: tuple[Collective, ...]
    estimate: Estimate | None
    """None for devices whose rates are not known."""

    @property
    def tokens(self) -> int:
        """Of one step of all devices."""
        return self.batch_size * self.seq_len

    @property
    def tokens_per_second(self) -> float | None:
        """Of all devices: that of the middle between everything hidden and nothing hidden."""
        if self.estimate is None:
            return None
        return 2 * self.tokens / (self.estimate.step_s_overlapped + self.estimate.step_s_serial)

    def to_json(self) -> dict[str, Any]:
        """Everything, for other programs."""
        return asdict(self) | {"tokens": self.tokens, "tokens_per_second": self.tokens_per_second}


def make_report(compiled: CompiledStep) -> Report:
    """Read everything from the program that the compiler made."""
    config, topology, step = compiled.config, compiled.topology, compiled.step
    program, dump = compiled.program, compiled.dump
    arguments = (step.state, step.batch, *step.frozen)
    held = memory(dump, program, *arguments)
    needed, available = held.total, topology.memory
    if dump.out_of_memory:
        refused = overflow(dump, program, *arguments)
        needed, available = refused.needed, refused.available
    spent, exchanged = costs(program), tuple(collectives(program, compiled.mesh))
    tokens = config.train.batch_size * config.data.seq_len
    model_flops = float(step_flops(config) * tokens)
    hardware = HARDWARE[topology.kind]
    return Report(
        topology=topology.name,
        device_kind=topology.chip.device_kind,
        num_devices=topology.num_devices,
        mesh=dict(compiled.mesh.shape),
        batch_size=config.train.batch_size,
        seq_len=config.data.seq_len,
        num_microbatches=config.train.num_microbatches,
        remat=config.model.remat,
        trace_seconds=compiled.trace_seconds,
        compile_seconds=compiled.compile_seconds,
        fits=not dump.out_of_memory and (available is None or needed <= available),
        needed_bytes=needed,
        available_bytes=available,
        memory=held,
        model_flops=model_flops,
        costs=spent,
        unknown_kernels=kernels_without_flops(program),
        collectives=exchanged,
        estimate=estimate(spent, exchanged, hardware, model_flops / topology.num_devices, compiled.mesh),
    )
