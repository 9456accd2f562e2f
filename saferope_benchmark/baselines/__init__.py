"""Other methods of erasing a concept, on the same model, to be compared with: each one file, all of the same shape.

`STRENGTHS` is the small search over a method's own strength, `fit(model, task, seed, progress)` gives what it learned
as tensors, and within `applied(model, state, strength)` `saferope_benchmark.sample.sample` is under the method.
Strength 0 or an empty state is the model itself. All are written from their papers' formulas.
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
