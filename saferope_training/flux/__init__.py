"""FLUX as diffusers has it: loading, encoding, one velocity, whole pictures, and where its attention is turned."""
