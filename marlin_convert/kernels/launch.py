"""Launch a compiled kernel on the current stream of a device, through the CUDA driver.

Plain ctypes: 5 microseconds of the host a launch, and the attribute by which a kernel may begin to load its
weights while the one before still runs (programmatic dependent launch), which cuda-core 1.2 does not pass on.

The driver copies what a launch points at before it returns: until then all of it belongs to the launch. Any
number of threads may launch, on any streams and devices.
"""

import ctypes
import struct
import sys
from collections.abc import Mapping, Sequence
from ctypes import addressof, c_char, c_int, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from marlin_convert.errors import KernelError
from marlin_convert.kernels.compile import architecture, cubin
from marlin_convert.kernels.configurations import (
    FEATURES,
    LARGEST_CLUSTER,
    Beside,
    Configuration,
    schedule,
)

# of cuda.h
MAX_DYNAMIC_SHARED_MEMORY = 8
CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6
UINT32, UINT64, FLOAT16, BFLOAT16 = 2, 5, 6, 9
BYTES = {UINT32: 4, UINT64: 8, FLOAT16: 2, BFLOAT16: 2}
NO_SWIZZLE, SWIZZLE_128 = 0, 3
PROMOTE_256 = 3

# Tensor maps of activations that are kept for the next launch with the same.
KEPT = 4096

TICKETS = 32  # of a block of the grid, as in csrc/tiles.cuh


@dataclass(frozen=True, eq=False)
class Loaded:
    """A kernel in memory: its handle, which has no hash, and what each launch of it needs."""

    handle: c_void_p
    configuration: Configuration | Beside
    processors: int
    early: bool  # may begin while the kernel before it ends


@cache
def _driver() -> ctypes.PyDLL:
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise KernelError(
            "this Python runs without its global lock, and the kernels' launches were never tested so.",
            "use the ordinary build of Python, or set PYTHON_GIL=1.",
        )
    try:
        return ctypes.PyDLL("libcuda.so.1")  # gives up the lock for no launch: it takes 3 microseconds
    except OSError as error:
        raise KernelError("the NVIDIA driver is not installed.", "pass --device cpu.") from error


def _check(status: int, doing: str) -> None:
    if status:
        raise KernelError(
            f"the CUDA driver failed with status {status} {doing}.", "update the NVIDIA driver."
        )


def capability(device: int | None) -> tuple[int, int]:
    """The compute capability of a GPU; KernelError for one that there is no code for."""
    found = torch.cuda.get_device_capability(device)
    architecture(found)
    return found


@cache
def load(configuration: Configuration | Beside, device: int) -> Loaded:
    """Compile a configuration for a device, if that was not done yet, and load it."""
    driver = _driver()
    torch.cuda.current_stream(device)  # makes sure that there is a context
    code = cubin(configuration, architecture(capability(device)))
    library, kernel = c_void_p(), c_void_p()
    _check(
        driver.cuLibraryLoadData(ctypes.byref(library), code, None, None, 0, None, None, 0),
        "loading a kernel",
    )
    name = configuration.entry.encode()
    _check(driver.cuLibraryGetKernel(ctypes.byref(kernel), library, name), "looking for a kernel")
    memory = configuration.shared_memory
    _check(
        driver.cuKernelSetAttribute(MAX_DYNAMIC_SHARED_MEMORY, memory, kernel, device),
        f"asking for {memory} bytes of shared memory",
    )
    properties = torch.cuda.get_device_properties(device)
    return Loaded(kernel, configuration, properties.multi_processor_count, properties.major >= 9)


def tensor_map(
    address: int, kind: int, rows: int, columns: int, box: tuple[int, int], swizzle: int, pitch: int = 0
) -> tuple[int, ctypes.Array[c_char]]:
    """The tensor map of a matrix that is read in boxes of (rows, columns): where it is, and its memory.

    `pitch` is how many elements its rows are apart, if not `columns`.
    """
    memory = (c_char * 192)()
    place = -(-addressof(memory) // 64) * 64
    status = _driver().cuTensorMapEncodeTiled(
        c_void_p(place), kind, 2, c_void_p(address), (c_uint64 * 2)(columns, rows),
        (c_uint64 * 1)((pitch or columns) * BYTES[kind]), (c_uint32 * 2)(box[1], box[0]),
        (c_uint32 * 2)(1, 1), 0, swizzle, PROMOTE_256, 0,
    )  # fmt: skip
    _check(status, "describing a matrix")
    return place, memory


# Of activations alone, by all that they say. Who takes one from here holds its memory while it is launched.
_tensor_maps: dict[tuple[int, ...], tuple[int, ctypes.Array[c_char]]] = {}
_keeping = Lock()


def _map_of_activations(
    address: int, kind: int, m: int, k: int, box: tuple[int, int]
) -> tuple[int, ctypes.Array[c_char]]:
    key = (address, kind, m, k, *box)
    found = _tensor_maps.get(key)
    if found is None:
        found = tensor_map(address, kind, m, k, box, SWIZZLE_128)
        with _keeping:
            keep(_tensor_maps, key, found, KEPT)
    return found


def keep(cache: dict[Any, Any], key: Any, value: Any, limit: int) -> None:
    """Put a value into a cache, in place of its oldest one if it is full."""
    if len(cache) >= limit and key not in cache:
        cache.pop(next(iter(cache)))
    cache[key] = value


# Parts of tiles and tickets, by device, stream and size: kernels of one stream follow one another.
_workspaces: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}

