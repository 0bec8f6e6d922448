"""Published models as runs: what they compute, train and export; where they lie; and wrong input."""

import json
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from hybridlm import config_io, load
from hybridlm.config import Attention, Block, Config, GatedLinearAttention, Mesh, SwiGLU
from hybridlm.config_check import ConfigError
from hybridlm.generate import Sampling, generate
from hybridlm.interop import export_run, import_run
from hybridlm.interop.families.lower_bounds import lower_bounds
from hybridlm.interop.runs import find_architecture, import_config
from hybridlm.interop.safetensors import INDEX, SINGLE, Tensors
from hybridlm.interop.weights import read_params
from hybridlm.model import build
from hybridlm.sharding import make_mesh
from hybridlm.train import layout
from hybridlm.train.checkpoint import Checkpoints
from hybridlm.train.derived import prepared, write_run
from hybridlm.train.derived import read_params as params_of_run
from hybridlm.train.loop import train
from tests.faults.sites import flip_bit, truncate
from tests.interop.published import Published, publish_hugging_face
from tests.interop.published import load as load_published

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")

VOCABULARY = 264
IDS = np.random.default_rng(0).integers(0, 256, (2, 11))


def write_tokenizer(directory: Path) -> None:
    """A token for each byte, and one for the end of a text."""
    import tokenizers

    symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(tokenizers.models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<eos>"])
    made.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}', encoding="utf-8")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """A Llama in several files, with a tokenizer."""
    directory = tmp_path_factory.mktemp("published") / "llama"
    made = publish_hugging_face(
        "Llama", directory, {"vocab_size": VOCABULARY, "bos_token_id": 3}, max_shard_size="20KB"
    )
    assert (directory / INDEX).is_file()
    write_tokenizer(directory)
    return made


@pytest.fixture(scope="module")
def overrides(corpus: Path) -> list[str]:
    data = ["data.source=text", f"data.path={corpus}", "data.seq_len=32", "data.validation_fraction=0.2"]
    steps = ["train.steps=1", "train.batch_size=8", "optimizer.schedule.warmup_steps=0", "eval.batches=1"]
    return data + steps


@pytest.fixture(scope="module")
def run(published: Published, overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "imported"
    import_run(published.directory, directory, overrides)
    return directory


def copied(directory: Path, to: Path) -> Path:
    shutil.copytree(directory, to)
    return to


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    tensors = Tensors(directory)
    return {name: tensors.read(name) for name in tensors.entries}


def assert_equal(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), strict=True)


def test_a_run_is_the_published_model(run: Path, published: Published) -> None:
    model, tokenizer, config = load(run)
    assert_equal(model.params, load_published(published.directory)[1])
    assert config.data.tokenizer == str(run / "pretrained" / "tokenizer.json")
    tokens = list(generate(model, tokenizer, b"the", max_new_tokens=3, sampling=Sampling(temperature=0.0)))
    ids = [tokenizer.end_id, *tokenizer.encode(b"the").tolist()]
    likeliest: list[int] = []
    for _ in range(3):
        logits = published.forward(np.array([ids + likeliest]))[0, -1, : tokenizer.vocab_size]
        likeliest.append(int(logits.argmax()))
    end = likeliest.index(tokenizer.end_id) if tokenizer.end_id in likeliest else 3
    assert tokens == likeliest[:end]


