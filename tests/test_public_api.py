"""What is public is documented as a trainer's author needs it, without opening the file."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel
from tests.public_api import PAGE, exported, first_line, methods, with_tables

import eagle3_client
from eagle3_schemas import errors
from eagle3_schemas.errors import RemoteEagle3Error

ERRORS = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, RemoteEagle3Error)
}


def documented() -> Iterator[tuple[str, Any]]:
    """Yield every public function, class and method with its dotted name."""
    for module, name, found in exported():
        if not (inspect.isclass(found) or inspect.isfunction(found)):
            continue
        yield f"{module.__name__}.{name}", found
        if inspect.isclass(found) and not issubclass(found, (BaseModel, Exception)):
            for method, value in methods(found):
                yield f"{module.__name__}.{name}.{method}", value


PUBLIC = dict(documented())
DEFERS = re.compile(r"\b([Aa]s|[Ss]ee) (in )?(the interface|`\w+`)")
"""To another docstring, whose words on arguments and shapes hold."""


def function_of(thing: Any) -> Any:
    return thing.fget if isinstance(thing, property) else thing


def text(name: str) -> str:
    """A docstring; a method's may say that its interface's holds."""
    return inspect.getdoc(PUBLIC[name]) or ""


def section(docstring: str, title: str) -> str:
    found = re.search(rf"^{title}:\n((?:[ ]+.*\n?|\n)*)", docstring, re.MULTILINE)
    return textwrap.dedent(found[1]) if found else ""


@pytest.mark.parametrize("name", PUBLIC)
def test_it_says_in_one_line_what_it_is_for(name: str) -> None:
    line = first_line(PUBLIC[name])
    assert line, f"{name} has no docstring"
    assert line[-1] in ".:;", line
    assert not re.match(r"(This|The class|A class|Function|Method|Gets|Sets|Returns)\b", line)


@pytest.mark.parametrize("name", PUBLIC)
def test_it_names_every_argument(name: str) -> None:
    thing = function_of(PUBLIC[name])
    if inspect.isclass(thing) and (
        issubclass(thing, (BaseModel, Exception)) or "Protocol" in str(thing.__bases__)
    ):
        return
    try:
        parameters = inspect.signature(thing).parameters
    except ValueError:
        return
    if DEFERS.search(text(name)):
        return
    told = section(text(name), "Args") + section(text(name), "Attributes")
    if inspect.isclass(thing):
        # Or a docstring below each field.
        fields = re.findall(r"^    (\w+): .*\n    r?\"\"\"", inspect.getsource(thing), re.MULTILINE)
        told += "".join(f"{field}:\n" for field in fields)
    for parameter in parameters.values():
        if parameter.name in ("self", "cls") or parameter.name.startswith("_"):
            continue
        assert re.search(rf"^(\w+, )*{parameter.name}(, \w+)*:", told, re.MULTILINE) or (
            f"`{parameter.name}`" in text(name)
        ), f"{name}: {parameter.name}"


@pytest.mark.parametrize("name", PUBLIC)
def test_it_names_the_errors_it_raises(name: str) -> None:
    thing = function_of(PUBLIC[name])
    if inspect.isclass(thing):
        made = "__post_init__" if dataclasses.is_dataclass(thing) else "__init__"
        thing = vars(thing).get(made)
        if not inspect.isfunction(thing):
            return
    tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    raised = {
        node.exc.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
    }
    told = section(text(name), "Raises")
    for error in raised & set(ERRORS):
        ancestors = {each.__name__ for each in ERRORS[error].__mro__}
        assert any(each in told for each in ancestors), f"{name} raises {error}: {told!r}"


@pytest.mark.parametrize("name", PUBLIC)
def test_it_gives_the_shapes_of_its_tensors(name: str) -> None:
    thing = function_of(PUBLIC[name])
    if inspect.isclass(thing) and not dataclasses.is_dataclass(thing):
        return
    hints = str(inspect.signature(thing)) if not inspect.isclass(thing) else str(
        [field.type for field in dataclasses.fields(thing)]
    )  # fmt: skip
    if re.search(r"\bTensor\b", hints) and not DEFERS.search(text(name)):
        assert re.search(r"\[(\.{3}|[A-Zn1-9]\w*)(, ?(\.{3}|[\w·]+))*\]|shape", text(name)), name


STATEFUL = ("RemoteEagle3Backend", "Prefetch", "RemoteBatchHandle", "HFEagle3TargetModel",
            "TransformersTarget", "BatchHandle", "Eagle3TargetBackend")  # fmt: skip


@pytest.mark.parametrize("name", STATEFUL)
def test_what_has_state_says_which_threads_may_use_it(name: str) -> None:
    (found,) = [each for each in PUBLIC if each.endswith(f".{name}")]
    assert "thread" in text(found).lower()


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_exported_and_says_what_to_do(name: str) -> None:
    assert getattr(eagle3_client, name) is ERRORS[name]
    assert name in eagle3_client.__all__


def test_the_page_has_them_all() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run `python -m tests.public_api`"