# Tickets for graphs, by device, cleared beforehand: every stream of a graph takes its own for good. Graphs
# may be replayed side by side, and clearing memory inside of one would take a microsecond.
_spare_tickets: dict[int, list[Tensor]] = {}
_graph_tickets: dict[tuple[int, int, int], Tensor] = {}
GRAPHS = 512


def workspace(device: torch.device, stream: int, loaded: Loaded, tokens: int) -> tuple[Tensor, Tensor]:
    """Parts of tiles of so many tokens, and cleared tickets, of kernels that follow one another."""
    size = 2 * loaded.processors * tokens * FEATURES
    count = loaded.processors * TICKETS
    if torch.cuda.is_current_stream_capturing():
        graph = (device.index, stream, _capture(stream))
        tickets = _graph_tickets.get(graph)
        if tickets is None:
            spare = _spare_tickets.get(device.index)
            tickets = spare.pop() if spare else torch.zeros(count, dtype=torch.int32, device=device)
            _graph_tickets[graph] = tickets
        return torch.empty(size, device=device), tickets
    if device.index not in _spare_tickets:
        cleared = torch.zeros(GRAPHS, count, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        _spare_tickets[device.index] = list(cleared)
    key = (device.index, stream, tokens)
    found = _workspaces.get(key)
    if found is None:
        cleared = torch.zeros(count, dtype=torch.int32, device=device)
        found = _workspaces[key] = torch.empty(size, device=device), cleared
    return found


def _launch(
    loaded: Loaded, blocks: int, stream: int, cluster: int
) -> tuple[ctypes.Array[c_char], ctypes.Array[c_int]]:
    """A CUlaunchConfig, and its attributes, which must live as long."""
    attributes = (c_int * 36)(PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
    attributes[18:23] = [CLUSTER_DIMENSION, 0, cluster, 1, 1]
    count = loaded.early * (1 + (cluster > 1))
    configuration = loaded.configuration
    launch = ctypes.create_string_buffer(
        struct.pack(
            "7I4xQQI4x", blocks, 1, 1, configuration.threads, 1, 1,
            configuration.shared_memory, stream, addressof(attributes), count,
        ),
        56,
    )  # fmt: skip
    return launch, attributes


def _cluster(loaded: Loaded, blocks: int, chunks: int, plan: Sequence[int]) -> int:
    """Blocks that sum up through each other's shared memory: those that share a tile, if all run at once.

    It is the only tile of each of them, and each has chunks of it. Narrow tiles are summed up so always.
    """
    whole, run, share, each, _ = plan
    only = run == chunks and not whole and each
    if loaded.configuration.kernel == "narrow":
        return share
    if loaded.configuration.kernel != "wgmma" or not only or not 2 <= share <= LARGEST_CLUSTER:
        return 1
    return share if _clusters(loaded, share) * share >= blocks else 1


@cache
def _clusters(loaded: Loaded, size: int) -> int:
    """How many clusters of so many blocks run at once."""
    launch, _attributes = _launch(loaded, size, 0, size)
    count = c_int()
    _check(
        _driver().cuOccupancyMaxActiveClusters(ctypes.byref(count), loaded.handle, launch),
        "counting clusters",
    )
    return count.value


def _capture(stream: int) -> int:
    """The number of the graph that a stream is being captured into; no other one ever has it."""
    state, number = c_int(), c_uint64()
    _check(
        _driver().cuStreamGetCaptureInfo_v2(
            c_void_p(stream), ctypes.byref(state), ctypes.byref(number), None, None, None
        ),
        "asking for the graph that is captured",
    )
    return number.value


class Launch:
    """A launch of a kernel with one block of numbers and addresses as its parameter, some of which change."""

    def __init__(
        self,
        loaded: Loaded,
        blocks: int,
        parameter: bytes,
        maps: Sequence[tuple[int, ctypes.Array[c_char]]] = (),
        kept: object = None,
    ):
        """Prepare it on the current stream of the current device, with tensor maps as further parameters.

        `kept` is what must live as long.
        """
        self._parameter = ctypes.create_string_buffer(parameter, len(parameter))
        places = [addressof(self._parameter), *(place for place, _ in maps)]
        self._pointers = (c_void_p * len(places))(*places)
        stream = torch.cuda.current_stream().cuda_stream
        self._launch, attributes = _launch(loaded, blocks, stream, 1)
        self._kept, self._handle = (attributes, maps, kept), loaded.handle
        self._start = _driver().cuLaunchKernelEx

    def __call__(self, addresses: Mapping[int, int]) -> None:
        """Launch with these addresses at these offsets of the parameter."""
        for offset, address in addresses.items():
            c_uint64.from_buffer(self._parameter, offset).value = address
        _check(self._start(self._launch, self._handle, self._pointers, None), "launching a kernel")


class Call:
    """A launch of which only the addresses of activations and output are still to come."""

    def __init__(
        self,
        configuration: Configuration,
        x: Tensor,
        B: Tensor,
        s: Tensor,
        bias: Tensor | None,
        B_meta: Tensor | None = None,
    ):
        """Prepare y (m, n) of x (m, k) on the current stream of x's device, which is the current device.

        `shape` and `strides` are those of y. All tensors are contiguous, on one device, and aligned to 16
        bytes; the parameters outlive the call.
        """
        m, k, n = x.numel() // x.shape[-1], x.shape[-1], s.shape[1]
        self.shape = *x.shape[:-1], n
        self.strides = torch.empty(self.shape, device="meta").stride()
        loaded = load(configuration, x.device.index)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        parts, tickets = self._parts_and_tickets = workspace(x.device, stream, loaded, configuration.tokens)
        across, token_tiles = -(-n // configuration.features), -(-m // configuration.tokens)
        chunks = configuration.chunks(k)
        blocks, *plan = schedule(configuration, across * token_tiles, chunks, loaded.processors)
        cluster = _cluster(loaded, blocks, chunks, plan)
        problem = ctypes.create_string_buffer(
            struct.pack(
                "8Q11i4x", B.data_ptr(), 0, s.data_ptr(), 0 if bias is None else bias.data_ptr(), 0,
                parts.data_ptr(), tickets.data_ptr(), 0 if B_meta is None else B_meta.data_ptr(),
                m, n, k, across, token_tiles, chunks, *plan,
            ),
            112,
        )  # fmt: skip
        self._x, self._y = c_uint64.from_buffer(problem, 8), c_uint64.from_buffer(problem, 32)
        arguments = [addressof(problem)]
        maps: list[tuple[int, ctypes.Array[c_char]]] = []
        self._tiles: tuple[int, int, int, tuple[int, int]] | None = None
        self._memory: ctypes.Array[c_char] | None = None  # of the map of activations
        if configuration.on_hopper:
            kind = BFLOAT16 if x.dtype == torch.bfloat16 else FLOAT16
            self._tiles = kind, m, k, (configuration.tokens, 64)
            # Boxes of whole chunks: what the last one has beyond k arrives as zeros. As metadata these are no
            # two rows of a quad, but of one that is zeros as well.
            box = configuration.code_rows, configuration.features
            maps.append(tensor_map(B.data_ptr(), UINT64, len(B), n, box, NO_SWIZZLE))
            if B_meta is None:
                maps *= 2  # that of the metadata is not read then
            else:
                maps.append(tensor_map(B_meta.data_ptr(), UINT32, len(B), n, box, NO_SWIZZLE))
            box = configuration.scale_rows, configuration.features
            maps.append(tensor_map(s.data_ptr(), FLOAT16, len(s), n, box, NO_SWIZZLE))
            arguments += [*(place for place, _ in maps), 0]
        self._pointers = (c_void_p * len(arguments))(*arguments)
        self._launch, attributes = _launch(loaded, blocks, stream, cluster)
        # all that the launch points at lives as long as it
        self._kept, self._handle = (problem, attributes, maps), loaded.handle
        self._driver = _driver().cuLaunchKernelEx
        self._lock = Lock()

    def __call__(self, x: int, y: int) -> None:
        """Launch for activations and an output at these addresses, on the current device."""
        with self._lock:  # from setting the addresses until the driver has copied them
            self._y.value = y
            if self._x.value != x:  # those of the launch before stay, and their map
                self._x.value = x
                if self._tiles is not None:
                    self._pointers[4], self._memory = _map_of_activations(x, *self._tiles)
            status = self._driver(self._launch, self._handle, self._pointers, None)
        _check(status, "launching a kernel")
