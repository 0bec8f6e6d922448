"""Along which mesh axes the devices of a collective's groups lie, from the notations that XLA has for such groups.

`replica_groups={{0,1},{2,3}}` and `source_target_pairs={{0,1},{1,0}}` list partition ids; `[2,4]<=[4,2]T(1,0)` is the
range 0..7 as [4, 2], transposed, as [2, 4]; `mesh['x'=4,'y'=2] {'x':(2)2}` names axes of a mesh of XLA's own, or parts
of such axes. Partition ids number the devices of the mesh in their order. Transfers of TPU slices by way of their hosts
name devices by JAX's ids instead, or by slice and number in the slice.
"""

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import jax
import numpy as np
from hybridlm_kernels.bench.hlo import Instruction, Program

FIRST_OF_SLICE = 100_000
"""libtpu numbers the devices of slice 1 from here, those of slice 2 from twice this; the only slice's from 0."""
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_IOTA_GROUPS = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_LISTED_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}")
_MESH_GROUPS = re.compile(r"replica_groups=@?mesh[\[<](.*?)[\]>](?:, device_ids=\((.*?)\))? \{(.*?)\}")
_MESH_AXIS = re.compile(r"'?(\w+)'?(?:=(\d+)|:\((\d+)\)(\d+))?")
_HOST_GROUPS = re.compile(r"_xla_megascale_target=\{((?:\{[\d,\->]*\},?)*)\}")
_HOST_PRODUCTS = re.compile(r"\{([\d,]+)\}x\{(\d+):(\d+)\}")

Groups = Sequence[Sequence[int]] | np.ndarray


class Places:
    """Where the devices that a program numbers stand in the mesh."""

    def __init__(self, program: Program, mesh: jax.sharding.Mesh):
        self._names = mesh.axis_names
        self._known: dict[str, tuple[int, tuple[str, ...]]] = {}
        every = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=-1)
        devices = list(mesh.devices.flat)
        self._of_device = {device.id: place for device, place in zip(devices, every, strict=True)}
        slices = [getattr(device, "slice_index", 0) for device in devices]
        is_one_slice = 1 < program.num_partitions < mesh.size
        self._of_partition = every[np.array(slices) == slices[0]] if is_one_slice else every

    def devices_and_axes(self, i: Instruction) -> tuple[int, tuple[str, ...]]:
        """How many devices take part in one instance of a collective, and the mesh axes along which they differ."""
        text = i.attributes.partition("metadata=")[0].partition("backend_config=")[0]
        if text not in self._known:
            groups = self._groups(text)
            moved = np.zeros(len(self._names), bool)
            for group in groups:
                moved |= (group != group[0]).any(axis=0)
            self._known[text] = len(groups[0]), tuple(np.array(self._names)[moved].tolist())
        return self._known[text]

    def _groups(self, attributes: str) -> list[np.ndarray]:
        """Coordinates of the members of each group: [devices, axes]."""
        if (hosts := _host_groups(attributes)) is not None:
            return [np.array([self._of_device[n] for n in group]) for group in hosts]
        groups = _partition_groups(attributes)
        return [self._of_partition[list(group)] for group in groups] or [self._of_partition]


def _host_groups(attributes: str) -> list[list[int]] | None:
    """Ids of devices that communicate by way of their hosts. `{1,2}x{0:7}`: device n of slice 1 with n of slice 2."""
    if listed := _HOST_GROUPS.search(attributes):
        return _lists(listed.group(1))
    products = _HOST_PRODUCTS.findall(attributes) if "_xla_megascale_target" in attributes else None
    if products is None:
        return None
    return [
        [FIRST_OF_SLICE * int(part) + n for part in slices.split(",")]
        for slices, first, last in products
        for n in range(int(first), int(last) + 1)
    ]


def _partition_groups(attributes: str) -> Groups:
    """Partition ids, in one of XLA's notations: lists, a reshaped and transposed range, axes of a mesh of XLA's own.

    Empty where all take part.
    """
    if iota := _IOTA_GROUPS.search(attributes):
        return _iota(iota.group(1))
    if over := _MESH_GROUPS.search(attributes):
        return _mesh_groups(*over.groups())
    listed = _LISTED_GROUPS.search(attributes)
    return _lists(listed.group(1)) if listed else []


def _lists(text: str) -> list[list[int]]:
    return [[int(n) for n in re.findall(r"\d+", group)] for group in re.findall(r"\{([^{}]+)\}", text)]


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)` is the range 0..7 as [4, 2], transposed, as [2, 4]. Without `<=` it stays flat."""
    match = _IOTA.fullmatch(text)
    assert match, text
    target, dims, order = ([int(n) for n in part.split(",")] if part else [] for part in match.groups())
    numbers = np.arange(math.prod(target)).reshape(dims or target)
    numbers = numbers.transpose(order) if order else numbers
    return numbers.reshape(target) if dims else numbers.ravel()


def _mesh_groups(mesh: str, ids: str | None, over: str) -> np.ndarray:
    """`'x'=4,'y'=2` and `'x':(2)2,'y'`: over y and the part of x that has 2 of its devices, with 2 before it."""
    sizes = {name: int(size) for name, size, _, _ in _MESH_AXIS.findall(mesh)}
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, _, before, size in _MESH_AXIS.findall(over):
        parts[name].append((int(before or 1), int(before or 1) * int(size or sizes[name])))
    shape, inside = [], []
    for name, size in sizes.items():
        cuts = sorted({1, size, *(cut for part in parts[name] for cut in part)})
        for low, high in pairwise(cuts):
            shape.append(high // low)
            inside.append(any(start <= low < end for start, end in parts[name]))
    if ids is None:
        numbers = np.arange(math.prod(shape))
    else:
        numbers = _iota(ids) if ids.startswith("[") else np.array([int(n) for n in ids.split(",")])
    order = sorted(range(len(shape)), key=lambda n: inside[n])
    devices = math.prod(size for size, is_inside in zip(shape, inside, strict=True) if is_inside)
    return numbers.reshape(shape).transpose(order).reshape(-1, devices)
