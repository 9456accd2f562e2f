"""Baselines: other methods of erasing a concept, on the same model. Each is one file, and all have the same shape.

`STRENGTHS` are the strengths of a small search. `fit(model, task, seed, progress)` gives the learned state as tensors.
Within `applied(model, state, strength)`, `saferope_benchmark.sample.sample` paints under the method. Strength 0 or an
empty state is the model itself. All are written from their papers' formulas.
"""

from . import adavd, des, erase_anything, esd, gem, nag, oce, rand, safree, sld, uce

BASELINES = {
    "esd": esd,
    "sld": sld,
    "uce": uce,
    "des": des,
    "erase-anything": erase_anything,
    "rand": rand,
    "nag": nag,
    "safree": safree,
    "oce": oce,
    "gem": gem,
    "adavd": adavd,
}
