"""The tensor kernels compared with the machine's limits: `python -m benchmarks.kernels`.

The limit is a plain copy in memory. They take turns in one run. Bandwidth counts each byte read and
each byte written. Granularity direction is compared with granularity tensor.
Writes benchmarks/results/kernels.md.
"""

from itertools import product

import click
import torch
from torch import Tensor

from benchmarks.machine import described
from benchmarks.results_file import write_measured
from benchmarks.timing import interleaved, median, spread, timed
from mergekit_metagpt.core.decision import Rule
from mergekit_metagpt.core.directions import merge_directions
from mergekit_metagpt.core.task_vectors import add_task_vectors, squared_norms

COEFFICIENTS = [0.5, 0.3, 0.2]
# Matrices of models of 0.5 B, 7 B and 70 B parameters.
SHAPES = ((1152, 1152), (3456, 1152), (4096, 4096), (4096, 11008), (8192, 8192))
EXPERTS = (2, 3, 6, 12)


def tensors(elements: int, dtype: torch.dtype, device: str, count: int = 3) -> list[Tensor]:
    """Return a base and experts that differ from it by noise."""
    torch.manual_seed(0)
    base = torch.randn(elements, device=device)
    experts = [base + 0.01 * torch.randn_like(base) for _ in range(count)]
    return [tensor.to(dtype) for tensor in (base, *experts)]


@click.command()
@click.option("--elements", default=1 << 26, show_default=True, help="of each tensor")
@click.option("--device", default="cpu", show_default=True)
@click.option("--rounds", default=15, show_default=True, help="after one that warms up")
def main(elements: int, device: str, rounds: int) -> None:
    """Time the kernels and write a table."""
    lines = ["| | ms | spread | GB/s | of the copy |", "|---|---|---|---|---|"]
    for dtype in (torch.bfloat16, torch.float32):
        base, *experts = tensors(elements, dtype, device)
        target, size, count = torch.empty_like(base), base.nbytes, len(experts)
        actions = {
            "copy": timed(lambda: target.copy_(base), 2 * size, device),  # noqa: B023
            "copy into a new tensor": timed(base.clone, 2 * size, device),
            "squared norms": timed(
                lambda: squared_norms(base, experts),  # noqa: B023
                (1 + count) * size,
                device,
            ),
            # With coefficients that sum to 1, the base is not read.
            "merge": timed(
                lambda: add_task_vectors(base, experts, COEFFICIENTS, out=target),  # noqa: B023
                (count + 1) * size,
                device,
            ),
            "merge into a new tensor": timed(
                lambda: add_task_vectors(base, experts, COEFFICIENTS),  # noqa: B023
                (count + 1) * size,
                device,
            ),
        }
        runs = interleaved(actions, rounds, str(dtype))
        copy = median(runs["copy"], "rate")
        for name, own in runs.items():
            rate, time_ = median(own, "rate"), median(own, "milliseconds")
            lines.append(
                f"| {name}, {str(dtype).removeprefix('torch.')} | {time_:.1f} "
                f"| {spread(own, 'milliseconds')} | {rate:.1f} | {100 * rate / copy:.0f} % |"
            )
    table = "\n".join([*lines, "", *_directions(device, rounds)])
    heading = (
        f"# The kernels\n\nA base and three experts of {elements / 1e6:.0f} M elements, {rounds} "
        f"interleaved rounds, medians; {described(device)}.\n"
        "Written by `python -m benchmarks.kernels`.\n\n"
    )
    text = f"{heading}{table}\n"
    print(text)
    write_measured("kernels.md" if device == "cpu" else "kernels-gpu.md", text)


def _directions(device: str, rounds: int) -> list[str]:
    """Return a table of granularity direction beside what granularity tensor takes."""
    lines = [
        "| `granularity: direction` | ms | spread | ms at `tensor` | ratio |",
        "|---|---|---|---|---|",
    ]
    for (rows, columns), count in product(SHAPES, EXPERTS):
        base, *experts = (
            t.view(rows, columns) for t in tensors(rows * columns, torch.bfloat16, device, count)
        )
        target, shares = torch.empty_like(base), [1 / count] * count

        def at_tensor(
            base: Tensor = base,
            experts: list[Tensor] = experts,
            out: Tensor = target,
            shares: list[float] = shares,
        ) -> None:
            squared_norms(base, experts)
            add_task_vectors(base, experts, shares, out=out)

        def at_direction(
            base: Tensor = base, experts: list[Tensor] = experts, out: Tensor = target
        ) -> None:
            merge_directions(base, experts, Rule([1.0] * len(experts)), out=out)

        label = f"{rows} x {columns}, {count} experts"
        actions = {
            "tensor": timed(at_tensor, 1, device),
            "direction": timed(at_direction, 1, device),
        }
        runs = interleaved(actions, max(3, rounds // 3), label)
        plain, ours = (median(runs[name], "milliseconds") for name in ("tensor", "direction"))
        lines.append(
            f"| {label} | {ours:.0f} | {spread(runs['direction'], 'milliseconds')} | {plain:.0f} "
            f"| {ours / plain:.1f} |"
        )
    return lines


if __name__ == "__main__":
    main()
