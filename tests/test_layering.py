"""The pipeline's order is visible in the imports: every layer imports only from those before it."""

import ast
from pathlib import Path

import pytest

import sd_lens

LAYERS = [
    "errors",
    "storage",
    "models",
    "linear",
    "observations",
    "explanations",
    "applications",
    "figures",
    "report",
    "cli",
]
ROOT = Path(sd_lens.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))


def layer_of(module):
    """The layer of `sd_lens.x.y`; the package's own namespace, which only the command line reads, is last."""
    parts = module.split(".")
    return LAYERS.index(parts[1]) if len(parts) > 1 and parts[1] in LAYERS else len(LAYERS) - 1


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner.startswith("sd_lens.") else str(node.module)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    relative = path.relative_to(ROOT)
    if relative == Path("__init__.py"):
        pytest.skip("the public names come from everywhere")
    layer = LAYERS.index(relative.parts[0].removesuffix(".py"))
    upwards = [m for m in imported_modules(path) if m.split(".")[0] == "sd_lens" and layer_of(m) > layer]
    assert not upwards, f"{relative} imports {upwards}"


def test_every_top_level_name_is_a_layer():
    present = {p.relative_to(ROOT).parts[0].removesuffix(".py") for p in MODULES} - {"__init__"}
    assert present == set(LAYERS)


def test_a_small_file_per_concept():
    long = {str(p.relative_to(ROOT)): n for p in MODULES if (n := p.read_text().count("\n")) > 400}
    assert not long
