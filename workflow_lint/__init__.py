"""`saferope audit`: the protection that a workflow, or a picture made by ComfyUI, asks for.

The modules, in the order of their work:

- `file` reads JSON, PNG and WEBP (`picture`).
- `graph` makes a graph of the API's form, `editor` of the editor's form, with `scope` and `widgets`.
- `known` tells the classes of nodes.
- `models` follows the ways of models through the graph.
- `protections` judges each Apply by its `settings` and its `concepts`, `together` in a row and before samplers.
- `verdict` judges the whole, and `report` tells it.
"""
