"""`saferope audit`: what a workflow, or a picture made by ComfyUI, says of its protection

file (JSON, PNG, WEBP) -> graph (from the API's form, or by editor from the editor's: scope, widgets; known: classes of
nodes) -> models (their ways) -> protections (settings; concepts: what comes in; together: in a
row, before samplers) -> verdict -> report
"""
