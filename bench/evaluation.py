"""Batched evaluation against one row at a time: the tiny checkpoint on all five scenes benchmarks, answers only.

python bench/evaluation.py [--rows 100] [--batch-size 32] [--rounds 3]

Both sides answer the same rows with the same code; rounds alternate, and the ratio is that of the medians. Processor
time and wall-clock time are both printed: other jobs on the machine disturb the second.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from agevlm.data.scenes.build import build_scenes
from agevlm.evaluation.generate import generate_predictions
from agevlm.evaluation.run import choose, load_scenes
from agevlm.models import load
from agevlm.training.parts import COLORS, NAMES


TINY = Path(__file__).resolve().parent.parent / "checkpoints" / "agevlm-tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100, help="of each benchmark")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, processor = load(TINY, ours=True)
    benchmarks = choose(["all"])
    with tempfile.TemporaryDirectory() as folder:
        scenes = build_scenes(
            Path(folder) / "scenes", captions=1, instructions=1, test=options.rows, max_objects=3, names=NAMES,
            colors=COLORS, progress=False,
        )  # fmt: skip
        data = load_scenes(scenes, "composition", benchmarks)

        def answer(benchmark, batch_size: int, name: str) -> tuple[list[str], float, float]:
            wall, processor_time = time.perf_counter(), time.process_time()
            lines, _ = generate_predictions(
                model, processor, benchmark, data[benchmark.name], Path(folder) / name / benchmark.name,
                identity={}, batch_size=batch_size, progress=False,
            )  # fmt: skip
            outputs = [line["output"] for line in lines]
            return outputs, time.perf_counter() - wall, time.process_time() - processor_time

        total = {"wall": [0.0, 0.0], "processor": [0.0, 0.0]}
        for benchmark in benchmarks:
            answer(benchmark, options.batch_size, "warm")
            times: dict[str, list[list[float]]] = {"wall": [[], []], "processor": [[], []]}
            for round_number in range(options.rounds):
                found = []
                for side, size in enumerate((1, options.batch_size)):
                    outputs, wall, busy = answer(benchmark, size, f"{round_number}-{size}")
                    times["wall"][side].append(wall)
                    times["processor"][side].append(busy)
                    found.append(outputs)
                assert found[0] == found[1], "batches answer otherwise than single rows"
            rows, words = len(data[benchmark.name]), sum(len(output.split()) for output in found[1])
            parts = [f"{benchmark.name:15s} {rows} rows, {words / rows:.1f} words an answer"]
            for kind, sides in times.items():
                one, batched = (statistics.median(side) for side in sides)
                total[kind][0] += one
                total[kind][1] += batched
                ms = f"{1000 * one / rows:.1f} -> {1000 * batched / rows:.1f} ms a row"
                parts.append(f"{kind}: {ms}, {one / batched:.2f} times")
            print("; ".join(parts))
        for kind, (one, batched) in total.items():
            print(f"all five, {kind}: {one:.1f} s one by one, {batched:.1f} s batched: {one / batched:.2f} times")


if __name__ == "__main__":
    main()
