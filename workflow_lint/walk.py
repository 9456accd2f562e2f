"""The links that models take through a graph, forwards and backwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .graph import Flow, Node, Unknown

MOST_PATHS = 4  # shown of a sampler
MOST_STEPS = 1_000_000  # for what depends on the way to a sampler, and again for the paths that are shown


class Walk:
    """The links that models take, walked in both directions. Every walk visits a node once: circles end it."""

    def __init__(self, flow: Flow) -> None:
        self.flow, nodes = flow, flow.graph.nodes
        entries = {key: flow.models(node) for key, node in nodes.items()}
        self.before = {
            key: distinct(value.source for _, value in found if not isinstance(value, Unknown))
            for key, found in entries.items()
        }
        self.after: dict[str, list[str]] = {key: [] for key in nodes}
        for key, sources in self.before.items():
            for source in sources:
                self.after[source].append(key)
        self.broken = {
            key: value.reason for key, found in entries.items() for _, value in found if isinstance(value, Unknown)
        }
        self.roots = [key for key in nodes if not entries[key] and self.after[key] and not nodes[key].bypassed]
        self.circular = self._circular()
        self.left = MOST_STEPS

    def _spread(self, roots: list[str], stops: set[str]) -> dict[str, str | None]:
        """What is reached from the roots without passing a stop: each node with the one it was reached from."""
        parents: dict[str, str | None] = {key: None for key in roots if key not in stops}
        todo = list(parents)
        while todo:
            key = todo.pop()
            for reached in self.after[key]:
                if reached not in parents and reached not in stops:
                    parents[reached] = key
                    todo.append(reached)
        return parents

    def behind(self, key: str) -> list[str]:
        """The nodes that a node's model reaches, and itself."""
        return list(self._spread([key], set()))

    def exposed(self, stops: set[str]) -> dict[str, str | None]:
        """What a model, or an input that cannot be followed, reaches past all stops."""
        return self._spread([*self.roots, *self.broken], stops)

    def path(self, key: str, parents: dict[str, str | None]) -> list[str]:
        """From where the model comes to this node; empty when the steps are used up."""
        path, at = [], key
        while at is not None and self.left > 0:
            path.append(at)
            at = parents[at]
            self.left -= 1
        return path[::-1] if at is None else []

    def _circular(self) -> set[str]:
        """Nodes that lie on a circle of models or behind one: what is left when all others are taken away in order."""
        waiting = {key: len(sources) for key, sources in self.before.items()}
        todo = [key for key, count in waiting.items() if count == 0]
        while todo:
            for reached in self.after[todo.pop()]:
                waiting[reached] -= 1
                if waiting[reached] == 0:
                    todo.append(reached)
        return {key for key, count in waiting.items() if count}

    def upstream(self, key: str) -> list[str]:
        """The node and all that a model passes on the way to it; less when the steps are used up."""
        seen, todo = {key: None}, [key]
        while todo and self.left > 0:
            for source in self.before[todo.pop()]:
                self.left -= 1
                if source not in seen:
                    seen[source] = None
                    todo.append(source)
        return list(seen)

    def some_paths(self, node: Node) -> tuple[list[list[str]], bool]:
        """Up to MOST_PATHS paths from a loader to the node, and whether there are more."""
        found: list[list[str]] = []
        for path in self._paths(node.id):
            if len(found) == MOST_PATHS:
                return found, True
            found.append(path)
        return found, self.left <= 0

    def _paths(self, key: str) -> Iterator[list[str]]:
        """Depth first, backwards; stops for good when the steps for all samplers are used up."""
        path, branches = {key: None}, [iter(self.before[key])]
        while branches:
            self.left -= 1
            if self.left <= 0:
                return
            source = next(branches[-1], None)
            if source is None:
                path.popitem()
                branches.pop()
            elif source not in path:
                path[source] = None
                branches.append(iter(self.before[source]))
                if not self.before[source]:
                    self.left -= len(path)
                    yield list(path)[::-1]


def distinct(keys: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(keys))
