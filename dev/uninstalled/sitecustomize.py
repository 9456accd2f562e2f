"""On a ComfyUI's PYTHONPATH: takes the editable installation of this project out of it, as few users have one.

With it, a node that says `from saferope_core import ...` would work here and nowhere else.
"""

import sys

sys.meta_path[:] = [
    finder for finder in sys.meta_path if "__editable___saferope" not in getattr(finder, "__module__", "")
]
