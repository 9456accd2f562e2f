"""What protection costs: measured side by side in one process, told as tables and curves."""
