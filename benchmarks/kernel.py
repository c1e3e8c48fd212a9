"""The kernel beside cuBLAS float16 and, where they can be imported, vLLM's Marlin and Machete and Humming.

    python benchmarks/kernel.py OUT.json [--shapes 8B.o,8B.qkv] [--batches 1,16,64] [--as 8.0]

What `marlin-convert bench kernel` measures, as JSON, and which part of its time a product takes at the
rates of memory and tensor cores; with vLLM's kernels where vLLM is not installed:
VLLM_C names its _C_stable_libtorch.abi3.so, out of its wheel; Humming's wheel is unpacked on PYTHONPATH.
`--as` runs the kernels that a GPU of another compute capability would be given: those of mma.sync run on any.
"""

import argparse
import json
import os
from importlib import import_module
from pathlib import Path

import torch

from marlin_convert.bench.kernel import BATCHES
from marlin_convert.bench.measurements import cell_line, means
from marlin_convert.bench.multipliers import ours, peers
from marlin_convert.bench.shapes import LAYERS, find
from marlin_convert.bench.timing import Cell, ceilings, measure
from marlin_convert.kernels.configurations import choose

GROUP = 128


def main() -> None:
    """Measure, print, and write everything to OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shapes", default=",".join(shape.name for shape in LAYERS))
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--as", dest="capability", help="as with this compute capability")
    chosen = parser.parse_args()
    if chosen.capability:
        major, minor = map(int, chosen.capability.split("."))
        # the module, which has the name of its function
        module = import_module("marlin_convert.kernels.matmul")
        module.choose = lambda *given: choose(*given[:5], (major, minor), *given[6:])
    library = os.environ.get("VLLM_C")
    mine, _ = ours(GROUP)
    others, missing = peers(Path(library) if library else None)
    for name, why in missing.items():
        print(f"without {name}: {why}")
    cells: list[Cell] = []
    us: dict[str, dict[int, dict[str, float]]] = {}
    for name in chosen.shapes.split(","):
        batches = [int(word) for word in chosen.batches.split(",")]
        for cell in measure(find(name), batches, (*mine, *others), GROUP, torch.device("cuda:0")):
            cells.append(cell)
            us.setdefault(name, {})[cell.batch] = cell.us
            print(cell_line(cell), flush=True)
        device = torch.cuda.get_device_name()
        chosen.out.write_text(json.dumps({"device": device, "torch": torch.__version__, "us": us}, indent=1))
    print("geometric mean of the speed-ups over cuBLAS float16 (least-most)")
    names = [one.name for one in (*mine, *others)]
    print("\n".join(means(cells, names)))
    reached = ceilings()
    print(
        f"share of the floor, at {reached.bandwidth / 1e12:.2f} TB/s and {reached.compute / 1e12:.0f} TFLOP/s"
    )
    print("\n".join(means(cells, names, reached.share)))


if __name__ == "__main__":
    main()
