"""Which kernel multiplies how many tokens, with what tiles: the heuristics, and what they rest on.

A tile is 256 features by `tokens` tokens, and a chunk of it 128 rows of k, the last of which may have 64
(csrc/tiles.cuh); narrow tiles are 64 or 128 features, and their chunks 512, 256 or 128 rows (csrc/narrow.cu).
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

FEATURES = 256  # of a tile that is not narrow

# KiB of shared memory that a block may have, by compute capability: CUDA's programming guide.
SHARED_MEMORY = {
    **dict.fromkeys([(8, 0), (8, 7)], 163),
    **dict.fromkeys([(8, 6), (8, 9), (12, 0), (12, 1)], 99),
    **dict.fromkeys([(9, 0), (10, 0), (10, 3), (11, 0)], 227),
}
HOPPER_MEMORY = SHARED_MEMORY[9, 0] * 1024

# Chunks that are in shared memory at once where threads load: with more there is no room for blocks of the
# next kernel, which load their first weights early.
MOST_STAGES = 3

# Blocks that every GPU with clusters can run as one.
LARGEST_CLUSTER = 8

# Blocks that share a narrow tile at most, and what part of all multiprocessors may be busy with more than
# two: an H100's groups of multiprocessors have room for so many clusters at once.
NARROW_CLUSTER, IN_CLUSTERS = 4, 0.88

# Bytes that kernels for experts have beside what is asked for: the problem, and the order of few tokens.
STATIC = 2048

# Tokens of narrow tiles whose sums the blocks of a cluster send each other: those of more have no room at the
# other for all rows, and with places for its own alone it took longer than to fetch them.
MOST_SENT = 64

# Registers a thread of the loading warps keeps on Hopper; the multiplying ones get the rest.
GIVEN = 40


@dataclass(frozen=True)
class Configuration:
    """A kernel for one number of tokens per tile and one group size.

    `group` is the rows of k per scale, 0 where one scale serves all of k. `teams` of four warps multiply.
    `sparse` is for the Sparse-MARLIN layout. `experts` takes the tokens of many experts; `paired` too, and
    multiplies by the weights of gate and up at once. A block may have `memory` bytes of shared memory.
    A tile is of `columns` columns of 64 features.
    """

    kernel: str
    tokens: int
    teams: int
    group: int
    bfloat16: bool
    sparse: bool = False
    experts: bool = False
    paired: bool = False
    memory: int = HOPPER_MEMORY
    columns: int = 4

    @property
    def entry(self) -> str:
        """The name of the CUDA function."""
        return f"marlin_{self.kernel}"

    @property
    def sources(self) -> tuple[str, ...]:
        """The files of csrc that make it, in order."""
        in_registers = self.kernel in ("wgmma", "multistage")
        files = {
            **dict.fromkeys(("ptx.cuh", "numbers.cuh", "layout.cuh"), True),
            "routing.cuh": self.experts,
            "tiles.cuh": True,
            "gather.cuh": self.experts,
            "stages.cuh": self.kernel != "mma",
            "load_experts.cuh": self.experts and self.on_hopper,
            "wgmma_ptx.cuh": self.kernel in ("wgmma", "narrow"),
            "mma_ptx.cuh": self.kernel not in ("wgmma", "narrow"),
            "registers.cuh": in_registers,
            "mma_products.cuh": self.kernel in ("mma", "stream"),
            f"{self.kernel}.cu": True,
        }
        return tuple(name for name, needed in files.items() if needed)

    @property
    def on_hopper(self) -> bool:
        """Whether the copy engine loads."""
        return self.kernel in ("stream", "wgmma", "narrow")

    @property
    def threads(self) -> int:
        """Threads of a block: the teams and, where the copy engine loads, the warpgroup that drives it."""
        return 128 * (self.teams + self.on_hopper)

    @property
    def features(self) -> int:
        """Features of a tile."""
        return 64 * self.columns

    @cached_property
    def segments(self) -> int:
        """Segments of 128 rows of k of a chunk: many if three such chunks can be in shared memory at once."""
        if self.kernel != "narrow":
            return 1
        most = 4 // self.columns
        return most if 3 * (self._stage_of(most) + 16) <= self.memory - self._beside else most // 2

    @property
    def sends(self) -> bool:
        """Whether blocks that share a tile send each other sums; else each fetches them."""
        return self.tokens <= MOST_SENT

    @property
    def rows(self) -> int:
        """Rows of k of a chunk."""
        return 128 * self.segments

    def tiles(self, m: int, n: int) -> int:
        """The tiles of m tokens of a layer with n outputs."""
        return -(-n // self.features) * -(-m // self.tokens)

    def chunks(self, k: int) -> int:
        """The chunks of a layer with k inputs, a multiple of 64."""
        return -(-k // self.rows)

    @property
    def scale_rows(self) -> int:
        """Rows of scales of a chunk."""
        return self.rows // self.group if self.group else 1

    @property
    def code_rows(self) -> int:
        """Rows of B or, where it is sparse, B_24 of a chunk."""
        return self.rows // (32 if self.sparse else 16)

    @property
    def _pattern(self) -> int:
        """Bytes that stages are whole numbers of: the copy engine swizzles eight tokens."""
        return 1024 if self.on_hopper else 128

    @cached_property
    def _stage(self) -> int:
        """Bytes of a stage."""
        return self._stage_of(self.segments)

    def _stage_of(self, segments: int) -> int:
        """Bytes of a stage: codes, activations and scales of so many segments, in whole swizzle patterns."""
        codes = 3072 if self.sparse else 4096  # of 64 features, with metadata
        scales = 128 * 128 // self.group if self.group else 0
        filled = segments * (self.columns * (codes + scales) + 256 * self.tokens)
        return -(-filled // self._pattern) * self._pattern

    @property
    def _beside(self) -> int:
        """Bytes of shared memory beside the stages: sums, staging or flags, and what alignment takes."""
        sums = 4 * self.teams * self.tokens * (FEATURES + 4)
        beside = {"mma": sums, "stream": sums + 2048, "wgmma": 2048 * self.teams + 2048, "narrow": 1024 + 16}
        return beside.get(self.kernel, 0)

    @cached_property
    def stages(self) -> int:
        """Chunks that are in shared memory at once; a whole number for every team."""
        room = self.memory - self._beside - (STATIC if self.experts else 0)
        if self.kernel == "multistage":
            return min(MOST_STAGES, room // self._stage)
        turns = self.teams if self.kernel == "stream" else 1
        return min(12, room // (self._stage + 16)) // turns * turns

    @property
    def fits(self) -> bool:
        """Whether one chunk can be multiplied while another is loaded."""
        return self.kernel == "mma" or self.stages >= 2

    @cached_property
    def shared_memory(self) -> int:
        """Bytes of dynamic shared memory."""
        if self.kernel == "mma":
            return self._beside + 2 * 256 * self.teams * self.tokens
        if self.kernel == "multistage":
            return self.stages * self._stage
        return self._beside + self.stages * (self._stage + 16)

    @property
    def defines(self) -> dict[str, int]:
        """The macros that the sources are compiled with."""
        macros = {
            "TOKENS": self.tokens,
            "SPLITS": self.teams,
            "GROUP": self.group,
            "BF16": int(self.bfloat16),
            "SPARSE": int(self.sparse),
            "EXPERTS": int(self.experts),
            "PAIRED": int(self.paired),
            "COLUMNS": self.columns,
            "SEGMENTS": self.segments,
            "LARGEST_CLUSTER": LARGEST_CLUSTER,
            "NARROW_CLUSTER": NARROW_CLUSTER,
            "SENDS": int(self.sends),
            "LOADERS": 256 if self.kernel == "multistage" else 128,
            "PATTERN": self._pattern,
            "STAGES": self.stages,
        }
        if self.on_hopper:
            # registers a thread has at launch, in eights: those given up are shared out among the others
            launch = 65536 // self.threads // 8 * 8
            others = self.threads // 128 - 1
            taken = (launch * (others + 1) - GIVEN) // others // 8 * 8
            macros |= {"GIVE": GIVEN, "TAKE": min(taken, 232)}
        return macros


@dataclass(frozen=True)
class Beside:
    """A kernel beside those that multiply: `route` puts tokens in order, `combine` sums answers up.

    `shared_memory` are the bytes that a block is given.
    """

    kernel: str
    bfloat16: bool = False
    shared_memory: int = 0

    @property
    def entry(self) -> str:
        """The name of the CUDA function."""
        return f"marlin_{self.kernel}"

    @property
    def sources(self) -> tuple[str, ...]:
        """The files of csrc that make it, in order."""
        return ("ptx.cuh", "numbers.cuh", "routing.cuh", f"{self.kernel}.cu")

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return {"route": 1024, "combine": 128}[self.kernel]

    @property
    def defines(self) -> dict[str, int]:
        """The macros that the sources are compiled with."""
        return {"BF16": int(self.bfloat16), "SPARSE": 0}


# Tokens of the tiles that sums in registers are of.
TILES = (16, 32, 48, 64, 96, 128)

# The same of narrow tiles, by their columns of 64 features.
NARROW_TILES = {1: (8, 16, 24, 32, 48, 64), 2: (8, 16, 24, *TILES[1:])}

# What a tile's chunk takes whatever tokens it has, in tokens; and in chunks what it takes to sum up a tile
# that several blocks share, and what more if their shares are no parts of one tile alone.
OF_A_TILE, TO_SUM_UP, UNEVEN = 65, 10, 4

# The same of narrow tiles: of a chunk as large as the others', by columns, and of summing up in a cluster, by
# whether sums are sent; each with what a token takes.
NARROW_CHUNK, TO_SUM_UP_NARROW = {1: (45, 1.25), 2: (48, 1.0)}, {True: (25, 1.4), False: (150, 1.4)}

# What `stream` takes to sum up a tile, with what each token takes.
TO_SUM_UP_STREAM = 54, 28

# What memory takes for a chunk of a block on every multiprocessor, in the same unit.
FROM_MEMORY = 73


@lru_cache(4096)  # a tenth of a millisecond, for each layer of a model the same
def choose(
    m: int,
    n: int,
    k: int,
    group: int,
    bfloat16: bool,
    capability: tuple[int, int],
    sparse: bool = False,
    processors: int = 132,
) -> Configuration:
    """The configuration for m >= 1 tokens of a layer with n outputs and k inputs, on so many multiprocessors.

    From sweeps on an H100 (benchmarks/RESULTS.md), which can run all of these kernels: the one with the least
    `cost`. Where there is no Hopper up to 8 tokens, or 16 of a large layer, go to the one whose teams of
    warps take chunks in turn: they wait least for one another.
    """
    memory = SHARED_MEMORY[capability] * 1024
    few = Configuration("mma", 8 if m <= 8 else 16, 2, group, bfloat16, sparse, memory=memory)
    if capability == (9, 0):
        tiles = [("wgmma", tokens, 2, 4) for tokens in TILES]
        tiles += [("narrow", tokens, 2, columns) for columns, of in NARROW_TILES.items() for tokens in of]
        if m <= (8 if sparse else 16):
            tiles.append(("stream", few.tokens, 2 if sparse else 3, 4))
    elif m <= 8 or (m <= 16 and few.tiles(m, n) * few.chunks(k) > 3000):
        return few
    else:
        tiles = [("multistage", tokens, 2, 4) for tokens in TILES]
    found = [
        Configuration(kernel, tokens, teams, group, bfloat16, sparse, memory=memory, columns=columns)
        for kernel, tokens, teams, columns in tiles
    ]
    return min(
        (one for one in found if one.fits and (one.kernel != "narrow" or one.tiles(m, n) <= processors)),
        key=lambda one: cost(one, m, n, k, processors),
    )


def cost(configuration: Configuration, m: int, n: int, k: int, processors: int) -> float:
    """What the block with most to do takes for its part of m tokens of an (n, k) layer, in tokens.

    That is the work of one chunk of one token, 8 ns on an H100.
    """
    tiles, chunks = configuration.tiles(m, n), configuration.chunks(k)
    blocks, whole, run, share, each, more = schedule(configuration, tiles, chunks, processors)
    longest, tokens = whole * chunks + each + bool(more), configuration.tokens
    memory = FROM_MEMORY * blocks / processors  # which GPUs have in proportion to these
    uneven = bool(run) and run != chunks
    shared = uneven or share > 1
    if configuration.kernel == "narrow":
        fixed, of_token = NARROW_CHUNK[configuration.columns]
        chunk = max(fixed + of_token * tokens, memory) * configuration.columns * configuration.segments / 4
        fixed, of_token = TO_SUM_UP_NARROW[configuration.sends]
        return longest * chunk + shared * (fixed + of_token * tokens)
    if configuration.kernel == "stream":
        fixed, of_token = TO_SUM_UP_STREAM
        return longest * memory + shared * (fixed + of_token * min(m, tokens))
    return longest * (OF_A_TILE + tokens) + (shared * TO_SUM_UP + uneven * UNEVEN) * tokens


# Kernel, tokens and teams of tiles of an expert's tokens: from a sweep on an H100 (benchmarks/RESULTS.md).
EXPERT_TILES = [
    *(("stream", 8, 3), ("stream", 16, 3), ("stream", 24, 2)),
    *(("wgmma", tokens, 2) for tokens in (32, 48, 64, 80, 96, 128, 144)),
]

# The same where mma.sync multiplies: chosen by the same rule, not swept.
EXPERT_TILES_OF_MMA = [
    *(("mma", tokens, 2) for tokens in (8, 16)),
    *(("multistage", tokens, 2) for tokens in (32, 64, 96, 128)),
]


def choose_for_experts(
    rows: int, experts: int, groups: tuple[int, int], bfloat16: bool, capability: tuple[int, int], fused: bool
) -> tuple[Configuration, Configuration]:
    """The configurations for gate and up, together if `fused`, and for down.

    `rows` tokens in all go to `experts` experts; `groups` are the rows of k per scale, 0 for one scale.
    """
    each = rows / min(rows, experts)  # of an expert, if they went to all of them alike
    most = each + 1.4 * each**0.5  # of all but a few
    memory = SHARED_MEMORY[capability] * 1024

    def both(kernel: str, tokens: int, teams: int) -> tuple[Configuration, Configuration]:
        up, down = (
            Configuration(kernel, tokens, teams, group, bfloat16, experts=True, memory=memory)
            for group in groups
        )
        return replace(up, paired=fused), down

    kinds = EXPERT_TILES if capability == (9, 0) else EXPERT_TILES_OF_MMA
    kinds = [kind for kind in kinds if all(one.fits for one in both(*kind))]
    return both(*min(kinds, key=lambda kind: math.ceil(most / kind[1]) * (OF_A_TILE + kind[1])))


def schedule(configuration: Configuration, tiles: int, chunks: int, processors: int) -> tuple[int, ...]:
    """How many blocks work on so many tiles of so many chunks each, and on which: Schedule in csrc/tiles.cuh.

    As many blocks as leave no tile to be shared, or each by the same number, where that keeps most
    multiprocessors busy: 8B gate_up takes 112 blocks (24.3 us for 32 tokens, 29.0 with 132), 70B qkv 120
    (20.1 us, 24.3), 2:4 and 512 tokens of 8B qkv 96 (28.1 us, 30.4). Else one for each. What wgmma multiplies
    fast takes long to sum up: no more than a cluster share a tile then, however few are busy (16 tokens of
    3072 x 3072: 5.7 us, 6.7 with 11 to a tile; 4096 x 1024: 5.4 with 32 blocks, 7.2 with 132). There
    are no more narrow tiles than processors, and a cluster's blocks share one.
    Returns blocks, whole, run, share, each and more.
    """
    if configuration.kernel == "narrow":
        share = min(NARROW_CLUSTER, processors // tiles, chunks)
        if share > 2:
            share = max(2, min(share, int(IN_CLUSTERS * processors) // tiles))
        if share == 1:
            return tiles, 1, 0, 1, 0, 0
        return share * tiles, 0, chunks, share, chunks // share, chunks % share
    busy = (0.7 if configuration.sparse else 0.8) * processors
    whole = -(-tiles // processors)
    if tiles % whole == 0 and tiles // whole >= (busy if whole == 1 else 0.95 * processors):
        return tiles // whole, whole, 0, 1, 0, 0
    share = processors // tiles
    if share * tiles >= busy:
        if configuration.kernel == "wgmma":
            share = min(share, LARGEST_CLUSTER)
        return share * tiles, 0, chunks, share, chunks // share, chunks % share
    whole = max(0, tiles // processors - 1)
    run = (tiles - whole * processors) * chunks
    return processors, whole, run, processors, run // processors, run % processors
