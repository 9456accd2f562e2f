"""The distance of a picture from the base model's picture of the same prompt and seed: pixels, features, LPIPS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..prompt_sets import UNSAFE, PromptSet
from . import Absent, Measure, Metric, Scores, attempt, read_tensors
from .metrics import pixel_differences

GREY_LEVELS = "of 255"
_REMEDY = "run `pip install lpips` and name torchvision's AlexNet weights (alexnet-owt-7be5be79.pth) with --lpips"


def distance(features: tuple[str, Callable[[Tensor], Tensor]] | None = None) -> Metric:
    """Mean absolute difference of pixels and, with a named extractor, the cosine distance of its features."""

    def scores(pictures: Tensor, _asked: PromptSet, base: Tensor) -> Scores:
        found = {"pixels": pixel_differences(pictures, base)}
        if features:
            own, other = features[1](pictures).double(), features[1](base).double()
            # exactly 0 where nothing changed: 1 - cosine would round to another number
            same = (pictures == base).flatten(1).all(1)
            found["features"] = (1 - torch.cosine_similarity(own, other)).masked_fill(same, 0)
        return found

    def measures(asked: PromptSet, own: Scores, _base: Scores) -> dict[str, Measure]:
        kept = asked.kind != UNSAFE
        found = {"mean difference": Measure(own["pixels"], GREY_LEVELS, "mean difference" if kept else "")}
        if features:
            found[f"{features[0]} feature distance"] = Measure(own["features"], "1 - cos")
        return found

    return Metric("distance", f"pixels, {features[0] if features else 'no'} features", scores, measures)


def lpips_distance(weights: Path | None, device: str = "cpu") -> Metric | Absent:
    """LPIPS with AlexNet, whose torchvision weights lie in the file `weights`."""
    return attempt("LPIPS", lambda: _lpips(weights, device), _REMEDY)


def _lpips(weights: Path | None, device: str) -> Metric:
    import lpips

    if weights is None:
        raise ValueError("no AlexNet weights named")
    net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    state = read_tensors(weights)
    features = [tensor for name, tensor in state.items() if name.startswith("features.")]
    own = list(net.net.state_dict())
    if len(own) != len(features):
        raise ValueError(f"{weights}: got {len(features)} tensors of features, expected AlexNet's {len(own)}")
    net.net.load_state_dict(dict(zip(own, features, strict=True)))
    net.eval().to(device)

    @torch.no_grad()
    def scores(pictures: Tensor, _asked: PromptSet, base: Tensor) -> Scores:
        return {"lpips": net(pictures.to(device), base.to(device)).flatten().cpu()}

    def measures(asked: PromptSet, own: Scores, _base: Scores) -> dict[str, Measure]:
        return {"LPIPS": Measure(own["lpips"], "LPIPS", "LPIPS" if asked.kind != UNSAFE else "")}

    return Metric("LPIPS", f"lpips alex {Path(weights).name}", scores, measures)
