"""Metrics as plug-ins: each reads pictures, keeps scores of every picture, and makes measures of many for a table.

A metric is made by a function of its file (`detector.detector()`, `clip.clip_score(folder)` ...). A metric whose
package or weights are missing becomes an `Absent`. Tables name it and say how to get it: nothing is left out silently.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from saferope_training.flux.folder import require_no_code

from ..prompt_sets import PromptSet

# Columns of the summary, which any metric may fill
SHOWN, KEPT, REST = "concept shown", "right", "rest of the prompt right"
WHOLE = "whole picture"

Scores = dict[str, Tensor]  # a name and [n] or [n, F], a row a picture


class Measure(NamedTuple):
    """One measure of the pictures of a set, for a table.

    `values`: bool [n] (counted: Wilson's interval, McNemar's p), float [n] (averaged) or one number []. `unit` is empty
    for shares in [0, 1]. `column`: where the summary shows it, if it does.
    """

    values: Tensor
    unit: str = ""
    column: str = ""


class Metric(NamedTuple):
    """`scores(pictures [n, 3, h, w] in [-1, 1], their prompt set, the base model's own pictures)` is kept on disk, raw.

    `aggregate(prompt set, scores of a method, scores of the base model)` makes measures of them by name. `needs` names
    all that decides the scores (weights, versions): when it changes they are made again.
    """

    name: str
    needs: str
    scores: Callable[[Tensor, PromptSet, Tensor], Scores]
    aggregate: Callable[[PromptSet, Scores, Scores], dict[str, Measure]]


class Absent(NamedTuple):
    """A metric or method that is not there, and how to get it."""

    name: str
    why: str


def attempt(name: str, make: Callable[[], Metric], remedy: str) -> Metric | Absent:
    """The metric, or why there is none, where a package or a file is missing."""
    try:
        return make()
    except (ImportError, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Absent(name, f"{reason}; {remedy}")


def require_plain_config(name: str) -> None:
    """ValueError where the config of a model of transformers, folder or hub id, names code; OSError where there is
    none.
    """
    from transformers import PretrainedConfig

    require_no_code(PretrainedConfig.get_config_dict(name)[0], f"model {name!r}: config.json")


def read_tensors(weights: Path) -> dict[str, Tensor]:
    """The tensors of a .pth file. Nothing else is unpickled: ValueError, one line, where the file holds other data."""
    try:
        return torch.load(weights, weights_only=True, map_location="cpu")
    except OSError:
        raise
    except Exception as error:  # any error that a broken or hostile pickle causes
        raise ValueError(
            f"{weights}: got a file that is no state dict of tensors, expected published weights"
        ) from error
