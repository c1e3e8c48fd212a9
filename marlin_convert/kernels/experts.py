"""The experts of a layer in four launches: tokens in order, gate and up, down, and the sums of the answers.

Where the activation is another than silu(gate) * up, gate and up are multiplied by themselves.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from marlin_convert.errors import KernelError
from marlin_convert.kernels.configurations import (
    FEATURES,
    Beside,
    Configuration,
    choose_for_experts,
)
from marlin_convert.kernels.launch import (
    FLOAT16,
    NO_SWIZZLE,
    UINT64,
    Launch,
    capability,
    keep,
    load,
    tensor_map,
    workspace,
)
from marlin_convert.kernels.matmul import KEPT_CALLS, shape_of

MOST = 512  # experts, of which csrc/route.cu counts tokens in shared memory
FEW = 32  # choices, as in csrc/gather.cuh; of tiles of at most 16 tokens
BATCH = 32  # bytes of a Batch of csrc/routing.cuh

# Where in csrc's Problem the addresses are that a call brings, and where it has a Routing.
X, Y, ROWS, TOKEN_TILES, BATCHES, ROUTING = 8, 32, 152, 160, 120, 176
# Those of a Routing.
INDEX, HERE, ORDER, PLACES, TO_BATCHES, TILES = range(0, 48, 8)


@dataclass(frozen=True, eq=False)
class Stack:
    """One matrix of every expert, in MARLIN's layout.

    B (experts, k / 16, 2n) int32, s (experts, groups, n) float16 and perhaps bias (experts, n): contiguous,
    or the same columns of tensors that are.
    """

    B: Tensor
    s: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        """KernelError when the tensors are not of one stack that the kernels can read."""
        if self.B.dim() != 3 or self.s.dim() != 3 or not 0 < len(self.B) == len(self.s) <= MOST:
            raise KernelError(
                f"B is {tuple(self.B.shape)} and s {tuple(self.s.shape)}; (experts, k / 16, 2n) and "
                f"(experts, groups, n) of at most {MOST} experts are meant."
            )
        shape_of(self.B[0], self.s[0])
        for name, one, width in (("B", self.B, 2), ("s", self.s, 1), ("bias", self.bias, 1)):
            if one is None:
                continue
            # the rows of every expert follow those of the one before
            rows = one.stride(-2) if one.dim() == 2 else one.stride(1)
            whole = one.dim() == 2 or one.stride(0) == one.shape[1] * rows
            if one.stride(-1) != 1 or not whole or rows != width * self.pitch or one.data_ptr() % 16:
                raise KernelError(f"{name} must be contiguous or columns of what is, aligned to 16 bytes.")

    @property
    def k(self) -> int:
        """Inputs of the matrix."""
        return 16 * self.B.shape[1]

    @property
    def n(self) -> int:
        """Outputs of the matrix."""
        return self.s.shape[2]

    @property
    def pitch(self) -> int:
        """Outputs that a row of what the tensors are columns of has."""
        return self.B.stride(1) // 2

    @property
    def group(self) -> int:
        """Rows of k per scale, 0 where one scale serves all."""
        return 0 if self.s.shape[1] == 1 else self.k // self.s.shape[1]


class GroupedExperts:
    """The experts of a layer on one GPU; weights are read, never written.

    `first` are gate and up, or up alone. `activation` makes (rows, inner) of their outputs side by side,
    (rows, inner of each); None is silu(gate) * up, in the same kernel.
    """

    def __init__(
        self, first: Sequence[Stack], down: Stack, activation: Callable[[Tensor], Tensor] | None = None
    ):
        """KernelError when the matrices do not fit each other."""
        kinds = {(one.k, one.n, one.group, one.pitch, len(one.B)) for one in first}
        inner, count = first[0].n, len(first[0].B)
        if len(kinds) != 1 or (down.k, len(down.B)) != (inner, count) or (not activation and len(first) != 2):
            shapes = ", ".join(str(tuple(one.B.shape)) for one in (*first, down))
            raise KernelError(
                f"B of {shapes}, and their groups, are not of gate, up and down of the same experts."
            )
        self.first, self.down, self.activation = tuple(first), down, activation
        self.count, self.device = count, down.B.device
        self._calls: dict[tuple[object, ...], _Call] = {}
        self._lock = Lock()

    def __call__(self, x: Tensor, index: Tensor, shares: Tensor, here: Tensor | None = None) -> Tensor:
        """The sums of the experts' answers to x (m, k) float16 or bfloat16, each times its share: (m, n).

        index (m, choices) int32 or int64 says which experts, any number that is none's goes nowhere; shares
        (m, choices) float32 or the type of x. With `here` (all experts,) int32 index is of all experts, and
        here[e] which of these that is, or -1.
        """
        self._check(x, index, shares, here)
        y = x.new_empty(len(x), self.down.n)
        if not len(x):
            return y
        with torch.cuda.device(self.device), self._lock:
            stream = torch._C._cuda_getCurrentRawStream(self.device.index)
            key = (
                *index.shape,
                x.dtype,
                index.dtype,
                shares.dtype,
                None if here is None else len(here),
                stream,
            )
            call = self._calls.get(key)
            capturing = torch.cuda.is_current_stream_capturing()
            if call is None or capturing:
                call = _Call(self, x, index, shares, here)
                if not capturing:
                    keep(self._calls, key, call, KEPT_CALLS)
            call(x.contiguous(), index.contiguous(), shares.contiguous(), here, y)
        return y

    def _check(self, x: Tensor, index: Tensor, shares: Tensor, here: Tensor | None) -> None:
        if x.dtype not in (torch.float16, torch.bfloat16) or x.dim() != 2 or x.shape[1] != self.first[0].k:
            raise KernelError(
                f"x is {tuple(x.shape)} {x.dtype}; float16 or bfloat16 (m, {self.first[0].k}) is meant.",
                "load the model with dtype='auto', or in float16.",
            )
        if index.dtype not in (torch.int32, torch.int64) or index.dim() != 2 or len(index) != len(x):
            raise KernelError(
                f"index is {tuple(index.shape)} {index.dtype}; integers ({len(x)}, choices) are meant."
            )
        if shares.shape != index.shape or shares.dtype not in (torch.float32, x.dtype):
            raise KernelError(
                f"shares are {tuple(shares.shape)} {shares.dtype}; {tuple(index.shape)} is meant."
            )
        if here is not None and (here.dtype != torch.int32 or not here.is_contiguous()):
            raise KernelError(f"here is {here.dtype}; int32 is meant.")
        for name, one in (("x", x), ("index", index), ("shares", shares), ("here", here)):
            if one is not None and one.device != self.device:
                raise KernelError(f"{name} is on {one.device}, the experts on {self.device}.")


class _Call:
    """Prepared launches for one number of tokens; the addresses are still to come."""

    def __init__(
        self, experts: GroupedExperts, x: Tensor, index: Tensor, shares: Tensor, here: Tensor | None
    ):
        m, choices = index.shape
        self.rows, self.inner, self.outputs = m * choices, experts.first[0].n, experts.down.n
        self.activation = experts.activation
        bfloat16, device = x.dtype == torch.bfloat16, experts.device.index
        first, last = choose_for_experts(
            self.rows, experts.count, (experts.first[0].group, experts.down.group), bfloat16,
            capability(device), experts.activation is None,
        )  # fmt: skip
        tiles = min(self.rows, experts.count) + self.rows // first.tokens
        tiles += load(first, device).processors  # blocks without work look up one all the same
        # what the launches hand each other, one after another: rows, places, how many tiles, batches
        self._places, self._tiles = 4 * self.rows, 8 * self.rows
        self._batches = -(-(self._tiles + 4) // 16) * 16
        self._room = self._batches + BATCH * tiles
        numbers = (self.rows, choices, experts.count if here is None else len(here), experts.count)
        route = struct.pack("=6Q6i", *[0] * 6, *numbers, first.tokens, int(index.dtype == torch.int64))
        # few choices are put in order by each block that needs them
        few = self.rows <= FEW and first.tokens <= 16
        counts = Beside("route", shared_memory=4 * 32 * experts.count)
        self._route = None if few else Launch(load(counts, device), 1, route)
        pairs: list[tuple[Stack, Stack | None]] = [(one, None) for one in experts.first]
        if experts.activation is None:
            pairs = [(experts.first[0], experts.first[1])]
        self._first = [
            _product(first, *pair, route, m, routed=number > 0 and not few)
            for number, pair in enumerate(pairs)
        ]
        routed = experts.activation is None
        self._last = _product(last, experts.down, None, route, self.rows, routed=routed)
        blocks = -(-self.outputs // 1024)
        combine = struct.pack(
            "=4Q4i", 0, 0, 0, 0, self.outputs, choices, blocks, int(shares.dtype == torch.float32)
        )
        self._combine = Launch(load(Beside("combine", bfloat16), device), m * blocks, combine)

    def __call__(self, x: Tensor, index: Tensor, shares: Tensor, here: Tensor | None, y: Tensor) -> None:
        room = torch.empty(self._room, dtype=torch.uint8, device=x.device)
        rows = room.data_ptr()
        places, tiles, batches = rows + self._places, rows + self._tiles, rows + self._batches
        order = {
            INDEX: index.data_ptr(), HERE: 0 if here is None else here.data_ptr(),
            ORDER: rows, PLACES: places, TO_BATCHES: batches, TILES: tiles,
        }  # fmt: skip
        routed = {TOKEN_TILES: tiles, BATCHES: batches}
        if self._route is None:
            first = {ROUTING + offset: address for offset, address in order.items()}
        else:
            self._route(order)
            first = {ROWS: rows, **routed}
        inner = x.new_empty(len(self._first), self.rows, self.inner)
        for product, into in zip(self._first, inner, strict=True):
            product({X: x.data_ptr(), Y: into.data_ptr(), **first})
        if self.activation is None:
            activated = inner
        else:
            activated = self.activation(torch.cat([*inner], -1)).contiguous()
        answers = x.new_empty(self.rows, self.outputs)
        self._last({X: activated.data_ptr(), Y: answers.data_ptr(), **routed})
        self._combine({0: answers.data_ptr(), 8: places, 16: shares.data_ptr(), 24: y.data_ptr()})


def _product(
    configuration: Configuration, one: Stack, up: Stack | None, route: bytes, m: int, *, routed: bool
) -> Launch:
    """The launch of a matrix of every expert, or of gate and up at once."""
    device = one.B.device
    loaded = load(configuration, device.index)
    stream = torch.cuda.current_stream(device).cuda_stream
    parts, tickets = workspace(device, stream, loaded, configuration.tokens)
    width = FEATURES // 2 if up else FEATURES
    both = (one, up or one)
    addresses = [
        [0 if tensor is None else tensor.data_ptr() for tensor in (stack.B, stack.s, stack.bias)]
        for stack in both
    ]
    (codes, scales, bias), others = addresses
    parameter = struct.pack(
        "=8Q3i4x9i4x6Q2i72s", codes, 0, scales, bias, 0, parts.data_ptr(), tickets.data_ptr(), 0,
        m, one.n, one.k, -(-one.n // width), 0, configuration.chunks(one.k), 0, 0, 0, 0, 0, 0, 0, *others,
        0, 0, one.pitch, int(routed), route,
    )  # fmt: skip
    maps = []
    if configuration.on_hopper:
        for kind, suffix, rows in (
            (UINT64, "B", configuration.code_rows),
            (FLOAT16, "s", configuration.scale_rows),
        ):
            for stack in both:
                tensor = getattr(stack, suffix)
                maps.append(
                    tensor_map(
                        tensor.data_ptr(), kind, tensor.shape[0] * tensor.shape[1], stack.n,
                        (rows, width), NO_SWIZZLE, stack.pitch,
                    )
                )  # fmt: skip
    return Launch(loaded, loaded.processors, parameter, maps, kept=(parts, tickets))
