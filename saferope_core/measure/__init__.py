"""From queries and keys to statistics, and from statistics to safety-critical heads and their generators."""
