"""The layer of moe_layer.py as MaxText has it: what the compiler says of its `RoutedMoE` for an absent TPU slice.

    python3.12 -m venv ~/maxtext && . ~/maxtext/bin/activate
    pip install "jax[tpu]>=0.11.1" flax optax aqtp qwix tokamax omegaconf pydantic orbax-checkpoint jaxtyping beartype \
        psutil drjax jinja2 pathwaysutils huggingface_hub transformers grain pillow
    pip install --no-deps maxtext==0.2.5
    PYTHONPATH=.:kernels TPU_SKIP_MDS_QUERY=1 JAX_PLATFORMS=cpu \
        python kernels/benchmarks/maxtext_moe_layer.py --topology v5e:4x4

Sizes, passes and columns are those of `moe_layer.py --topology`, which runs in the same environment. The configuration
is MaxText's base.yml with the sizes below, its mesh is MaxText's own with experts over all chips, and nothing of it is
patched. In every dispatch but the first, what does not fit is dropped without a count.
"""

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import logical_axis_rules
from jax.experimental import topologies
from maxtext.configs import pyconfig
from maxtext.layers.initializers import nd_dense_init
from maxtext.layers.moe import RoutedMoE
from maxtext.utils.maxtext_utils import get_mesh_from_config
from maxtext.utils.sharding import nnx_construct_named_sharding
from moe_layer import report, with_gradient

ACCELERATORS = {"v5e:4x4": "v5e-16", "v5p:2x2x4": "v5p-32"}
"""MaxText's names of the topologies; its configuration takes the number of devices from them."""

DISPATCHES: dict[str, dict[str, Any]] = {
    "ragged, room for all": {},
    "ragged, buffer 1.25": {"ragged_buffer_factor": 1.25},
    # Groups are sequences. Without the last field the experts' weights are gathered instead of the tokens exchanged.
    "one-hot 1.25, groups of 2048": {
        "sparse_matmul": False,
        "megablox": False,
        "capacity_factor": 1.25,
        "moe_dispatch_no_expert_sharding": True,
    },
}


def configuration(topology: str, num_devices: int, dispatch: dict[str, Any]) -> Any:
    return pyconfig.initialize(
        run_name="moe_layer",
        base_output_directory="unused",
        compile_topology=ACCELERATORS[topology],
        compile_topology_num_slices=1,
        skip_jax_distributed_system=True,
        enable_checkpointing=False,
        log_config=False,
        decoder_block="mixtral",
        base_emb_dim=2048,
        base_mlp_dim=1024,
        base_moe_mlp_dim=1024,
        mlp_activations=["silu", "linear"],
        num_experts=64,
        num_experts_per_tok=8,
        load_balance_loss_weight=0.01,
        dtype="bfloat16",
        weight_dtype="float32",
        per_device_batch_size=8,
        max_target_length=2048,
        ici_fsdp_parallelism=1,
        ici_expert_parallelism=num_devices,
        **dispatch,
    )


def layer(config: Any, mesh: jax.sharding.Mesh) -> tuple[Callable[[Any, Any, Any], Any], Any, Any]:
    """`forward(params, x, streams) -> (y, loss)`, abstract parameters and random streams, as in its Mixtral."""

    def make() -> RoutedMoE:
        return RoutedMoE(
            config=config,
            num_experts=config.num_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            mesh=mesh,
            kernel_init=nd_dense_init(1.0, "fan_in", "truncated_normal"),
            kernel_axes=("embed", None),
            intermediate_dim=config.moe_mlp_dim,
            dtype=config.dtype,
            weight_dtype=config.weight_dtype,
            rngs=nnx.Rngs(params=0),
        )

    graphdef, params, streams = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    params = jax.tree.map(
        lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        params,
        nnx_construct_named_sharding(params, mesh),
    )

    def forward(params: Any, x: jax.Array, streams: Any) -> tuple[Any, Any]:
        y, loss, _ = nnx.merge(graphdef, params, streams)(x)
        return y, loss

    return forward, params, streams


def compile_for(topology: str, name: str) -> None:
    """One line per pass."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    config = configuration(topology, len(devices), DISPATCHES[name])
    mesh = get_mesh_from_config(config, devices)
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        forward, params, streams = layer(config, mesh)
        rows = jax.NamedSharding(mesh, jax.P("expert"))
        x = jax.ShapeDtypeStruct((8 * len(devices), 2048, 2048), jnp.bfloat16, sharding=rows)
        for label, function, args in (
            ("forward", forward, (params, x, streams)),
            ("forward+backward", with_gradient(forward), (params, x, streams, x)),
        ):
            report(f"{topology} | MaxText, {name} | {label}", function, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", action="append", choices=ACCELERATORS, default=[])
    parser.add_argument("--dispatch", action="append", choices=DISPATCHES, help="default: all")
    args = parser.parse_args()
    print("topology | dispatch | pass | TFLOP | temporaries GiB | peak GiB | collectives")
    for topology in args.topology or ACCELERATORS:
        for name in args.dispatch or DISPATCHES:
            compile_for(topology, name)


if __name__ == "__main__":
    main()
