"""The authors' RotaryAdapter state dict (.pth) as a concept file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saferope_core import ROLES, THRESHOLD, Concept, Geometry, Roles, Stream, orthonormal, skew
from saferope_core.concept.untrusted import printable

MAX_BYTES = 256 * 2**20  # theirs has 30 MB at rank 20
_BASES = {"q": ("_U_query_cache_D", "_U_query_cache_S"), "k": ("_U_key_cache_D", "_U_key_cache_S")}
_DOUBLE, _SINGLE = "S_param_Double.", "S_param_Single."


def convert(path: Path, slug: str) -> Concept:
    """A concept that turns as the adapter was meant to.

    Their code multiplies row vectors by exp(r S), which is exp(-r S) on columns, so A = -S. S was skew only at first,
    so its skew part is taken. In single blocks S[1] is the text's and S[0] (drawn small) the image's. Their code hands
    them to tokens by a fixed place, 4096, that is right at no resolution. Heads whose basis is zero were left out.
    Raises ValueError for any other file. Nothing but tensors is ever unpickled.
    """
    state = _load(path)
    double, single = (_listed(state, prefix, path) for prefix in (_DOUBLE, _SINGLE))
    bases = {role: _basis(state, names, path) for role, names in _BASES.items()}
    blocks, heads, width, _ = bases["q"].shape
    geometry = Geometry(len(double), len(single), heads, width)
    if blocks != geometry.blocks or bases["k"].shape != bases["q"].shape:
        raise ValueError(f"{path}: got bases of {blocks} blocks and generators of {geometry.blocks}, expected one each")
    text = torch.cat([torch.stack(double), torch.stack([both[1] for both in single])])
    image = torch.cat([torch.zeros_like(torch.stack(double)), torch.stack([both[0] for both in single])])
    used = bases["q"].flatten(2).any(-1) & bases["k"].flatten(2).any(-1)
    row, head = used.nonzero(as_tuple=True)
    is_single = (row >= len(double)).long()
    return Concept(
        slug=slug,
        name=slug.capitalize(),
        description=f"{slug}, converted from {printable(path.name)}",
        geometry=geometry,
        heads=torch.stack([is_single, row - is_single * len(double), head], 1).to(torch.int32),
        text=Stream(-skew(text[used]), Roles(*(orthonormal(bases[role][used]) for role in ROLES)), acts_on="qk"),
        image=Stream(-skew(image[used])),
        discrimination=used.float(),  # theirs was not kept: 1 where they turn
        threshold=THRESHOLD,
        training={"converted_from": printable(path.name)},
    )


def _load(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path}: got {size} bytes, expected at most {MAX_BYTES}: this is no RotaryAdapter")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # any error that a broken or hostile pickle causes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: not a state dict of tensors ({reason:.120}); convert a RotaryAdapter's .pth"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: got {type(state).__name__}, expected a dict of tensors, a RotaryAdapter's state")
    return {name: value.float() for name, value in state.items()}


def _listed(state: dict[str, Tensor], prefix: str, path: Path) -> list[Tensor]:
    """The parameters `<prefix>0`, `<prefix>1`, ... in order."""
    count = sum(name.startswith(prefix) for name in state)
    names = [f"{prefix}{index}" for index in range(count)]
    if not count or not all(name in state for name in names):
        raise ValueError(
            f"{path}: got {count} tensors {prefix}*, expected {prefix}0, {prefix}1, ...: not a RotaryAdapter"
        )
    return [state[name] for name in names]


def _basis(state: dict[str, Tensor], names: tuple[str, str], path: Path) -> Tensor:
    """[blocks, H, D, R], double blocks first."""
    missing = [name for name in names if name not in state or state[name].ndim != 4]
    if missing:
        raise ValueError(f"{path}: got no [blocks, heads, width, rank] tensor {missing[0]}: not a RotaryAdapter")
    return torch.cat([state[name] for name in names])
