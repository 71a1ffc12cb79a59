"""How the package is built: nothing imports upward, nothing is unpickled, no code that comes with a model is run."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"kernels": 0, "model": 1, "values": 1, "sampling": 1, "engine": 2}
"""Height of each; what is not named here is used by all (errors, params, files) or stands above."""
ABOVE = {"llm": 3, "serving": 3, "training": 3, "evaluation": 3, "integrations": 3, "commands": 4, "demo": 4, "cli": 4}
HEIGHTS = ROOMS | ABOVE
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package by its name, but for its front door, which names what is above for type checkers."""
    for folder, package in (("vas_engine", "vas_engine"), ("kernels", "vas_engine.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
            if name != "vas_engine.__init__":
                yield name, ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from vas_engine import LLM` is from above, whatever the package's front door says.
            homes = {"LLM": "llm"}
            yield node.module
            yield from (f"{node.module}.{homes.get(alias.name, alias.name)}" for alias in node.names)


def height(module: str) -> int | None:
    package, _, rest = module.partition(".")
    return HEIGHTS.get(rest.partition(".")[0]) if package == "vas_engine" else None


def upward(name: str, tree: ast.Module) -> list[str]:
    own = height(name)
    found = [(other, height(other)) for other in imported(tree)] if own is not None else []
    return [f"{name} imports {other}" for other, theirs in found if theirs is not None and theirs > own]


def settings(node: ast.AST) -> list[tuple[str, ast.expr]]:
    """Options that a keyword or a dictionary's text sets."""
    if isinstance(node, ast.keyword) and node.arg:
        return [(node.arg, node.value)]
    pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
    return [(str(key.value), given) for key, given in pairs if isinstance(key, ast.Constant)]


def unsafe(name: str, tree: ast.Module) -> list[str]:
    """What unpickles, or may trust a model's own code."""
    found = [f"{name} imports {other}" for other in imported(tree) if other.partition(".")[0] in UNPICKLERS]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in UNPICKLERS:
            found.append(f"{name}:{node.lineno} uses {node.attr}")
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "yaml.load", "yaml.unsafe_load"):
            found.append(f"{name}:{node.lineno} calls {ast.unparse(node.func)}")
        for option, given in settings(node):
            if option == "allow_pickle" or (option == "trust_remote_code" and ast.unparse(given) != "False"):
                found.append(f"{name}:{given.lineno} says {option}={ast.unparse(given)}")
    return found


def test_nothing_imports_upward() -> None:
    modules = dict(sources())
    assert {name.split(".")[1] for name in modules} >= HEIGHTS.keys()
    assert [line for name, tree in modules.items() for line in upward(name, tree)] == []


def test_nothing_is_unpickled_and_no_code_is_trusted() -> None:
    assert [line for name, tree in sources() for line in unsafe(name, tree)] == []


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("model", "from vas_engine.engine.engine import Engine"),
        ("values", "def late():\n    import vas_engine.training.fit"),
        ("kernels", "from vas_engine.sampling import choose"),
        ("engine", "from vas_engine import LLM"),
        ("engine", "from vas_engine import serving"),
    ],
)
def test_an_upward_import_is_seen(room: str, code: str) -> None:
    assert upward(f"vas_engine.{room}.planted", ast.parse(code))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "import ray\nray.cloudpickle.loads(b'')",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=given)",
        "options = {'trust_remote_code': True}",
        "yaml.load(text)",
    ],
)
def test_what_is_unsafe_is_seen(code: str) -> None:
    assert unsafe("vas_engine.planted", ast.parse(code))
