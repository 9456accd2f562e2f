"""The embedded model: a tiny, complete FLUX trained on a world of pictures we render ourselves.

`world` says what there is (scenes, words, prompts), `render` draws it, `codec` is the autoencoder, `model` the FLUX
pipeline, `detector` reads pictures back, and `python -m tinyworld.train` makes all weights again from a seed.
"""
