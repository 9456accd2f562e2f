"""SafeRoPE's nodes. `comfy_entrypoint` is what ComfyUI asks for; this folder is the only one that knows ComfyUI."""

from comfy_api.latest import ComfyExtension, io

from .apply import Apply
from .calibrate import CalibrateConcept
from .combine import CombineConcepts
from .host.files import register_folders
from .inspect import InspectConcept
from .load import LoadConcept
from .risk_map import RiskMap
from .risk_probe import RiskProbe
from .save import SaveConcept
from .save_image import SaveImage
from .tiny_world import TinyWorld


class SafeRoPE(ComfyExtension):
    async def on_load(self) -> None:
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes = [LoadConcept, CombineConcepts, CalibrateConcept, SaveConcept, InspectConcept]
        return [*nodes, Apply, RiskProbe, RiskMap, SaveImage, TinyWorld]


async def comfy_entrypoint() -> SafeRoPE:
    return SafeRoPE()
