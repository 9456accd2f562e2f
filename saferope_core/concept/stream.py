"""Streams and roles: the two kinds of tokens of a rectified flow transformer, and the two vectors that meet in its attention."""

from __future__ import annotations

STREAMS = ("text", "image")
ROLES = ("q", "k")
