"""A workflow as Python values, laid out and written for the canvas and for the API."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

TITLE, GAP, PADDING = 30, 40, 20
COLOURS = {"blue": "#3f789e", "green": "#8A8", "purple": "#a1309b", "orange": "#b58b2a", "grey": "#888"}


class Widget(NamedTuple):
    """A value on a node."""

    name: str
    kind: str
    default: Any
    controlled: bool
    """Followed by "control after generate" on the canvas: the frontend gives it to every seed unless told not to."""


class Output(NamedTuple):
    """What a link starts from."""

    node: "Node"
    slot: int


@dataclass(eq=False)
class Node:
    """A node, or a note when there is no ``info``."""

    number: int
    kind: str
    title: str
    inputs: Mapping[str, Any]
    size: tuple[float, float]
    info: Mapping[str, Any] = field(default_factory=dict)
    position: tuple[float, float] = (0, 0)

    def __getitem__(self, slot: int) -> Output:
        return Output(self, slot)

    @property
    def links(self) -> dict[str, Output]:
        """The inputs that are linked."""
        return {name: value for name, value in self.inputs.items() if isinstance(value, Output)}


class Group(NamedTuple):
    """A box with a title around columns of nodes."""

    title: str
    colour: str
    columns: Sequence[Sequence[Node]]


@dataclass
class Graph:
    """A workflow."""

    catalogue: Mapping[str, Any]
    nodes: list[Node] = field(default_factory=list)
    groups: list[tuple[Group, tuple[float, float, float, float]]] = field(default_factory=list)

    def add(self, kind: str, title: str = "", size: tuple[float, float] = (300, 0), **inputs: Any) -> Node:
        """A node; inputs that are not given keep the default of the node."""
        info = self.catalogue[kind]
        known = {name for name, _ in specs(info)}
        assert inputs.keys() <= known, f"{kind} has no input {sorted(inputs.keys() - known)}"
        size = (size[0], max(size[1], least_height(info)))
        node = Node(len(self.nodes) + 1, kind, title or info["display_name"], inputs, size, info)
        self.nodes.append(node)
        return node

    def note(self, text: str, height: float, width: float = 360, title: str = "Note") -> Node:
        """A note in Markdown."""
        node = Node(len(self.nodes) + 1, "MarkdownNote", title, {"text": text.strip()}, (width, height))
        self.nodes.append(node)
        return node

    def arrange(self, *stacks: Sequence[Group]) -> None:
        """Place stacks of groups from left to right, each from top to bottom, and the nodes in them."""
        left: float = 0
        for stack in stacks:
            top, width = 0.0, 0.0
            placed = []
            for group in stack:
                size = place(group, left, top)
                placed.append((group, top, size[1]))
                top, width = top + size[1] + GAP, max(width, size[0])
            self.groups += [(group, (left, y, width, height)) for group, y, height in placed]
            left += width + GAP


def place(group: Group, left: float, top: float) -> tuple[float, float]:
    """Place the nodes of a group; returns its width and height."""
    x, lowest = left + PADDING, top
    for column in group.columns:
        y = top + TITLE + PADDING
        for node in column:
            node.position = (x, y + TITLE)
            y += TITLE + node.size[1] + GAP / 2
        x, lowest = x + max(node.size[0] for node in column) + GAP, max(lowest, y)
    return x - GAP + PADDING - left, lowest - GAP / 2 + PADDING - top


def specs(info: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    """(name, specification) of every input, required ones first, in the order of the canvas."""
    for part in ("required", "optional"):
        known = info["input"].get(part, {})
        yield from ((name, known[name]) for name in info["input_order"].get(part, ()))


def widgets(info: Mapping[str, Any]) -> list[Widget]:
    """The inputs that are typed, not linked."""
    found = []
    for name, (kind, *rest) in specs(info):
        options = rest[0] if rest else {}
        if isinstance(kind, list):
            found.append(Widget(name, "COMBO", options.get("default", next(iter(kind), None)), False))
        elif kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
            seed = kind == "INT" and options.get("control_after_generate", name in ("seed", "noise_seed"))
            found.append(Widget(name, kind, options.get("default", "" if kind == "STRING" else 0), bool(seed)))
    return found


def least_height(info: Mapping[str, Any]) -> float:
    """Height the canvas gives a node."""
    typed = widgets(info)
    rows = max(len(list(specs(info))) - len(typed), len(info["output"]))
    long = sum(spec[0] == "STRING" and spec[1].get("multiline", False) for _, spec in specs(info))
    lines = len(typed) + sum(widget.controlled for widget in typed)
    return 20 * rows + (24 * lines + 8 if lines else 0) + 70 * long + 6


def to_api(graph: Graph) -> dict[str, Any]:
    """The prompt that POST /prompt takes."""
    prompt = {}
    for node in graph.nodes:
        if node.info:
            values = {w.name: node.inputs.get(w.name, w.default) for w in widgets(node.info)} | dict(node.inputs)
            inputs = {k: [str(v.node.number), v.slot] if isinstance(v, Output) else v for k, v in values.items()}
            prompt[str(node.number)] = {"inputs": inputs, "class_type": node.kind, "_meta": {"title": node.title}}
    return prompt


def to_canvas(graph: Graph) -> dict[str, Any]:
    """What the canvas saves and loads."""
    links: list[list[Any]] = []
    for node in graph.nodes:
        for slot, (name, kind) in enumerate(sockets(node)):
            if name in node.links:
                start = node.links[name]
                links.append([len(links) + 1, start.node.number, start.slot, node.number, slot, kind])
    return {
        "id": "00000000-0000-0000-0000-000000000000",
        "revision": 0,
        "last_node_id": len(graph.nodes),
        "last_link_id": len(links),
        "nodes": [canvas_node(node, order, links) for order, node in enumerate(in_order(graph.nodes))],
        "links": links,
        "groups": [
            {
                "id": i,
                "title": group.title,
                "bounding": list(box),
                "color": COLOURS[group.colour],
                "font_size": 24,
                "flags": {},
            }
            for i, (group, box) in enumerate(graph.groups, start=1)
        ],
        "config": {},
        "extra": {"ds": {"scale": 0.7, "offset": [40, 80]}},
        "version": 0.4,
    }


def sockets(node: Node) -> list[tuple[str, str]]:
    """(name, type) of the inputs shown as sockets: what is never typed, then typed inputs that are linked."""
    typed = {widget.name: widget.kind for widget in widgets(node.info)} if node.info else {}
    plain = [(name, kind) for name, (kind, *_) in specs(node.info) if name not in typed] if node.info else []
    return plain + [(name, kind) for name, kind in typed.items() if name in node.links]


def canvas_node(node: Node, order: int, links: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """One node as the canvas saves it."""
    common = {
        "id": node.number,
        "type": node.kind,
        "pos": list(node.position),
        "size": list(node.size),
        "flags": {},
        "order": order,
        "mode": 0,
    }
    if not node.info:
        look = {"color": "#432", "bgcolor": "#653"}
        return common | {
            "title": node.title,
            "inputs": [],
            "outputs": [],
            "properties": {},
            "widgets_values": [node.inputs["text"]],
            **look,
        }
    arriving = {link[4]: link[0] for link in links if link[3] == node.number}
    typed, optional = [widget.name for widget in widgets(node.info)], node.info["input"].get("optional", {})
    inputs = [
        {"name": name, "type": kind}
        | ({"shape": 7} if name in optional else {})
        | ({"widget": {"name": name}} if name in typed else {})
        | {"link": arriving.get(slot)}
        for slot, (name, kind) in enumerate(sockets(node))
    ]
    outputs = []
    for slot, (name, kind) in enumerate(zip(node.info["output_name"], node.info["output"], strict=True)):
        leaving = [link[0] for link in links if (link[1], link[2]) == (node.number, slot)]
        shape = {"shape": 6} if node.info["output_is_list"][slot] else {}
        outputs.append({"name": name, "type": kind, **shape, "links": leaving or None})
    values: list[Any] = []
    for widget in widgets(node.info):
        value = node.inputs.get(widget.name, widget.default)
        values += [widget.default if isinstance(value, Output) else value, *(["fixed"] if widget.controlled else [])]
    title = {} if node.title == node.info["display_name"] else {"title": node.title}
    properties = {"Node name for S&R": node.kind}
    return common | title | {"inputs": inputs, "outputs": outputs, "properties": properties, "widgets_values": values}


def in_order(nodes: Sequence[Node]) -> list[Node]:
    """Every node after those it needs."""
    done: list[Node] = []
    while len(done) < len(nodes):
        done += [n for n in nodes if n not in done and all(link.node in done for link in n.links.values())]
    return done
