"""The command `saferope`."""
