"""Protection of a running model: the plan, the rotation by it, and the record of risk."""
