"""Which kernel multiplies how many tokens, with what tiles: the heuristics, and what they rest on.

A tile is 256 features by `tokens` tokens; every kernel works on chunks of 128 rows of k (csrc/tiles.cuh).
"""

from dataclasses import dataclass
from functools import cached_property

FEATURES = 256  # of a tile

# Shared memory that a block may have with compute capability 9.0.
HOPPER_MEMORY = 227 * 1024

# Registers a thread of the loading warps keeps on Hopper; the multiplying ones get the rest.
GIVEN = 40


@dataclass(frozen=True)
class Configuration:
    """A kernel for one number of tokens per tile and one group size.

    `group` is the rows of k per scale, 0 where one scale serves all of k. `teams` of four warps take chunks
    in turn; `wgmma` makes a team multiply as a warpgroup.
    """

    kernel: str
    tokens: int
    teams: int
    group: int
    bfloat16: bool
    wgmma: bool = False

    @property
    def entry(self) -> str:
        """The name of the CUDA function."""
        return f"marlin_{self.kernel}"

    @property
    def sources(self) -> tuple[str, ...]:
        """The files of csrc that make it, in order."""
        products = {
            "mma": ("mma_products.cuh",),
            "stream": ("wgmma_ptx.cuh", "wgmma_products.cuh") if self.wgmma else ("mma_products.cuh",),
            "wgmma": ("wgmma_ptx.cuh",),
        }
        return ("ptx.cuh", "numbers.cuh", "tiles.cuh", *products[self.kernel], f"{self.kernel}.cu")

    @property
    def threads(self) -> int:
        """Threads of a block: the teams and, where the copy engine loads, the warpgroup that drives it."""
        return 128 * self.teams + (0 if self.kernel == "mma" else 128)

    @property
    def scale_rows(self) -> int:
        """Rows of scales of a chunk."""
        return 128 // self.group if self.group else 1

    @cached_property
    def _stage(self) -> int:
        """Bytes of a stage: codes, activations and scales of a chunk, in whole swizzle patterns."""
        filled = 16384 + 256 * self.tokens + (512 * self.scale_rows if self.group else 0)
        return -(-filled // 1024) * 1024

    @property
    def _beside(self) -> int:
        """Bytes of shared memory beside the stages: sums or staging, and what alignment takes."""
        sums = 4 * self.teams * self.tokens * (FEATURES + 4)
        return {"mma": sums, "stream": sums + 2048, "wgmma": 2048 * self.teams + 2048}[self.kernel]

    @cached_property
    def stages(self) -> int:
        """Chunks that are in shared memory at once; a whole number for every team."""
        room = (HOPPER_MEMORY - self._beside) // (self._stage + 16)
        turns = self.teams if self.kernel == "stream" else 1
        return min(12, room) // turns * turns

    @cached_property
    def shared_memory(self) -> int:
        """Bytes of dynamic shared memory."""
        if self.kernel == "mma":
            return self._beside + 2 * 256 * self.teams * self.tokens
        return self._beside + self.stages * (self._stage + 16)

    @property
    def defines(self) -> dict[str, int]:
        """The macros that the sources are compiled with."""
        macros = {
            "TOKENS": self.tokens,
            "SPLITS": self.teams,
            "GROUP": self.group,
            "BF16": int(self.bfloat16),
            "WGMMA": int(self.wgmma),
        }
        if self.kernel != "mma":
            # registers a thread has at launch, in eights: those given up are shared out among the others
            launch = 65536 // self.threads // 8 * 8
            others = self.threads // 128 - 1
            taken = (launch * (others + 1) - GIVEN) // others // 8 * 8
            macros |= {"STAGES": self.stages, "GIVE": GIVEN, "TAKE": min(taken, 232)}
        return macros


# A layer of at most this many chunks is read in the time that summing its tiles takes: 8B qkv and o.
SMALL = 1024


def choose(m: int, n: int, k: int, group: int, bfloat16: bool, capability: tuple[int, int]) -> Configuration:
    """The configuration for m tokens of a layer with n outputs and k inputs.

    From a sweep on an H200 (benchmarks/RESULTS.md). Few tokens a tile make sums that are quickly added, but
    need the weights once for every tile: small layers want them, large ones do not. Microseconds:

    ======  ==============================  ==============================
    tokens  small or narrow                 large
    ======  ==============================  ==============================
    16      8B qkv: 8 a tile 10.1, 16 10.7  70B down: 8 54.6, 16 42.3
    32      8B down: 16 23.2, 32 27.4       70B down: 16 68.3, 32 53.2
    128     70B o: 64 38.2, 128 40.3        8B gate_up: 64 64.8, 128 57.5
    256     8B o: 64 22.3, 128 27.3         70B down: 64 210.7, 128 202.9
    ======  ==============================  ==============================
    """
    if capability != (9, 0):
        tokens = 8 if m <= 8 else 16 if m <= 16 else 32
        return Configuration("mma", tokens, 2, group, bfloat16)
    columns = -(-n // FEATURES)
    chunks = columns * (k // 128)
    if m <= 8 or (m <= 16 and chunks <= SMALL):
        return Configuration("stream", 8, 3, group, bfloat16)
    if m <= 16 or (m <= 32 and columns <= 24):
        return Configuration("stream", 16, 3, group, bfloat16)
    if m <= 32:
        return Configuration("stream", 32, 2, group, bfloat16, wgmma=True)
    few = chunks <= 3000 if m <= 128 else columns * -(-m // 128) <= 48
    return Configuration("wgmma", 64 if m <= 64 or few else 128, 2, group, bfloat16)


def blocks(tiles: int, chunks: int, processors: int) -> int:
    """Blocks of the grid for so many tiles of so many chunks each, on so many multiprocessors.

    One per multiprocessor; or a multiple of the tiles, which then are not split at odd places or not at all,
    where that leaves few idle: 8B gate_up takes 112 blocks (17.6 us and not 20.5), 70B o 128 of 132 (38.2 us
    and not 40.4 for 128 tokens), 8B qkv with 16 tokens 96 (10.1 us and not 11.5).
    """
    even = processors // tiles * tiles
    least = 0.8 if even == tiles else 0.7 if tiles * chunks <= 2 * SMALL else 0.95
    return even if even >= least * processors else processors