def test_a_run_trains_and_is_exported(run: Path, published: Published, tmp_path: Path) -> None:
    """After a step the weights are others; transformers computes with them what we do."""
    trained = copied(run, tmp_path / "run")
    config = config_io.load_run_config(trained)
    assert train(config, trained) == 0
    assert export_run(trained, tmp_path / "out") == "LlamaForCausalLM"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(IDS)).logits.numpy()
    ours = np.asarray(load(trained)[0](jax.numpy.asarray(IDS, jax.numpy.int32))[0])
    assert np.abs(theirs - ours).max() < 1e-4
    assert np.abs(theirs - published.forward(IDS)).max() > 1e-4
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (published.directory / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 3


def test_an_export_is_imported_bit_for_bit(
    run: Path, overrides: list[str], published: Published, tmp_path: Path
) -> None:
    export_run(run, tmp_path / "out", shard_bytes=30_000)
    assert (tmp_path / "out" / INDEX).is_file()
    assert_equal(tensors_of(tmp_path / "out"), tensors_of(published.directory))
    import_run(tmp_path / "out", tmp_path / "again", overrides)
    config, again = (config_io.load_run_config(directory) for directory in (run, tmp_path / "again"))
    assert again.model == config.model
    assert_equal(params_of_run(tmp_path / "again", again)[0], params_of_run(run, config)[0])


def test_half_precision_comes_back_bit_for_bit(published: Published, overrides: list[str], tmp_path: Path) -> None:
    """bfloat16, with one tensor of another dtype, as published models have."""
    directory = tmp_path / "half"
    directory.mkdir()
    kept = "model.norm.weight"
    half = {
        name: tensor if name == kept else tensor.astype(ml_dtypes.bfloat16)
        for name, tensor in tensors_of(published.directory).items()
    }
    safetensors.save_file(half, directory / SINGLE, metadata={"format": "pt"})
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(published.directory / name, directory / name)
    import_run(directory, tmp_path / "run", overrides)
    export_run(tmp_path / "run", tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), half)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    export_run(tmp_path / "run", tmp_path / "wide", dtype="float32")
    assert_equal(tensors_of(tmp_path / "wide"), {name: x.astype(np.float32) for name, x in half.items()})


def test_a_run_that_moved_has_its_tokenizer(run: Path, tmp_path: Path) -> None:
    moved = copied(run, tmp_path / "elsewhere")
    text = (moved / "config.json").read_text(encoding="utf-8")
    (moved / "config.json").write_text(text.replace(str(run), "/nowhere/run"), encoding="utf-8")
    config = config_io.load_run_config(moved)
    assert config.data.tokenizer == str(moved / "pretrained" / "tokenizer.json")


