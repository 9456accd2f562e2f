"""Pure functions of tensors: rotation, latent risk score, subspace, gate, strength."""
