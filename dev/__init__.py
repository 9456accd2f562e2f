"""Commands for developers in a checkout: set-up, a real ComfyUI, the demo. Never installed, never loaded by ComfyUI."""
