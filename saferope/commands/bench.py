"""`saferope bench`: the cost of protection on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from saferope_training.console import say

from .common import command

DEVICES = ("cpu", "cuda")
DTYPES = ("auto", "bfloat16", "float16", "float32")


@command()
def bench(
    out: Annotated[Path, typer.Option(help="Folder for bench.md, bench.json and bench.png.")] = Path("runs/bench"),
    resolution: Annotated[int, typer.Option(min=16, help="Pixels of a side.")] = 1024,
    heads: Annotated[int, typer.Option(min=1, help="Heads of the block; FLUX.1 has 24.")] = 24,
    critical: Annotated[float, typer.Option(min=0, max=1, help="Share of critical heads.")] = 1.0,
    concepts: Annotated[int, typer.Option(min=1, help="Concepts at once.")] = 1,
    rank: Annotated[int, typer.Option(min=2, max=64, help="Rank of the unsafe subspace.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    dtype: Annotated[
        str, typer.Option(help=f"{', '.join(DTYPES)}; auto: bf16 where the device has it, else fp32.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="cpu, or cuda: time every form of the turn on the GPU, and nothing else.")
    ] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds in which all forms take turns.")] = 5,
    curves: Annotated[bool, typer.Option(help="Also measure how the cost grows with each size.")] = True,
    count: Annotated[
        bool,
        typer.Option(
            "--count",
            help="Time nothing: count the cost of a step on a GPU, and compile its kernel, in count.md and count.json.",
        ),
    ] = False,
) -> None:
    """Time rotation, files, training and audits side by side, as a table and curves; needs 4 GB and some minutes.

    The table names the rows that this machine could not run. The block is a FLUX single block with random weights.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    if count:
        from saferope_benchmark.costs.counting import write

        return say(write(out))
    if device not in DEVICES:
        raise ValueError(f"--device: got {device!r}, expected one of {', '.join(DEVICES)}")
    import torch

    from saferope_benchmark.costs import making, on_gpu, report, rotation, whole, work
    from saferope_training.flux.models import cpu_has_bf16

    from .. import audit_cost

    torch.manual_seed(0)
    gpu = on_gpu.require_gpu() if device == "cuda" else None
    if dtype == "auto":
        dtype = "bfloat16" if gpu or cpu_has_bf16() else "float32"
    kind = getattr(torch, dtype)
    size = rotation.Size(resolution, heads, critical, concepts, rank, batch, kind)
    if gpu:
        widths = "rank {rank} and reach {reach}".format(**rotation.TRAINED)
        setting = f"on {gpu}, {resolution} x {resolution}, {heads} heads, {widths}, batch {batch}, {dtype}"
        found = [*on_gpu.rows(size, repeats), *whole.rows(size, repeats)]
        return say(report.write(out, found, {}, setting))
    rows = [*rotation.beside_the_block(size, repeats), *work.not_here(), *work.file_rows(repeats)]
    rows += [*making.rows(size, repeats), *work.start_rows(repeats), *audit_cost.rows(repeats)]
    grown = rotation.curves(size, repeats) if curves else {}
    setting = (
        f"{resolution} x {resolution}, {heads} heads, critical {critical:g}, concepts {concepts}, rank {rank}, batch "
        f"{batch}, {dtype}, median of {repeats} rounds"
    )
    say(report.write(out, rows, grown, setting))
