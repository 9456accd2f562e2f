"""SafeRoPE's headless tool: from prompts to a concept file, and from a concept file to figures. diffusers lives here
and only here.
"""
