"""Methods side by side on the same prompts and seeds: pictures, scores, tables, and an attack on each."""
