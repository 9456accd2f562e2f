"""Tests, and in `support` their helpers. A package, since other projects install one of this name."""
