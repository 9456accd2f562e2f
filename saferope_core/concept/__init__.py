"""Concepts, their files, and operations that give a concept from concepts."""
