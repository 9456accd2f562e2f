"""ComfyUI's models: the patch on their attention, the guard around it, and the text and latents that they take."""
