"""The tensor kernels compared with the machine's limits: `python -m benchmarks.kernels`.

The limit is a plain copy in memory, or for granularity direction a matrix product. They take turns
in one run. Bandwidth counts each byte read and each byte written.
Writes benchmarks/results/kernels.md.
"""

import click
import torch
from torch import Tensor

from benchmarks.machine import described
from benchmarks.results_file import write_measured
from benchmarks.timing import interleaved, median, spread, timed
from mergekit_metagpt.core.directions import Rule, merge_directions
from mergekit_metagpt.core.normal_equations import costs_of_matrix
from mergekit_metagpt.core.task_vectors import add_task_vectors, squared_norms

COEFFICIENTS = [0.5, 0.3, 0.2]
# Matrices of a model of 0.5 B parameters, and one that is much taller than wide.
SHAPES = ((1024, 1024), (1024, 2816), (2816, 1024), (8192, 512))
_PRODUCT = 2048


def tensors(elements: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return a base and three experts that differ from it by noise."""
    torch.manual_seed(0)
    base = torch.randn(elements, device=device)
    experts = [base + 0.01 * torch.randn_like(base) for _ in COEFFICIENTS]
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
    """Return a table of granularity direction: its float64 operations beside a product's."""
    lines = [
        "| `granularity: direction`, three experts | ms | spread | GFLOP/s | of the product |",
        "|---|---|---|---|---|",
    ]
    square = torch.randn(_PRODUCT, _PRODUCT, dtype=torch.float64, device=device)
    actions = {"float64 matrix product": timed(lambda: square @ square, 2 * _PRODUCT**3, device)}
    for rows, columns in SHAPES:
        base, *experts = (
            t.view(rows, columns) for t in tensors(rows * columns, torch.bfloat16, device)
        )
        for side in ("output", "input"):
            rule = Rule([1.0] * len(experts), 0.0, 0.01, side)
            operations, _ = costs_of_matrix(rows, columns, len(experts), side)

            def merge(
                base: Tensor = base, experts: list[Tensor] = experts, rule: Rule = rule
            ) -> object:
                return merge_directions(base, experts, rule)

            actions[f"{rows} x {columns}, {side}"] = timed(merge, int(operations), device)
    runs = interleaved(actions, max(3, rounds // 3), "direction")
    product = median(runs["float64 matrix product"], "rate")
    for name, own in runs.items():
        rate = median(own, "rate")
        lines.append(
            f"| {name} | {median(own, 'milliseconds'):.0f} | {spread(own, 'milliseconds')} "
            f"| {rate:.1f} | {100 * rate / product:.0f} % |"
        )
    return lines


if __name__ == "__main__":
    main()
