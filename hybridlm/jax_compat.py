"""The JAX interfaces that differ between the versions we support (0.10 and newer), in one place."""

import jax


def target_platform() -> str:
    """Platform that the code being traced will run on: the mesh's when it names one, else the default backend's.

    With ahead-of-time compilation the mesh is of a TPU while the process itself runs on a CPU.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return device.platform if device is not None else jax.default_backend()
