"""`saferope audit`: what a workflow, or a picture made by ComfyUI, says of its protection

file (JSON, PNG, WEBP) -> graph (from the API's form, or by editor from the editor's) -> protections -> verdict -> report
"""
