"""Everything a run depends on, as frozen dataclasses. Imports no JAX.

A recipe is a short Python file that ends in `config = Config(...)`. Subclass `Mixer` or `FFN` to add your own block;
`hybridlm.mixers.register` and `hybridlm.ffns.register` name the module that computes it.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from hybridlm.config_check import (
    ConfigError,
    Fraction,
    Node,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
)
from hybridlm.config_data import Chat as Chat
from hybridlm.config_data import Data as Data
from hybridlm.config_data import Part as Part
from hybridlm.config_data import Stage as Stage
from hybridlm.config_distill import Distill as Distill
from hybridlm.config_ffns import FFN as FFN
from hybridlm.config_ffns import GLU as GLU
from hybridlm.config_ffns import Bilinear as Bilinear
from hybridlm.config_ffns import Capacity as Capacity
from hybridlm.config_ffns import Dispatch as Dispatch
from hybridlm.config_ffns import Dropless as Dropless
from hybridlm.config_ffns import GatedMLP as GatedMLP
from hybridlm.config_ffns import GeGLU as GeGLU
from hybridlm.config_ffns import MoE as MoE
from hybridlm.config_ffns import ReGLU as ReGLU
from hybridlm.config_ffns import SwiGLU as SwiGLU
from hybridlm.config_finetune import Finetune as Finetune
from hybridlm.config_finetune import LoRA as LoRA
from hybridlm.config_memory import PEER as PEER
from hybridlm.config_memory import AddHeld as AddHeld
from hybridlm.config_memory import Beside as Beside
from hybridlm.config_memory import Memory as Memory
from hybridlm.config_memory import MemoryPlus as MemoryPlus
from hybridlm.config_memory import ProductKeyMemory as ProductKeyMemory
from hybridlm.config_memory import UltraMem as UltraMem
from hybridlm.config_mixers import HGRN2 as HGRN2
from hybridlm.config_mixers import RGLRU as RGLRU
from hybridlm.config_mixers import Attention as Attention
from hybridlm.config_mixers import DeltaNet as DeltaNet
from hybridlm.config_mixers import DeltaProduct as DeltaProduct
from hybridlm.config_mixers import GatedDeltaNet as GatedDeltaNet
from hybridlm.config_mixers import GatedLinearAttention as GatedLinearAttention
from hybridlm.config_mixers import GatedSlotAttention as GatedSlotAttention
from hybridlm.config_mixers import KimiDeltaAttention as KimiDeltaAttention
from hybridlm.config_mixers import Liger as Liger
from hybridlm.config_mixers import Llama3Rope as Llama3Rope
from hybridlm.config_mixers import Mamba2 as Mamba2
from hybridlm.config_mixers import Mixer as Mixer
from hybridlm.config_mixers import RetNet as RetNet
from hybridlm.config_mixers import SimpleGLA as SimpleGLA
from hybridlm.config_routers import AdaptiveTopK as AdaptiveTopK
from hybridlm.config_routers import Comet as Comet
from hybridlm.config_routers import DenseToSparse as DenseToSparse
from hybridlm.config_routers import DSelectK as DSelectK
from hybridlm.config_routers import ExpertChoice as ExpertChoice
from hybridlm.config_routers import Gate as Gate
from hybridlm.config_routers import GRKANGate as GRKANGate
from hybridlm.config_routers import GShardTop2 as GShardTop2
from hybridlm.config_routers import HashRouter as HashRouter
from hybridlm.config_routers import LinearGate as LinearGate
from hybridlm.config_routers import NoisyTopK as NoisyTopK
from hybridlm.config_routers import PreGated as PreGated
from hybridlm.config_routers import RecurrentGate as RecurrentGate
from hybridlm.config_routers import Router as Router
from hybridlm.config_routers import Switch as Switch
from hybridlm.config_routers import TopK as TopK
from hybridlm.config_tables import RowAdagrad as RowAdagrad
from hybridlm.config_tables import RowAdam as RowAdam
from hybridlm.config_tables import TableOptimizer as TableOptimizer
from hybridlm.config_tasks import MQAR as MQAR
from hybridlm.config_tasks import S3 as S3
from hybridlm.config_tasks import S5 as S5
from hybridlm.config_tasks import Addition as Addition
from hybridlm.config_tasks import Copying as Copying
from hybridlm.config_tasks import Induction as Induction
from hybridlm.config_tasks import ModularArithmetic as ModularArithmetic
from hybridlm.config_tasks import Parity as Parity
from hybridlm.config_tasks import S5Swaps as S5Swaps
from hybridlm.config_tasks import SelectiveCopying as SelectiveCopying
from hybridlm.config_tasks import Task as Task


class Optimizer(Node):
    """Base of the configs of optimizers."""

    peak_lr: float
    weight_decay: float
    schedule: "Schedule"
    tables: TableOptimizer | None = None


class Schedule(Node):
    """Base of the configs of learning rate schedules."""


@dataclass(frozen=True, kw_only=True)
class Block(Node):
    """One residual layer: x += mixer(norm(x)); x += ffn(norm(x))."""

    mixer: Mixer
    ffn: FFN | None


@dataclass(frozen=True, kw_only=True)
class Model(Node):
    """Embedding, prologue, repeats of the pattern (scanned), what is left of it, epilogue, norm, head."""

    vocab_size: PositiveInt
    width: PositiveInt
    num_layers: PositiveInt
    """All blocks, prologue and epilogue included; the pattern fills what they leave and may end in its middle."""
    pattern: tuple[Block, ...]
    prologue: tuple[Block, ...] = ()
    epilogue: tuple[Block, ...] = ()
    tied_embedding: bool = True
    scale_embedding: bool = True
    """Multiply embeddings by sqrt(width)."""
    embedding_scale: PositiveFloat | None = None
    """Multiply embeddings by this instead; RecurrentGemma has sqrt(width) rounded to bfloat16."""
    logit_soft_cap: PositiveFloat | None = None
    """cap * tanh(logits / cap)."""
    norm_eps: PositiveFloat = 1e-6
    norm_offset: bool = True
    """Norms of the residual stream, and of queries and keys in attention, multiply by 1 + scale, as Gemma's and
    Qwen3-Next's; by the scale alone, as Llama's, when off."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations; `auto` is bfloat16, on CPU float32."""
    remat: Literal["none", "full", "dots", "block_outputs"] = "none"
    """What the backward pass recomputes in a block: nothing, all, all but matmuls, all but mixer and FFN outputs."""

    def check(self) -> None:
        if self.embedding_scale is not None and not self.scale_embedding:
            raise ConfigError("embedding_scale", f"={self.embedding_scale}: needs scale_embedding=True")
        if not self.pattern:
            raise ConfigError("pattern", ": must hold at least one Block")
        fixed = len(self.prologue) + len(self.epilogue)
        if self.num_layers < fixed:
            raise ConfigError("num_layers", f"={self.num_layers}: prologue and epilogue alone have {fixed} blocks")
        for name in ("prologue", "pattern", "epilogue"):
            for i, block in enumerate(getattr(self, name)):
                mixer = block.mixer
                if isinstance(mixer, Attention | Liger) and mixer.head_dim is None and self.width % mixer.num_heads:
                    raise ConfigError(
                        f"{name}.{i}.mixer.num_heads",
                        f"={mixer.num_heads}: model.width={self.width} must divide by it, or set head_dim",
                    )
        self._check_routers()
        self._check_held()

    def _check_routers(self) -> None:
        kinds = {(block.ffn.router, block.ffn.num_experts) for block in self.blocks() if isinstance(block.ffn, MoE)}
        for name in ("prologue", "pattern", "epilogue"):
            for i, block in enumerate(getattr(self, name)):
                if isinstance(block.ffn, MoE):
                    router = block.ffn.router
                    layers = sum(isinstance(b.ffn, MoE) and b.ffn.router == router for b in self.blocks())
                    try:
                        router.check_stack(tuple(kinds), layers)
                    except ConfigError as error:
                        raise error.under(f"{name}.{i}.ffn.router") from None

    def _check_held(self) -> None:
        held = False
        for i, block in enumerate(self.blocks()):
            reads = isinstance(block.ffn, Beside) and block.ffn.held
            if held and reads:
                raise ConfigError("pattern", f": layer {i} reads while what was read before waits for an AddHeld")
            if not held and isinstance(block.ffn, AddHeld):
                raise ConfigError("pattern", f": layer {i} has AddHeld, but no Beside with held=True comes before it")
            held = reads or held and not isinstance(block.ffn, AddHeld)
        if held:
            raise ConfigError("pattern", ": what the last Beside with held=True reads is added nowhere; add an AddHeld")

    def blocks(self) -> list[Block]:
        """Every block in order, the pattern repeated."""
        middle = self.num_layers - len(self.prologue) - len(self.epilogue)
        repeated = [self.pattern[i % len(self.pattern)] for i in range(middle)]
        return [*self.prologue, *repeated, *self.epilogue]


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `final_fraction` of the peak at the last step."""

    warmup_steps: NonNegativeInt = 100
    final_fraction: Fraction = 0.1


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Schedule):
    """Linear warm-up, a plateau, then a linear decay to `final_fraction` over the last `decay_steps`."""

    warmup_steps: NonNegativeInt = 100
    decay_steps: PositiveInt
    final_fraction: Fraction = 0.0


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW with decoupled decay (not on norms, biases, decays) and clipping by global norm."""

    peak_lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.1
    b1: Fraction = 0.9
    b2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    clip_norm: PositiveFloat | None = 1.0
    router_bias_rate: NonNegativeFloat = 0.001
    """By how much a step raises or lowers the biases of routers with `bias_balance`."""
    tables: TableOptimizer | None = RowAdam()
    """The rule for the tables of memory layers, which weight decay and `clip_norm` leave alone."""
    schedule: Schedule = Cosine()


