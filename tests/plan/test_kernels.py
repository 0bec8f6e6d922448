"""`hybridlm kernels`: the operations of a model and the implementation each takes on the devices asked for."""

import pytest

from hybridlm import cli
from hybridlm.config_io import load_config, override
from hybridlm.plan.kernels import kernels_at, kernels_of
from hybridlm.plan.topology import topology


def test_a_griffin_on_tpu_takes_its_kernels_and_decodes_without_a_loop() -> None:
    rows = kernels_of(load_config("griffin_tiny"), topology("v5e"))
    taken = {(row.choice.op, row.phase): row.choice.impl for row in rows}
    assert taken == {
        ("rg_lru", "train"): "pallas_tpu",
        ("short_conv", "train"): "pallas_tpu",
        ("rg_lru", "decode"): "chunked",
        ("short_conv", "decode"): "chunked",
    }
    assert all("one token" in str(row.choice) for row in rows if row.phase == "decode")
    assert any("bfloat16[" in row.operands[0] for row in rows)


def test_operands_are_shown_as_they_are_sharded() -> None:
    rows = kernels_of(load_config("griffin_1b"), topology("v5p:2x2x2"))
    assert rows[0].operands[0] == "bfloat16[512@fsdp,2048,2560]"


def test_the_mesh_is_the_one_that_auto_chooses() -> None:
    config = override(load_config("griffin_tiny"), ["sharding.auto=true", "train.batch_size=2"])
    for where, dtype in ((topology("v5e:2x4"), "bfloat16"), (None, "float32")):
        operands = [row.operands[0] for row in kernels_of(config, where) if row.choice.op == "rg_lru"]
        assert operands == [f"{dtype}[2@data,256@context,192]", f"{dtype}[8@(data,fsdp),1,192]"]


def test_without_a_config_every_operation_is_listed() -> None:
    from hybridlm_kernels import OPS

    assert [row.choice.op for row in kernels_at(topology("v6e"))] == list(OPS)
    assert {row.choice.impl for row in kernels_at(topology("v6e"))} == {"pallas_tpu"}
    assert {row.choice.impl for row in kernels_at(topology("a100"))} == {"chunked"}


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["kernels", *words])
    out, err = capsys.readouterr()
    return ended.value.code, out, err


def test_the_command_prints_operation_tier_reason_and_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "griffin_tiny", "--topology", "v5e")
    assert code == 0
    assert "pallas_tpu  kernel for TPU v5 lite" in out and "bfloat16[" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["griffin_tiny", "--topology", "v5f"], "--topology=v5f: no such device; did you mean v5"),
        (["griffin_tiny", "--topology", "v5e:4x4"], "train.batch_size"),
        (["griffin_tny"], "did you mean griffin_tiny?"),
        (["--train.steps=3"], "train.steps=3: name the config whose fields are meant"),
        (
            ["griffin_tiny", "--topology", "v5e", "--kernels.rg_lru=pallas_gpu"],
            "kernels: impl='pallas_gpu': rg_lru runs on GPU, and this is TPU v5 lite; use auto",
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1
