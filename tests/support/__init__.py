"""Helpers of the tests: browsers, hostile files, oracles, faults, load."""
