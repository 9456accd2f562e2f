"""Lets torchvision be imported where its wheel was built for CUDA and torch was not. The set-up copies this file into
the virtual environment, where a .pth file imports it whenever Python starts.

Such a torchvision cannot load its compiled operators and does without them. But it registers shapes for two of them,
and that needs the operators to be declared. Nothing calls them here: FLUX suppresses no boxes.
"""

import importlib.abc
import sys

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"  # torchvision/csrc/ops/nms.cpp
OPERATORS = ("torchvision::nms", "torchvision::qnms")


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing: it declares the operators when torchvision is first looked for, then steps aside."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in OPERATORS:
                torch.library.define(operator, SCHEMA)
        return None


sys.meta_path.insert(0, DeclareOperators())
