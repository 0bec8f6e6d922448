"""What was trained, in words, and the numbers that a person asks for first."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hybridlm import config_io
from hybridlm.config import Block, Config
from hybridlm.report.bars import shares
from hybridlm.report.html import Markup, element, folded, joined, section, table
from hybridlm.report.numbers import duration, is_number, number, percent, short
from hybridlm.report.runs import Run
from hybridlm.report.series import series_of


def final_numbers(run: Run) -> dict[str, tuple[str, float | None]]:
    """What a run came to, by what it is called: as text, and as a number; `–` and None where it is not known."""
    held_out = run.held_out[-1] if run.held_out else {}
    losses = series_of(run.metrics, "loss")
    rate, mfu = series_of(run.metrics, "tokens_per_second"), series_of(run.metrics, "mfu")
    seconds = goodput_seconds(run)
    total = sum(seconds.values())
    good = seconds.get("steps", 0.0) / total if total else None
    found: dict[str, tuple[str, float | None]] = {}

    def add(name: str, value: Any, text: str | None = None) -> None:
        known = float(value) if is_number(value) else None
        found[name] = (number(known) if text is None or known is None else text, known)

    add("held-out bits per byte", held_out.get("bits_per_byte"))
    add("held-out loss", held_out.get("loss"))
    add("held-out perplexity", held_out.get("perplexity"))
    add("training loss", None if losses is None else losses.last)
    add("tokens", run.tokens, short(run.tokens))
    parameters = sum(parameters_of(run).values())
    add("parameters", parameters or None, short(parameters))
    add("tokens per second", rate and rate.median, short(rate.median) if rate and rate.median else None)
    add("MFU", mfu and mfu.median, percent(mfu.median) if mfu and mfu.median is not None else None)
    add("goodput", good, percent(good))
    add("time", total or None, duration(total))
    return found


HEADLINES = ("held-out bits per byte", "held-out loss", "tokens", "parameters", "tokens per second", "MFU", "goodput")


def headlines(run: Run) -> Markup:
    """The first numbers of a run, large; those that are known."""
    found = final_numbers(run)
    tiles = [
        element("div", element("dt", name), element("dd", found[name][0]))
        for name in HEADLINES
        if found[name][1] is not None
    ]
    return element("dl", *tiles, class_="tiles") if tiles else Markup()


def status(run: Run) -> str:
    """How far the run is."""
    total, step = run.config.train.steps, run.last_step
    if not step:
        return f"No step of {total:,} has been logged yet."
    if step >= total:
        return f"All {total:,} steps are done."
    last = run.events[-1] if run.events else {}
    stopped = f", stopped ({last.get('reason', 'no reason told')})" if last.get("event") == "stopped" else ""
    return f"Step {step:,} of {total:,}{stopped}."


def in_one_sentence(run: Run) -> str:
    """`6 layers of width 128: RGLRU + GeGLU, ..., 1.38 M parameters, trained on python-stdlib.`"""
    config = run.config
    kinds = Counter(type(block.mixer).__name__ for block in config.model.blocks())
    mixers = " and ".join(f"{count} {name}" for name, count in kinds.items())
    parameters = sum(parameters_of(run).values())
    size = f"{short(parameters)} parameters in " if parameters else ""
    return (
        f"{size}{config.model.num_layers} layers ({mixers}) of width {config.model.width:,}, "
        f"trained on {', '.join(sources(config))}."
    )


def what_was_trained(run: Run, anchor: str) -> Markup:
    """Model, data, optimizer, devices and versions."""
    config, environment = run.config, run.environment
    model, train, data = config.model, config.train, config.data
    per_step = train.batch_size * data.seq_len
    facts: list[tuple[str, str]] = [
        ("layers", _stack(config)),
        ("width", f"{model.width:,}; vocabulary {model.vocab_size:,}, tokenizer {data.tokenizer}"),
        ("data", ", ".join(sources(config)) + f"; {percent(data.validation_fraction, 0)} held out"),
        (
            "steps",
            f"{train.steps:,} of {train.batch_size:,} × {data.seq_len:,} = {per_step:,} tokens"
            + (f" in {train.num_microbatches} microbatches" if train.num_microbatches > 1 else "")
            + f"; {train.steps * per_step:,} in all",
        ),
        ("optimizer", _optimizer(config)),
        ("devices", _devices(run)),
        ("precision", f"activations {model.dtype}, rematerialisation {model.remat}"),
        ("seed", str(train.seed)),
    ]
    if packages := environment.get("packages"):
        versions = [f"{name} {version}" for name, version in packages.items() if version]
        facts.append(("versions", ", ".join([*versions, f"Python {environment.get('python', '?')}"])))
    if revision := environment.get("revision"):
        facts.append(("git revision", str(revision)))
    if command := environment.get("command"):
        facts.append(("command", element("code", " ".join(map(str, command)))))
    if run.origin:
        facts.append(("made from", ", ".join(f"{name} {value}" for name, value in run.origin.items())))
    listed = [item for name, text in facts for item in (element("dt", name), element("dd", text))]
    leaves = [(path, config_io.as_text(value)) for path, value in config_io.leaves(config)]
    return section(
        "What was trained",
        anchor,
        element("dl", *listed, class_="facts"),
        _parameters(run),
        folded("every field of the config", table(("field", "value"), leaves, text_columns=2)),
    )


def parameters_of(run: Run) -> dict[str, int]:
    """Counts by part of the model; empty where the run did not write them down."""
    found = run.environment.get("parameters")
    return {str(name): count for name, count in found.items()} if isinstance(found, dict) else {}


def sources(config: Config) -> list[str]:
    """The names of what was read."""
    data = config.data
    if data.mixture:
        return [part.name for part in data.mixture]
    return [data.source if data.path is None else f"{data.path} ({data.source})"]


def goodput_seconds(run: Run) -> dict[str, float]:
    """Seconds by kind; empty where they are not known."""
    found = run.goodput.get("seconds")
    return {name: value for name, value in found.items() if is_number(value)} if isinstance(found, dict) else {}


def _parameters(run: Run) -> Markup:
    counts = dict(sorted(parameters_of(run).items(), key=lambda item: -item[1]))
    if not counts:
        return Markup()
    idle = run.environment.get("idle_parameters")
    total = sum(counts.values())
    active = f", {total - idle:,} of them active for a token" if isinstance(idle, int) and idle else ""
    texts = {name: f"{count:,}" for name, count in counts.items()}
    return shares(f"{total:,} parameters{active}", counts, texts, ("part", "parameters", "share"))


def _stack(config: Config) -> Markup:
    """The blocks as chips: prologue, pattern with how often it is there, epilogue."""
    model = config.model
    middle = model.num_layers - len(model.prologue) - len(model.epilogue)
    repeats, rest = divmod(middle, len(model.pattern))
    times = f"× {repeats}" + (f", and the first {rest} again" if rest else "")
    parts = [
        _chips(model.prologue),
        _chips(model.pattern),
        element("span", times, class_="times"),
        _chips(model.epilogue),
    ]
    return joined([element("span", f"{model.num_layers} layers", class_="times"), *filter(None, parts)], " ")


def _chips(blocks: Sequence[Block]) -> Markup:
    return joined([element("span", block_name(block), class_="chip") for block in blocks], " ")


def block_name(block: Block) -> str:
    """`RGLRU + GeGLU`, `Attention 128 + MoE 2 of 8`."""
    mixer, ffn = type(block.mixer).__name__, block.ffn
    window = getattr(block.mixer, "window", None)
    name = f"{mixer} {window:,}" if isinstance(window, int) else mixer
    if ffn is None:
        return name
    experts = getattr(ffn, "num_experts", None)
    return f"{name} + {type(ffn).__name__}" + (f" of {experts}" if experts else "")


def _optimizer(config: Config) -> str:
    """The class, and its fields that are numbers or named rules."""
    optimizer = config.optimizer
    children = config_io.children(optimizer) or {}
    fields = [f"{name} {config_io.as_text(value)}" for name, value in children.items() if value is not None]
    return f"{type(optimizer).__name__}: " + ", ".join(fields)


def _devices(run: Run) -> str:
    devices = Counter(map(str, run.environment.get("devices", ())))
    if not devices:
        return "not written down"
    names = ", ".join(f"{count:,} × {kind}" for kind, count in devices.items())
    mesh = run.environment.get("mesh")
    axes = [f"{axis} {size}" for axis, size in mesh.items() if size != 1] if isinstance(mesh, dict) else []
    processes = run.environment.get("processes", 1)
    return (
        names + (f"; mesh {', '.join(axes)}" if axes else "") + (f"; {processes} processes" if processes != 1 else "")
    )