@dataclass(frozen=True, kw_only=True)
class Train(Node):
    """The loop."""

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    """Sequences in one optimizer step, over all devices."""
    num_microbatches: PositiveInt = 1
    """Gradient accumulation: the batch is run in so many parts, weighted by their tokens."""
    gradient_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """In which devices add up their gradients of weights; `auto` is the dtype of activations."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of log(Z)^2, which keeps logits from drifting (PaLM uses 1e-4)."""
    log_every: PositiveInt = 10
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    max_nonfinite_steps: PositiveInt = 10
    """Steps with a non-finite loss or gradient change nothing; so many in a row roll the run back."""
    spike_sigma: PositiveFloat | None = None
    """Neither do steps whose loss or gradient norm is above its recent mean by so many standard deviations."""
    rollbacks: NonNegativeInt = 2
    """So often to the same checkpoint, jumping over the batches of rejected steps; then the run stops."""
    hang_seconds: PositiveInt | None = 1800
    """A process that finishes no step for so long writes the stacks of its threads and ends."""
    compare_replicas_every: PositiveInt | None = None
    """Steps between comparisons of the devices' copies of the state; where they differ the run ends with code 76."""

    def check(self) -> None:
        if self.batch_size % self.num_microbatches:
            raise ConfigError(
                "batch_size", f"={self.batch_size}: must divide by num_microbatches={self.num_microbatches}"
            )


