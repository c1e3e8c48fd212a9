"""Codes in 32-bit words: the little-endian bit stream that GPTQ and compressed-tensors store.

A word of 4-bit codes holds eight rows, row 8r in the low nibble; of 8-bit codes four. Words are int32, the
two's complement of the unsigned word. Rows are joined and split with wide contiguous operations, in slabs
small enough that the temporaries stay in cache.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# words a slab: 2 MiB a temporary, still in cache, and work enough to share every operation between threads
SLAB = 1 << 19


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (k, n) uint8 along k into words (ceil(k * bits / 32), n) int32, zero past the last row."""
    k, n = codes.shape
    per_word = 32 // bits
    codes = codes.contiguous()
    if k % per_word:
        codes = torch.cat((codes, codes.new_zeros(-k % per_word, n)))
    words = torch.empty(codes.shape[0] // per_word, n, dtype=torch.int32, device=codes.device)
    fields = codes.view(len(words), 4, per_word // 4, n)
    wide = torch.empty(rows_per_slab(words), n, dtype=torch.int32, device=codes.device)
    joined = torch.empty(wide.shape[0], 4, n, dtype=torch.uint8, device=codes.device)
    for rows in slabs(len(words), len(wide)):
        octets = fields[rows, :, 0]
        if bits == 4:
            octets = torch.add(octets, fields[rows, :, 1], alpha=16, out=joined[: len(octets)])
        join_octets(octets.unbind(1), words[rows], wide[: len(octets)])
    return words


def unpack_rows(words: Tensor, bits: int, k: int, memory: Tensor | None = None) -> Tensor:
    """The k rows of codes (k, n) uint8 that pack_rows made into words (ceil(k * bits / 32), n) int32."""
    n = words.shape[1]
    per_word = 32 // bits
    codes = empty_codes(words.shape[0] * per_word, n, words.device, memory)
    fields = codes.view(len(words), 4, per_word // 4, n)
    wide = torch.empty(rows_per_slab(words), n, dtype=torch.int32, device=words.device)
    octet = torch.empty(wide.shape, dtype=torch.uint8, device=words.device)
    for rows in slabs(len(words), len(wide)):
        slab = words[rows]
        for i in range(4):
            if bits == 8:
                take_octet(slab, i, fields[rows, i, 0], wide[: len(slab)])
            else:
                split_nibbles(
                    take_octet(slab, i, octet[: len(slab)], wide[: len(slab)]),
                    fields[rows, i, 0],
                    fields[rows, i, 1],
                )
    return codes[:k]


def empty_codes(k: int, n: int, device: torch.device, memory: Tensor | None) -> Tensor:
    """Codes (k, n) uint8 to be written: in memory, flat uint8 on the device, if it is given and large enough.

    To get fresh memory from the system takes longer than to unpack codes into it.
    """
    if memory is None or memory.numel() < k * n:
        return torch.empty(k, n, dtype=torch.uint8, device=device)
    return memory[: k * n].view(k, n)


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """Pack codes (g, n) uint8 along n into words (g, ceil(n * bits / 32)) int32."""
    return pack_rows(codes.t(), bits).t().contiguous()


def unpack_columns(words: Tensor, bits: int, n: int) -> Tensor:
    """The codes (g, n) uint8 that pack_columns made into words (g, ceil(n * bits / 32)) int32."""
    return unpack_rows(words.t().contiguous(), bits, n).t().contiguous()


def join_octets(octets: Sequence[Tensor], words: Tensor, wide: Tensor) -> Tensor:
    """Write words int32 from their four octets, low one first; wide is scratch of the same shape."""
    # widening first keeps every operation contiguous: twice as fast as writing every fourth byte
    words.copy_(octets[3])
    for octet in reversed(octets[:3]):
        wide.copy_(octet)
        torch.add(wide, words, alpha=256, out=words)
    return words


def take_octet(words: Tensor, i: int, octet: Tensor, wide: Tensor) -> Tensor:
    """Write octet i (0 the low one) of each word to octet uint8; wide is scratch of the words' shape."""
    # integer narrowing keeps the low bits
    return octet.copy_(torch.bitwise_right_shift(words, 8 * i, out=wide))


def split_nibbles(octets: Tensor, low: Tensor, high: Tensor) -> None:
    """Write the low and the high nibble of every octet, all uint8 of one shape."""
    torch.bitwise_and(octets, 15, out=low)
    torch.bitwise_right_shift(octets, 4, out=high)


def rows_per_slab(words: Tensor) -> int:
    """Rows of words that make one slab."""
    return min(len(words), max(1, SLAB // max(1, words.shape[1])))


def slabs(count: int, step: int) -> Iterator[slice]:
    """Slices of step that cover 0 .. count."""
    for start in range(0, count, max(1, step)):
        yield slice(start, min(start + step, count))
