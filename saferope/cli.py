"""The command `saferope`. Everything heavy is imported inside the commands, so that help comes at once.

saferope train star --model tinyworld --out models/star
saferope evaluate models/star/star.safetensors --model tinyworld
"""

from __future__ import annotations

import logging
import warnings
from typing import Annotated

import typer

from saferope_training.console import guarded, say

from .commands import attack, audit, bench, evaluate, export, files, generate, proof, stages

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from saferope_core import __version__

        say(f"saferope {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """SafeRoPE for FLUX: make concept files that suppress unwanted content, and measure their effect."""


for name in ("prompts", "extract", "heads", "train", "calibrate"):
    app.command(name)(getattr(stages, name))
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("attack")(attack.attack)
app.command("generate")(generate.generate)
for name in ("inspect", "merge", "convert", "card"):
    app.command(name)(getattr(files, name))
app.command("audit")(audit.audit)
app.command("verify")(proof.verify)
app.add_typer(proof.keys, name="keys")
app.command("bench")(bench.bench)


def main() -> None:
    """Entry point of the console script."""
    # PyTorch warns of bf16 autocast over fp32 norms, which we want: the kernel is slower, the numbers are the same
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    # these libraries warn of kernels that this machine lacks
    for library in ("torchao", "bitsandbytes", "torch.utils._pytree", "diffusers.quantizers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    guarded(app)
