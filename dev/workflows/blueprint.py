"""The subgraph blueprint, which ComfyUI offers in its node library: protection, guidance and sampler as one node."""

from __future__ import annotations

from .flux import DEV_GUIDANCE, DEV_STEPS
from .graph import GREEN, PURPLE, Graph, group

WIDGETS = {"strength": 1.0, "guidance": DEV_GUIDANCE, "seed": 0, "steps": DEV_STEPS}
WIDGETS |= {"sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
EDGE = 160  # canvas units between the nodes and the subgraph's own inputs and outputs
ABOUT = "Samples FLUX with concepts suppressed: SafeRoPE Apply, Flux Guidance and KSampler (cfg 1) in one node."


def safe_sampler(info: dict) -> dict:
    """The saved form of the blueprint "Safe FLUX sampler": one node, and the definition of what is in it."""
    graph = Graph(info, "Safe FLUX sampler")
    model, concept, positive, latent = (graph.inlet(name) for name in ("model", "concept", "positive", "latent_image"))
    shown = {name: graph.inlet(name, value) for name, value in WIDGETS.items()}
    safe = graph.add("SafeRoPE_Apply", "Protect", model=model, concept=concept, strength=shown.pop("strength"))
    guidance = graph.add("FluxGuidance", conditioning=positive, guidance=shown.pop("guidance"))
    nothing = graph.add("ConditioningZeroOut", "No negative prompt (cfg 1)", conditioning=positive)
    sampler = graph.add(
        "KSampler",
        model=safe["model"],
        positive=guidance["CONDITIONING"],
        negative=nothing["CONDITIONING"],
        latent_image=latent,
        cfg=1.0,
        **shown,
    )
    graph.outlet("latent", sampler["LATENT"])
    graph.outlet("recorder", safe["recorder"])
    graph.arrange([[group("Protect", PURPLE, [safe])], [group("Paint", GREEN, [guidance, nothing, sampler])]])
    return _as_one_node(graph)


def _as_one_node(graph: Graph) -> dict:
    inside = _definition(graph)
    widgets = {link[0]: graph.nodes[link[3] - 1].data["inputs"][link[4]] for link in graph.links if link[3] > 0}
    inputs, proxies = [], []
    for inlet in graph.inlets:
        slot = widgets[inlet["linkIds"][0]]
        extra = {"widget": {"name": inlet["name"]}} if "widget" in slot else {}
        inputs.append({"name": inlet["name"], "type": inlet["type"], "link": None} | extra)
        if extra:
            target = next(link[3] for link in graph.links if link[0] == inlet["linkIds"][0])
            proxies.append([str(target), slot["name"]])
    sampler = next(node for node in graph.nodes if node.kind == "KSampler")
    proxies.append([str(sampler.id), "control_after_generate"])  # the seed's companion, which has no slot of its own
    outputs = [{"name": each["name"], "type": each["type"], "links": []} for each in graph.outlets]
    node = {"id": 1, "type": inside["id"], "pos": [0, 0], "size": [320, 270], "flags": {}, "order": 0, "mode": 0}
    node |= {"inputs": inputs, "outputs": outputs, "title": graph.title, "properties": {"proxyWidgets": proxies}}
    whole = {"id": graph.id_of("blueprint"), "revision": 0, "last_node_id": 1, "last_link_id": 0}
    whole |= {"nodes": [node | {"widgets_values": []}], "links": [], "groups": []}
    return whole | {"definitions": {"subgraphs": [inside]}, "config": {}, "extra": {}, "version": 0.4}


def _definition(graph: Graph) -> dict:
    """The inside, as the editor saves it: links are objects here, and the edges are nodes."""
    saved = graph.workflow()
    fields = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    right = max(each["bounding"][0] + each["bounding"][2] for each in graph.groups)
    state = {"lastGroupId": len(graph.groups), "lastNodeId": len(graph.nodes), "lastLinkId": len(graph.links)}
    return {
        "id": graph.id_of("subgraph"),
        "version": 1,
        "state": state | {"lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": graph.title,
        "inputNode": {"id": -10, "bounding": [-EDGE, 120, 120, 20 * len(graph.inlets) + 40]},
        "outputNode": {"id": -20, "bounding": [right + EDGE - 120, 120, 120, 20 * len(graph.outlets) + 40]},
        "inputs": graph.inlets,
        "outputs": graph.outlets,
        "widgets": [],
        "nodes": saved["nodes"],
        "groups": graph.groups,
        "links": [dict(zip(fields, link, strict=True)) for link in graph.links],
        "extra": {},
        "category": "SafeRoPE",
        "description": ABOUT,
    }
