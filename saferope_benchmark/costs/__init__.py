"""The cost of protection: measured side by side in one process, told as tables and curves."""