@dataclass(frozen=True, kw_only=True)
class Eval(Node):
    """Evaluation on held-out text while training."""

    every: PositiveInt = 500
    """Steps between evaluations; there is one after the last step in any case."""
    batches: PositiveInt | None = None
    """Batches used each time; all held-out text when absent."""
    sample_prompts: tuple[str, ...] = ()
    """Beginnings of documents that each evaluation continues, one line of `samples.jsonl` for each."""
    sample_tokens: PositiveInt = 64
    """Of each continuation at most, drawn at temperature 1; `train.seed`, the step and the prompt's place decide."""

    def check(self) -> None:
        for i, prompt in enumerate(self.sample_prompts):
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(f"sample_prompts.{i}", f": is not UTF-8 at character {error.start}") from None


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Node):
    """Checkpoints are written asynchronously, and on Ctrl-C or SIGTERM."""

    every: PositiveInt = 500
    keep: PositiveInt = 3
    """The latest so many stay."""
    keep_every: PositiveInt | None = None
    """Those of steps that divide by it stay as well."""
    buffer_gb: PositiveFloat = 16.0
    """Host memory that each process takes to write or read one, beside its share of the state; at least an array."""
    timeout_seconds: PositiveInt = 300
    """For how long a process waits for the others' parts; where a save fails on one host, all end within it."""


MeshSize = Annotated[int, Range(-1)]


