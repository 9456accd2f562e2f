"""Research: evaluation, scores, baselines, suites of comparisons, costs. The trainer works without it."""
