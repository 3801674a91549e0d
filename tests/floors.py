"""The floors of the house, top down, and what is counted about them: modules, arrows between rooms, levels, the longest module.

    python tests/floors.py    # the numbers

An import may point to the same folder or to one further down the list; `test_floors.py` keeps it, and the reference of the documentation
is ordered by it.
"""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "alignblind_mi"
FLOORS = ("__main__", "commands", "pages", "studies", "exchange", "measures", "organism", "mitigations", "instruments", "models",
          "statistics", "stimuli", "results", "progress", "intervals", "borders", "errors")
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400    # lines of a module that one still reads in a sitting


def room(file: Path) -> str:
    """The folder of the package that a module lies in, or the module's own name where it lies at the root."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(file: Path) -> str:
    """A module's name below the package, such as `studies.parts`."""
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports(file: Path) -> frozenset[str]:
    """The modules of the package that a module imports, wherever in it; a name that its package passes on counts for the package."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == PACKAGE.name:
            inner = node.module.partition(".")[2]
            for alias in node.names:
                path = f"{inner}.{alias.name}".strip(".")
                is_module = (PACKAGE / path.replace(".", "/")).is_dir() or (PACKAGE / (path.replace(".", "/") + ".py")).is_file()
                found.add(path if is_module else inner)
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith(f"{PACKAGE.name}.")}
    return frozenset(found - {""})


def arrows() -> set[tuple[str, str]]:
    """(module, module that it imports)."""
    return {(module(file), target) for file in FILES for target in imports(file)}


def levels(graph: set[tuple[str, str]]) -> int:
    """The number of rooms on the longest way down. Errors: graphlib.CycleError where a way leads back to where it began."""
    below = {upper: {lower for above, lower in graph if above == upper} for upper, _ in graph}
    depth: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():
        depth[name] = 1 + max((depth[lower] for lower in below.get(name, ())), default=0)
    return max(depth.values())


def between_rooms() -> set[tuple[str, str]]:
    """(room, room that it imports), without imports within a room."""
    pairs = {(upper.partition(".")[0], lower.partition(".")[0]) for upper, lower in arrows()}
    return {(upper, lower) for upper, lower in pairs if upper != lower and upper != "__init__"}


def main() -> None:
    """Print the numbers."""
    lengths = {file: len(file.read_text("utf-8").splitlines()) for file in FILES}
    longest = max(lengths, key=lengths.__getitem__)
    print(f"modules: {len(FILES)}, at the root: {len(list(PACKAGE.glob('*.py')))}")
    print(f"arrows between modules: {len(arrows())}, longest chain: {levels(arrows())}")
    print(f"rooms at the root: {len(FLOORS)}, arrows between them: {len(between_rooms())}, longest chain: {levels(between_rooms())}")
    print(f"longest module: {module(longest)}, {lengths[longest]} lines; over {LONGEST}: "
          + (", ".join(f"{module(file)} {n}" for file, n in lengths.items() if n > LONGEST) or "none"))


if __name__ == "__main__":
    main()
