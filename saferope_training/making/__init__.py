"""How a concept file is made: statistics of heads, subspaces, gates, latents, training; `recipe` runs the stages."""
