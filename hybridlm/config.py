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
from hybridlm.config_mixers import HGRN2 as HGRN2
from hybridlm.config_mixers import RGLRU as RGLRU
from hybridlm.config_mixers import Attention as Attention
from hybridlm.config_mixers import DeltaNet as DeltaNet
from hybridlm.config_mixers import DeltaProduct as DeltaProduct
from hybridlm.config_mixers import GatedDeltaNet as GatedDeltaNet
from hybridlm.config_mixers import GatedLinearAttention as GatedLinearAttention
from hybridlm.config_mixers import GatedSlotAttention as GatedSlotAttention
from hybridlm.config_mixers import KimiDeltaAttention as KimiDeltaAttention
from hybridlm.config_mixers import Mamba2 as Mamba2
from hybridlm.config_mixers import Mixer as Mixer
from hybridlm.config_mixers import RetNet as RetNet
from hybridlm.config_mixers import SimpleGLA as SimpleGLA


class FFN(Node):
    """Base of the configs of channel mixers."""


class Optimizer(Node):
    """Base of the configs of optimizers."""

    peak_lr: float
    weight_decay: float
    schedule: "Schedule"


class Schedule(Node):
    """Base of the configs of learning rate schedules."""


@dataclass(frozen=True, kw_only=True)
class GatedMLP(FFN):
    """(act(x W_gate) * x W_up) W_down (Shazeer, 2020, arXiv:2002.05202). Use one of the five named subclasses."""

    hidden: PositiveInt
    bias: bool = False


class GLU(GatedMLP):
    """act = sigmoid."""


class Bilinear(GatedMLP):
    """act = identity."""


class ReGLU(GatedMLP):
    """act = ReLU."""


class GeGLU(GatedMLP):
    """act = GELU (tanh form)."""


class SwiGLU(GatedMLP):
    """act = SiLU."""


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
    logit_soft_cap: PositiveFloat | None = None
    """cap * tanh(logits / cap)."""
    norm_eps: PositiveFloat = 1e-6
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations; `auto` is bfloat16, on CPU float32."""
    remat: Literal["none", "full", "dots", "block_outputs"] = "none"
    """What the backward pass recomputes in a block: nothing, all, all but matmuls, all but mixer and FFN outputs."""

    def check(self) -> None:
        if not self.pattern:
            raise ConfigError("pattern", ": must hold at least one Block")
        fixed = len(self.prologue) + len(self.epilogue)
        if self.num_layers < fixed:
            raise ConfigError("num_layers", f"={self.num_layers}: prologue and epilogue alone have {fixed} blocks")
        for name in ("prologue", "pattern", "epilogue"):
            for i, block in enumerate(getattr(self, name)):
                mixer = block.mixer
                if isinstance(mixer, Attention) and mixer.head_dim is None and self.width % mixer.num_heads:
                    raise ConfigError(
                        f"{name}.{i}.mixer.num_heads",
                        f"={mixer.num_heads}: model.width={self.width} must divide by it, or set head_dim",
                    )


@dataclass(frozen=True, kw_only=True)
class Data(Node):
    """Where text comes from and how it becomes sequences."""

    source: Literal["python-stdlib", "text", "jsonl"] = "python-stdlib"
    """`python-stdlib` is the source text of the running Python's standard library: no download."""
    path: str | None = None
    """A file or a directory, for `text` and `jsonl`."""
    text_key: str = "text"
    """The field of a JSONL object that holds the text."""
    seq_len: Annotated[int, Range(2)] = 1024
    tokenizer: str = "byte"
    """`byte`, or a local tokenizer.json (Hugging Face tokenizers) or .model (SentencePiece) file."""
    validation_fraction: Annotated[float, Range(0, 0.5, above=True)] = 0.02
    """Share of the documents held out, chosen by their names; of a corpus with one document, its end."""
    prefetch: PositiveInt = 4
    """Batches prepared ahead."""

    def check(self) -> None:
        if self.source != "python-stdlib" and self.path is None:
            raise ConfigError("path", f": is required by source={self.source}; give a file or a directory")


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
    schedule: Schedule = Cosine()


@dataclass(frozen=True, kw_only=True)
class Train(Node):
    """The loop."""

    steps: PositiveInt = 1000
    batch_size: PositiveInt = 32
    """Sequences in one optimizer step, over all devices."""
    num_microbatches: PositiveInt = 1
    """Gradient accumulation: the batch is run in so many parts, weighted by their tokens."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of log(Z)^2, which keeps logits from drifting (PaLM uses 1e-4)."""
    log_every: PositiveInt = 10
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    max_nonfinite_steps: PositiveInt = 10
    """Steps with a non-finite loss or gradient change nothing; so many in a row stop the run."""

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


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Node):
    """Checkpoints are written asynchronously, and on Ctrl-C or SIGTERM."""

    every: PositiveInt = 500
    keep: PositiveInt = 3


MeshSize = Annotated[int, Range(-1)]


@dataclass(frozen=True, kw_only=True)
class Mesh(Node):
    """Devices per mesh axis; one axis may be -1 and takes the devices that are left."""

    data: MeshSize = -1
    """Batch only; parameters are replicated."""
    fsdp: MeshSize = 1
    """Batch, and parameters sharded (ZeRO-3)."""
    tensor: MeshSize = 1
    """Heads, channels and vocabulary."""

    def check(self) -> None:
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        for name, size in sizes.items():
            if size == 0:
                raise ConfigError(name, "=0: must be at least 1, or -1 for the devices that are left")
        if list(sizes.values()).count(-1) > 1:
            raise ConfigError("", ": only one axis may be -1, not " + " and ".join(n for n in sizes if sizes[n] == -1))


@dataclass(frozen=True, kw_only=True)
class Sharding(Node):
    """How arrays are laid out over devices."""

    mesh: Mesh = Mesh()


Tier = Literal["auto", "reference", "chunked", "pallas_tpu", "pallas_gpu"]


@dataclass(frozen=True, kw_only=True)
class Kernels(Node):
    """Which implementation each kernel op takes; `auto` is the fastest that serves."""

    rg_lru: Tier = "auto"
    short_conv: Tier = "auto"
    gated_linear_attention: Tier = "auto"
    gated_delta_rule: Tier = "auto"
    check_values: bool = False
    """Stop where a log decay is positive or a beta outside [0, 2]. For debugging: every step reads them once more."""


@dataclass(frozen=True, kw_only=True)
class Config(Node):
    """A whole run."""

    model: Model
    data: Data = Data()
    optimizer: Optimizer = AdamW()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    sharding: Sharding = Sharding()
    kernels: Kernels = Kernels()