def test_tensors_are_read_once_and_one_at_a_time(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the model, the host holds one of its tensors, and stacks of layers are put together one at a time."""
    alive: set[str] = set()
    reads: list[tuple[str, int]] = []
    read = Tensors.read

    def counted(self: Tensors, name: str) -> np.ndarray:
        tensor = read(self, name)
        alive.add(name)
        weakref.finalize(tensor, alive.discard, name)
        reads.append((name, len(alive)))
        return tensor

    pending: list[int] = []
    assembled = layout.assembled

    def watched(leaf: layout.Leaf, arrays: dict[str, Any]) -> Any:
        pending.append(len(arrays))
        return assembled(leaf, arrays)

    monkeypatch.setattr(Tensors, "read", counted)
    monkeypatch.setattr(layout, "assembled", watched)
    load_published(published.directory)
    assert sorted(name for name, _ in reads) == sorted(Tensors(published.directory).entries)
    assert max(count for _, count in reads) == 1
    assert max(pending) == 2  # layers


def test_parameters_are_read_into_their_layout(published: Published) -> None:
    """Spread over a mesh, they are those of one device."""
    architecture, config = import_config(published.directory)
    mesh = make_mesh(Mesh(fsdp=4, tensor=2))
    spread = read_params(Tensors(published.directory), architecture, config.model, config.kernels, mesh)
    assert_equal(jax.device_get(spread), jax.device_get(load_published(published.directory)[1]))
    w_q = spread["stack"]["repeats"][0]["mixer"]["w_q"]  # layers, width, heads, head dim
    assert w_q.sharding.shard_shape(w_q.shape) == (2, 32 // 4, 4 // 2, 8)


def test_no_device_ever_holds_more_than_its_part(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """On four devices: of all arrays there are while tensors are read and layers put together, and in the end."""
    architecture, config = import_config(published.directory)
    mesh = make_mesh(Mesh(data=1, fsdp=4), jax.devices()[:4])
    before = jax.live_arrays()
    known = {id(x) for x in before}
    sizes: list[int] = []

    def measure() -> None:
        for x in jax.live_arrays():
            if id(x) not in known:
                sizes.extend(shard.data.size for shard in x.addressable_shards)

    read, assembled = Tensors.read, layout.assembled

    def measured_read(self: Tensors, name: str) -> np.ndarray:
        measure()
        return read(self, name)

    def measured_assembled(leaf: layout.Leaf, arrays: dict[str, Any]) -> Any:
        measure()
        return assembled(leaf, arrays)

    monkeypatch.setattr(Tensors, "read", measured_read)
    monkeypatch.setattr(layout, "assembled", measured_assembled)
    params = jax.tree.leaves(
        read_params(Tensors(published.directory), architecture, config.model, config.kernels, mesh)
    )
    measure()
    largest = max(params, key=lambda x: x.size)
    assert largest.sharding.shard_shape(largest.shape) != largest.shape
    assert max(sizes) == largest.size // 4


def test_lower_bounds_of_a_trained_run_are_exported() -> None:
    """Ours are a logit per layer, theirs shares of a sum over layers."""
    logits = np.log(np.array([[0.1, 0.2, 0.01], [0.3, 0.9, 0.02], [0.9, 0.9999, 0.021]], np.float32))
    logits = [row - np.log1p(-np.exp(row)) for row in logits]
    rule = lower_bounds(["a", "b", "c"], (1, 2, 4), "raw", num_layers=5, channels=3)
    (raw,) = rule.to_theirs(logits)
    share = np.exp(raw.astype(np.float64)) / np.exp(raw.astype(np.float64)).sum(axis=0)
    bounds = np.cumsum(share, axis=0) - share[0]
    np.testing.assert_allclose(bounds[[1, 2, 4]], 1 / (1 + np.exp(-np.float64(logits))), rtol=1e-5)
    back = rule.to_ours([raw], [(3,)] * 3)
    np.testing.assert_allclose(back, logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="layers.2.mixer.lower_bound: falls below .* channel 0"):
        rule.to_theirs([logits[1], logits[0], logits[2]])


def test_a_run_of_no_architecture_is_not_exported(
    invoke: Callable[..., Any], run: Path, tiny_config: Config, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="model: is not what .* the closest is RecurrentGemmaForCausalLM, with "):
        find_architecture(tiny_config.model, None)
    words = ("export", run, "--out", tmp_path / "out", "--architecture")
    invoke(*words, "Mamba2ForCausalLM").assert_refused("model: is no Mamba2ForCausalLM: ", "mixer: is not Mamba2")
    invoke(*words, "Llama").assert_refused("--architecture: Llama is not supported; known are LlamaForCausalLM")
    assert not (tmp_path / "out").exists()


def test_a_run_of_our_own_is_exported(tiny_config: Config, tmp_path: Path) -> None:
    """Norms with an offset become norms without, which compute the same."""
    mixer = GatedLinearAttention(num_heads=2, head_dim=4, value_head_dim=8)
    attention = Attention(num_heads=2, num_kv_heads=1, window=8)
    pattern = tuple(Block(mixer=each, ffn=SwiGLU(hidden=24)) for each in (mixer, attention))
    model = replace(tiny_config.model, num_layers=2, pattern=pattern, scale_embedding=False)
    config = replace(tiny_config, model=model)
    init, bind = build(model, config.kernels)
    draw = np.random.default_rng(0).standard_normal
    shapes = jax.eval_shape(lambda: init(jax.random.key(0)))
    params = jax.tree.map(lambda x: np.float32(0.3) * draw(x.shape, np.float32), shapes)
    mesh, corpus = prepared(config)
    write_run(config, tmp_path / "run", params, corpus, mesh, {"command": "test"})
    assert export_run(tmp_path / "run", tmp_path / "out") == "GLAForCausalLM"
    read, arrays = load_published(tmp_path / "out")
    assert not read.model.norm_offset
    tokens = jax.numpy.asarray(IDS, jax.numpy.int32)
    _, bind_read = build(read.model, read.kernels)
    wanted = jax.jit(lambda params: bind(params)(tokens)[0])(params)
    found = jax.jit(lambda params: bind_read(params)(tokens)[0])(jax.device_get(arrays))
    np.testing.assert_allclose(found, wanted, atol=1e-5)


Change = Callable[[Path], None]


def with_fields(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def with_tensors(directory: Path, edit: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = tensors_of(directory)
    edit(tensors)
    for path in [*directory.glob("*.safetensors"), directory / INDEX]:
        path.unlink()
    safetensors.save_file(tensors, directory / SINGLE)


def without(tensors: dict[str, np.ndarray], part: str) -> None:
    for name in [name for name in tensors if part in name]:
        del tensors[name]


def emptied(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()


ZEROS = np.zeros((2, 3), np.float32)
DOWN = "model.layers.1.mlp.down_proj.weight"
WRONG: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing": (lambda d: with_tensors(d, lambda t: t.pop(DOWN)), (f"lacks {DOWN}\n",)),
    "many-missing": (
        lambda d: with_tensors(d, lambda t: without(t, "layers.")),
        ("lacks model.layers.0", "and 10 more"),
    ),
    "extra": (
        lambda d: with_tensors(d, lambda t: t.update({"model.extra": ZEROS})),
        ("has, beside what the model reads, model.extra\n",),
    ),
    "shape": (
        lambda d: with_tensors(d, lambda t: t.update({DOWN: ZEROS})),
        (f"{DOWN} of shape [2, 3], not [32, 48]",),
    ),
    "integers": (
        lambda d: with_tensors(d, lambda t: t.update({DOWN: np.zeros((32, 48), np.int32)})),
        (f"{DOWN} of int32, which is not float32",),
    ),
    "architecture": (
        lambda d: with_fields(d, architectures=["OPTForCausalLM"]),
        ("OPTForCausalLM is not supported", "known are LlamaForCausalLM, MistralForCausalLM"),
    ),
    "no-architecture": (
        lambda d: with_fields(d, architectures=None, model_type=None),
        ("config.json: architectures: is missing, and so is model_type; known are LlamaForCausalLM",),
    ),
    "quantized": (
        lambda d: with_fields(d, quantization_config={"quant_method": "fp8"}),
        ("config.json: quantization_config=fp8: quantized weights are not read", "bfloat16"),
    ),
    "no-layers": (
        lambda d: with_fields(d, num_hidden_layers=0),
        ("config.json: num_hidden_layers: must be at least 1",),
    ),
    "no-heads": (
        lambda d: with_fields(d, num_attention_heads=0),
        ("config.json: has a field of a wrong type or size",),
    ),
    "rotary": (
        lambda d: with_fields(d, rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        ("config.json: rope_type='yarn': is not supported",),
    ),
    "type": (lambda d: with_fields(d, hidden_size="wide"), ("config.json: has a field of a wrong type or size",)),
    "no-json": (lambda d: (d / "config.json").write_text("{"), ("config.json: is not JSON",)),
    "empty": (emptied, ("holds no config.json, so it is no published model",)),
    "no-weights": (lambda d: [p.unlink() for p in d.glob("model*")], ("holds no model.safetensors",)),
    "no-tensors": (
        lambda d: [p.write_bytes(b"PK" * 40) for p in d.glob("*.safetensors")],
        ("is not a safetensors file",),
    ),
    "no-tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ("holds no tokenizer.json", "--data.tokenizer=FILE")),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case: str, published: Published, invoke: Callable[..., Any], tmp_path: Path) -> None:
    change, parts = WRONG[case]
    change(directory := copied(published.directory, tmp_path / "hf"))
    invoke("import", directory, "--out", tmp_path / "run").assert_refused(*parts)
    assert not list(tmp_path.glob("run*"))


def test_a_head_beside_a_tied_embedding_has_to_be_the_same(
    published: Published, overrides: list[str], invoke: Callable[..., Any], tmp_path: Path
) -> None:
    with_fields(directory := copied(published.directory, tmp_path / "hf"), tie_word_embeddings=True)
    fields = [f"--{assignment}" for assignment in overrides]
    invoke("import", directory, "--out", tmp_path / "run", *fields).assert_refused(
        "says tie_word_embeddings, and lm_head.weight is not model.embed_tokens.weight", "set it to false"
    )
    with_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    config, params = load_published(directory)
    assert config.model.tied_embedding and "w_head" not in params


def test_an_export_reads_one_array_at_a_time(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    loaded = Checkpoints._loaded

    def counting(self: Checkpoints, path: Path, wanted: dict[str, Any]) -> Any:
        asked.append(len(wanted))
        return loaded(self, path, wanted)

    monkeypatch.setattr(Checkpoints, "_loaded", counting)
    export_run(run, tmp_path / "out")
    assert len(asked) > 10 and set(asked) == {1}


@pytest.mark.parametrize("damage", [truncate, lambda path: flip_bit(path, path.stat().st_size // 2, 3)])
def test_an_export_of_a_damaged_checkpoint_is_refused(
    damage: Callable[[Path], None], run: Path, invoke: Callable[..., Any], tmp_path: Path
) -> None:
    damaged = copied(run, tmp_path / "run")
    files = [path for path in (damaged / "checkpoints" / "0" / "state").rglob("d/*") if path.is_file()]
    assert files
    for path in files:
        damage(path)
    invoke("export", damaged, "--out", tmp_path / "out").assert_refused("checkpoints/0: is damaged (", "rename it")
    assert not list(tmp_path.glob("out*"))


def test_nothing_is_written_over(run: Path, published: Published, invoke: Callable[..., Any], tmp_path: Path) -> None:
    for words in (("import", published.directory, "--out", run), ("export", run, "--out", published.directory)):
        invoke(*words).assert_refused("is there already and holds something")
    (tmp_path / "cut.partial").mkdir()
    (tmp_path / "file").touch()
    for words in (("import", published.directory), ("export", run)):
        invoke(*words, "--out", tmp_path / "cut").assert_refused("cut.partial: was left by a command", "remove it")
        invoke(*words, "--out", tmp_path / "file" / "out").assert_refused(f"cannot be written to: {tmp_path / 'file'}")
    invoke("import", tmp_path / "none", "--out", tmp_path / "run").assert_refused("none: no such directory")
    invoke("export", run, "--out", tmp_path / "out", "--model.width=8").assert_refused("model.width=8", "leave it out")


def test_a_published_model_is_fine_tuned_and_the_same_command_goes_on(
    published: Published, overrides: list[str], invoke: Callable[..., Any], tmp_path: Path
) -> None:
    words = ("finetune", "--init-from", published.directory, "--out", tmp_path / "tuned", "--lora", 2)
    fields = [f"--{assignment}" for assignment in overrides]
    assert invoke(*words, *fields).code == 0
    again = invoke(*words, *fields, "--train.steps=2")
    assert again.code == 0 and "resumed from step 1" in again.out, again.err
    tuned, _ = params_of_run(tmp_path / "tuned", config_io.load_run_config(tmp_path / "tuned"))
    begun, _ = params_of_run(tmp_path / "tuned.pretrained", config_io.load_run_config(tmp_path / "tuned.pretrained"))
    np.testing.assert_array_equal(tuned["embedding"], begun["embedding"])
    assert any(not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (tuned, begun)), strict=True))
    export_run(tmp_path / "tuned", tmp_path / "out")
    exported = load_published(tmp_path / "out")[1]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(exported), tuned)


@pytest.mark.parametrize(("size", "stride"), [(32, 12), (24, 23)])
def test_perplexity_in_sliding_windows_is_that_of_the_recipe_of_hugging_face(
    published: Published, run: Path, invoke: Callable[..., Any], tmp_path: Path, size: int, stride: int
) -> None:
    """In torch with their implementation: "Perplexity of fixed-length models", the losses of targets added up."""
    text = "".join(chr(97 + i % 23) for i in np.random.default_rng(1).integers(0, 1000, 150))
    (tmp_path / "text.txt").write_text(text)
    words = ("--windows", "sliding", "--stride", stride, "--context", size, "--json", tmp_path / "report.json")
    assert invoke("eval", run, "--data", tmp_path / "text.txt", *words).code == 0
    report = json.loads((tmp_path / "report.json").read_text())

    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(published.directory / "tokenizer.json"))
    end_id = tokenizer.convert_tokens_to_ids("<eos>")
    ids = torch.tensor([[end_id, *tokenizer(text)["input_ids"], end_id]])
    model = transformers.LlamaForCausalLM.from_pretrained(published.directory, dtype=torch.float32).eval()
    nats, counted, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + size, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : before - begin] = -100
        with torch.no_grad():
            loss = model(ids[:, begin:end], labels=labels).loss
        num_targets = int((labels[:, 1:] != -100).sum())
        nats, counted, before = nats + float(loss) * num_targets, counted + num_targets, end
        if end == ids.shape[1]:
            break
    assert report["tokens"] == counted == ids.shape[1] - 1
    np.testing.assert_allclose(report["loss"], nats / counted, rtol=1e-6)
    np.testing.assert_allclose(report["perplexity"], np.exp(nats / counted), rtol=1e-5)