@dataclass(frozen=True, kw_only=True)
class Mesh(Node):
    """Devices per mesh axis; one axis may be -1 and takes the devices that are left."""

    slices: MeshSize = -1
    """Batch only, over the slow network between TPU slices or GPU nodes; -1 is as many slices as the devices are of."""
    data: MeshSize = -1
    """Batch only; parameters are replicated."""
    fsdp: MeshSize = 1
    """Batch, and parameters sharded (ZeRO-3)."""
    expert: MeshSize = 1
    """Batch, experts, columns of memories' tables, and the other parameters sharded as by fsdp."""
    context: MeshSize = 1
    """Time: each device has a stretch of every sequence. Parameters are sharded as by fsdp."""
    tensor: MeshSize = 1
    """Heads, channels and vocabulary."""

    def check(self) -> None:
        names = ("data", "fsdp", "expert", "context", "tensor")
        sizes = {name: getattr(self, name) for name in names}
        for name, size in {"slices": self.slices, **sizes}.items():
            if size == 0:
                raise ConfigError(name, "=0: must be at least 1, or -1 for the devices that are left")
        if list(sizes.values()).count(-1) > 1:
            raise ConfigError("", ": only one axis may be -1, not " + " and ".join(n for n in sizes if sizes[n] == -1))


@dataclass(frozen=True, kw_only=True)
class Sharding(Node):
    """How arrays are laid out over devices."""

    mesh: Mesh = Mesh()
    auto: bool = False
    """Choose the sizes that `mesh` has at 1 or -1: experts, then time, then parameters are spread as far as needed."""
    xla_options: tuple[str, ...] = ()
    """Options of the compiler for the training step, each `name=value`, beside those that hybridlm sets."""


Tier = Literal["auto", "reference", "chunked", "pallas_tpu", "pallas_gpu"]


@dataclass(frozen=True, kw_only=True)
class Kernels(Node):
    """Which implementation each kernel op takes; `auto` is the fastest that serves."""

    rg_lru: Tier = "auto"
    short_conv: Tier = "auto"
    gated_linear_attention: Tier = "auto"
    gated_delta_rule: Tier = "auto"
    grouped_matmul: Tier = "auto"
    memory_lookup: Tier = "auto"
    check_values: bool = False
    """Stop where a log decay is positive or a beta outside [0, 2]. For debugging: every step reads them once more."""


@dataclass(frozen=True, kw_only=True)
class Config(Node):
    """A whole run."""

    model: Model
    data: Data = Data()
    optimizer: Optimizer = AdamW()
    train: Train = Train()
    finetune: Finetune = Finetune()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    sharding: Sharding = Sharding()
    kernels: Kernels = Kernels()
    distill: Distill | None = None

    def check(self) -> None:
        if self.data.task is not None:
            self._check_task(self.data.task)
        if self.distill is not None and self.distill.on_policy and self.distill.prompt_length >= self.data.seq_len:
            raise ConfigError(
                "distill.prompt_length",
                f"={self.distill.prompt_length}: must be below data.seq_len={self.data.seq_len}, to be gone on with",
            )
        for i, block in enumerate(self.model.blocks()):
            ffn = block.ffn
            if not isinstance(ffn, MoE):
                continue
            experts, slices = self.sharding.mesh.expert, ffn.dispatch.slices
            if experts != -1 and ffn.num_experts % experts:
                raise ConfigError(
                    "sharding.mesh.expert", f"={experts}: must divide num_experts={ffn.num_experts} of layer {i}"
                )
            if experts > 1 and experts % slices:
                raise ConfigError(
                    "sharding.mesh.expert", f"={experts}: must divide by dispatch.slices={slices} of layer {i}"
                )
            group = ffn.dispatch.group_size if isinstance(ffn.dispatch, Capacity) else None
            if group is not None and self.data.seq_len % group:
                raise ConfigError(
                    "data.seq_len", f"={self.data.seq_len}: must divide by group_size={group} of layer {i}"
                )

    def _check_task(self, task: Task) -> None:
        if self.model.vocab_size < task.num_ids:
            raise ConfigError(
                "model.vocab_size",
                f"={self.model.vocab_size}: data.source={self.data.source} has {task.num_ids} ids; raise it",
            )
        if self.eval.sample_prompts:
            raise ConfigError("eval.sample_prompts", f": are text, and data.source={self.data.source} has none")
