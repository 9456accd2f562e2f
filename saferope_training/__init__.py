"""The trainer: from prompts to a concept file. Only this room and the tiny world know diffusers."""
