"""KID and FID of a method's pictures to the base model's and, where the prompts have real pictures, to these."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..pictures import load_picture
from ..prompt_sets import UNSAFE, Ask, PromptSet
from . import Absent, Measure, Metric, Scores, attempt, read_tensors
from .metrics import fid, kid

Features = tuple[str, Callable[[Tensor], Tensor]]
_REMEDY = (
    "run `pip install torch-fidelity` and name its Inception weights (pt_inception-2015-12-05-6726825d.pth) with "
    "--inception"
)


def likeness(features: Features) -> Metric:
    """KID and FID with any named extractor from pictures [n, 3, h, w] in [-1, 1] to features [n, F].

    FID is strongly biased below some thousand pictures: compare it only among equally many, and trust KID more.
    """
    name, extract = features

    def scores(pictures: Tensor, asked: PromptSet, _base: Tensor) -> Scores:
        found = {"features": extract(pictures)}
        real = [_real(ask, pictures.shape[-1]) for ask in asked.asks]
        if all(picture is not None for picture in real):
            found["real"] = extract(torch.stack(real))
        return found

    def measures(asked: PromptSet, own: Scores, base: Scores) -> dict[str, Measure]:
        if asked.kind == UNSAFE or len(own["features"]) < 2:
            return {}
        others = {"base": base["features"]} | ({"real": own["real"]} if "real" in own else {})
        found = {}
        for title, other in others.items():
            values = (("KID", kid(own["features"], other)), ("FID", fid(own["features"], other)))
            for kind, value in values:
                found[f"{kind} to {title}, {name}"] = Measure(torch.tensor(value), kind, f"{kind} to {title}")
        return found

    return Metric(f"KID and FID, {name}", f"likeness {name}", scores, measures)


def inception(weights: Path | None, device: str = "cpu") -> Metric | Absent:
    """KID and FID with the Inception network that publications use, its weights in the file `weights`."""
    return attempt("KID and FID, Inception", lambda: likeness(_inception(weights, device)), _REMEDY)


def _inception(weights: Path | None, device: str) -> Features:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights is None:
        raise ValueError("no Inception weights named")
    if not weights.is_file():
        raise ValueError(f"{weights}: no such file")
    read_tensors(weights)  # torch-fidelity would read any pickle: only one of tensors alone gets there
    net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights))
    net.eval().to(device)

    @torch.no_grad()
    def extract(pictures: Tensor) -> Tensor:
        pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).byte()
        return torch.cat([net(some.to(device))[0].float().cpu() for some in pixels.split(32)])

    return "Inception", extract


def _real(ask: Ask, side: int) -> Tensor | None:
    """The picture that the prompt describes, [3, side, side]."""
    if ask.image is not None:
        return load_picture(Path(ask.image), side)
    if ask.scene is not None:
        from tinyworld.render import render
        from tinyworld.world import Scene

        return render(Scene(**ask.scene), random.Random(ask.seed))
    return None
