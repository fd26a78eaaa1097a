"""Draws the rooms of the package and what each imports, as they are in the code: `python docs/draw.py`.

A room stands on the floor above all that it imports. An arrow that others imply is left out: where a room imports
another one and a third that the other one imports, too, the arrow to the third is not drawn.
"""

import ast
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

PACKAGE = Path(__file__).parents[1] / "learnax"
PICTURE = Path(__file__).with_name("architecture.svg")
WIDTH, HIGH, GAP, MARGIN = 1240, 74, 34, 20


def room_of(path):
    """The room that a file of the package is in."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules():
    """The files of the package, but for its own `__init__.py`."""
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def rooms():
    """Rooms by name, with the files of each."""
    found = {}
    for path in modules():
        found.setdefault(room_of(path), []).append(path)
    return found


def imported(path):
    """The rooms that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path} has a relative import, which is not followed here")
            names = [f"learnax.{a.name}" for a in node.names] if node.module == "learnax" else [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("learnax."))


def arrows(found):
    """Room -> the rooms that it imports."""
    return {
        room: {other for path in paths for other in imported(path)} & set(found) - {room}
        for room, paths in found.items()
    }


def floors(below):
    """The floor of each room, from 0 for those that import no other one."""
    floor = {}

    def of(room):
        if room not in floor:
            floor[room] = 1 + max((of(other) for other in sorted(below[room])), default=-1)
        return floor[room]

    for room in below:
        of(room)
    return floor


def needed(below):
    """The arrows that no others imply."""

    def reach(room):
        return {other for direct in below[room] for other in {direct, *reach(direct)}}

    return [
        (room, other)
        for room, direct in below.items()
        for other in sorted(direct)
        if not any(other in reach(between) for between in direct - {other})
    ]


def sentence(paths):
    """What a room is for, by the first sentence of its docstring."""
    first = next((path for path in paths if path.name == "__init__.py"), paths[0])
    words = (ast.get_docstring(ast.parse(first.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    return words.split(";")[0].rstrip(".").replace("`", "")


def picture():
    """The picture, as the text of an SVG file."""
    found = rooms()
    below = arrows(found)
    floor = floors(below)
    top = max(floor.values())
    rows = [[room for room in found if floor[room] == level] for level in range(top, -1, -1)]
    place = {}
    for number, row in enumerate(rows):
        each = (WIDTH - 2 * MARGIN) / len(row)
        for column, room in enumerate(row):
            wide = min(each - 20, 250)
            left = MARGIN + each * column + (each - wide) / 2
            place[room] = (left, MARGIN + number * (HIGH + GAP), wide)
    height = 2 * MARGIN + len(rows) * (HIGH + GAP) - GAP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#8a94a6"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for room, other in needed(below):
        (x, y, wide), (x2, y2, wide2) = place[room], place[other]
        start, end = f"{x + wide / 2:.0f} {y + HIGH:.0f}", f"{x2 + wide2 / 2:.0f} {y2:.0f}"
        lines.append(f'<path d="M{start}L{end}" stroke="#8a94a6" fill="none" marker-end="url(#tip)"/>')
    for room, (x, y, wide) in place.items():
        folder = len(found[room]) > 1 or found[room][0].parent != PACKAGE
        name = f"{room}/" if folder else f"{room}.py"
        lines.append(
            f'<rect x="{x:.0f}" y="{y:.0f}" width="{wide:.0f}" height="{HIGH}" rx="8" stroke="#4a5568" '
            f'fill="{"#e8eef9" if folder else "#f7f3e8"}"/>'
        )
        middle = x + wide / 2
        lines.append(f'<text x="{middle:.0f}" y="{y + 21:.0f}" text-anchor="middle" font-weight="bold">{name}</text>')
        words = textwrap.wrap(sentence(found[room]), int(wide / 6.2), max_lines=3, placeholder=" …")
        lines += [
            f'<text x="{middle:.0f}" y="{y + 38 + 14 * number:.0f}" text-anchor="middle" font-size="12" '
            f'fill="#2d3748">{escape(line)}</text>'
            for number, line in enumerate(words)
        ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture())
    print(PICTURE)
