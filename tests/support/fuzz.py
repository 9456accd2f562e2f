"""The loader of concept files under fire: files spoilt on purpose, each refused with a ValueError or found sound.

    python -m tests.support.fuzz --runs 1000000        # guided by coverage where atheris is installed (Linux), else by
    chance alone

An execution fails where anything but ValueError is raised, where it takes over 1 s of CPU time or over three times the
file and 64 MB of memory, where a message is not one printable line, and where the oracle finds what was accepted
unsound. The file that did it is kept as `crash-*` in --out.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

try:
    import atheris
except ImportError:  # not on every system; the same files then come by chance alone
    atheris = None

with atheris.instrument_imports(include=["saferope_core"]) if atheris else nullcontext():
    import saferope_core.concept.concept_file as loader

import torch

from .hostile import mutate, seeds
from .oracle import check

SECONDS, MEGABYTES, FACTOR = 1.0, 64, 3  # what an execution may take: CPU time; memory beside FACTOR times the file
LONGEST = 16_384  # bytes of a file; small ones are fast
FRESH = 0.3  # of the guided files start from a good one
LONGEST_LINE = loader.printable.__defaults__[0]


class Figures:
    """What was seen so far."""

    def __init__(self) -> None:
        self.runs = self.accepted = 0
        self.slowest = 0.0
        self.messages: set[str] = set()
        self.start, self.memory = time.time(), peak()

    def line(self) -> str:
        return json.dumps(
            {
                "runs": self.runs,
                "accepted": self.accepted,
                "kinds of refusal": len(self.messages),
                "slowest, CPU s": round(self.slowest, 3),
                "memory grown, MB": round((peak() - self.memory) / 2**20, 1),
                "minutes": round((time.time() - self.start) / 60, 1),
            }
        )


def peak() -> int:
    """The most memory this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def execute(data: bytes, figures: Figures) -> bool:
    """Feeds the loader once; whether it accepted. Raises AssertionError, or what the loader should not have raised."""
    before, start = peak(), time.process_time()
    try:
        concepts = loader.parse_concepts(data)
    except ValueError as error:
        concepts, told = None, loader.printable(error)
        assert told.isprintable() and len(told) <= 13 * LONGEST_LINE, told
        figures.messages.add("".join(c for c in told if c.isalpha())[:24])
    took = time.process_time() - start
    assert took <= SECONDS, f"{took:.2f} s"
    grown = peak() - before
    assert grown <= FACTOR * len(data) + MEGABYTES * 2**20, f"{grown / 2**20:.0f} MB for a file of {len(data)} bytes"
    figures.runs += 1
    figures.slowest = max(figures.slowest, took)
    if concepts is not None:
        figures.accepted += 1
        check(data, concepts)
    return concepts is not None


def by_chance(runs: int, seed: int, figures: Figures) -> None:
    """Spoilt good files, without guidance."""
    chance, good = random.Random(seed), seeds()
    for _ in range(runs):
        execute(mutate(chance.choice(good), chance)[:LONGEST], figures)


def guided(runs: int, seed: int, figures: Figures, out: Path, report: int) -> None:
    """By atheris: files that reach new branches of the loader are spoilt further. Ends the process."""
    corpus, good = Path(tempfile.mkdtemp(prefix="corpus-", dir=out)), seeds()
    for number, data in enumerate(good):
        (corpus / f"seed-{number}").write_bytes(data)

    def once(data: bytes) -> None:
        execute(data, figures)
        if figures.runs % report == 0:
            print(figures.line(), flush=True)

    def change(data: bytes, longest: int, number: int) -> bytes:
        chance = random.Random(number)
        data = (
            chance.choice(good) if chance.random() < FRESH else data
        )  # spoilt over and over, nothing is left to accept
        found = mutate(data, chance) if chance.random() < 0.9 else atheris.Mutate(data, longest)
        return found[:longest]

    arguments = ["fuzz", f"-runs={runs}", f"-seed={seed}", f"-max_len={LONGEST}", f"-artifact_prefix={out}/"]
    arguments += ["-verbosity=0", "-timeout=60", "-rss_limit_mb=4096", "-len_control=0", "-mutate_depth=2", str(corpus)]
    atheris.Setup(arguments, once, custom_mutator=change)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--report", type=int, default=1000, help="a line of figures every so many runs")
    parser.add_argument("--by-chance", action="store_true", help="without atheris")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for data in seeds():  # whatever is loaded on first use is no growth of memory
        assert check(data, loader.parse_concepts(data)) is None
    figures = Figures()
    if atheris and not given.by_chance:
        guided(given.runs, given.seed, figures, given.out, given.report)
    by_chance(given.runs, given.seed, figures)
    print(figures.line())


if __name__ == "__main__":
    main()
