"""`saferope audit`: what a workflow, or a picture made by ComfyUI, says of its protection

file (JSON, PNG, WEBP) -> graph (from the API's form, or by editor from the editor's; known: classes of nodes) -> walk
-> protections (concepts: what comes in; effect: what files turn; together: in a row, before samplers) -> verdict ->
report
"""
