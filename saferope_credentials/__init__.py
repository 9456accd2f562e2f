"""Content credentials (C2PA) for pictures: keys, signing, checking. Knows pictures' bytes and JSON, no model, no torch.

The signing itself is c2pa-python's, an extra: pip install "saferope[sign]" or pip install c2pa-python.
"""

from .keys import Config, configured, folder, init_keys
from .sign import signed
from .verify import Credential, credential

__all__ = ["Config", "Credential", "configured", "credential", "folder", "init_keys", "signed"]
