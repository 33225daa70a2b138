"""What our source asks of TensorRT's Python API, found by reading it, against what real bindings say they have."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

# Runs with the bindings on its path: two versions cannot be imported by one process.
DUMP = """
import json, tensorrt_bindings as trt
def member(value):
    if isinstance(value, property):
        return {"property": value.fget.__doc__ or "", "settable": value.fset is not None}
    if isinstance(value, type) and value is not type:
        return {"class": value.__name__}
    return {"signatures": value.__doc__ or ""} if callable(value) else {"value": type(value).__name__}
classes = {name: value for name, value in vars(trt).items() if isinstance(value, type)}
inner = (value for kind in list(classes.values()) for value in vars(kind).values() if isinstance(value, type))
classes |= {value.__name__: value for value in inner}
api = {name: {m: member(getattr(value, m)) for m in dir(value)} for name, value in classes.items()}
kinds = {name: [kind.__name__ for kind in value.__mro__] for name, value in classes.items()}
print(json.dumps({"version": trt.__version__, "classes": api, "kinds": kinds}))
"""
PLAIN = {"str": {"str"}, "bool": {"bool"}, "bytes": {"buffer", "Buffer"}, "tuple": {"tuple", "Dims"}}
PLAIN["int"] = {"int", "SupportsInt"}
BUILTIN = {"str": "str", "int": "int", "len": "int", "tuple": "tuple"}


def read_api(bindings: Path, libraries: Path) -> dict:
    """All classes of the bindings in a folder, with what pybind11 says of their members."""
    paths = {"PYTHONPATH": str(bindings), "LD_LIBRARY_PATH": str(libraries)}
    done = subprocess.run([sys.executable, "-c", DUMP], env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def last(name: str) -> str:
    return re.split(r"\.|::", name)[-1]


def signatures(name: str, documented: str) -> list[ast.FunctionDef]:
    """The overloads in a docstring of pybind11."""
    lines = re.findall(rf"^(?:\d+\. )?({name}\(.*\) -> .*)$", documented, re.MULTILINE)
    plain = [re.sub(r"<[^<>]*>", "None", line).replace("::", ".") for line in lines if "*args" not in line]
    return [ast.parse(f"def {line}: ...").body[0] for line in plain]


class Uses(ast.NodeVisitor):
    """Follows values of TensorRT's types through one file, and notes each use, and each that the API does not have."""

    def __init__(self, source: str, api: dict) -> None:
        self.classes, self.kinds, self.found, self.problems = dict(api["classes"]), dict(api["kinds"]), set(), []
        self.attributes: dict[str, str] = {}
        self.names: dict[str, str] = {}
        tree = ast.parse(source)
        for _ in range(2):  # attributes of self may be used above where they are set
            self.problems.clear()
            self.visit(tree)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            if kind := self.type_of(base).removeprefix("class "):
                self._overrides(node, kind)
                ours = {m.name: {"property": ""} for m in node.body if isinstance(m, ast.FunctionDef)}
                ours |= {n.attr: {"property": ""} for n in ast.walk(node) if isinstance(n, ast.Attribute)}
                self.classes[node.name] = ours | self.classes[kind]
                self.kinds[node.name] = [node.name, *self.kinds[kind]]
        self.attributes = {}
        for _ in range(2):
            self.generic_visit(node)

    def _overrides(self, node: ast.ClassDef, base: str) -> None:
        """Methods that TensorRT calls take what it gives."""
        for method in (m for m in node.body if isinstance(m, ast.FunctionDef) and not m.name.startswith("__")):
            if method.name in self.classes[base]:
                self.found.add(f"{base}.{method.name}")
                wanted = [len(s.args.args) for s in self._overloads(base, method.name)]
                if len(method.args.args) not in wanted:
                    self.problems.append(f"{base}.{method.name} is given {wanted} arguments")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.names = {}
        for argument in node.args.args:
            for part in ast.walk(argument.annotation) if argument.annotation else ():
                if isinstance(part, ast.Attribute) and (kind := self.type_of(part)):
                    self.names[argument.arg] = kind.removeprefix("class ")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            sides = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                sides = list(zip(target.elts, node.value.elts, strict=True))
            for one, value in sides:
                self._assign(one, self.type_of(value))

    def _assign(self, target: ast.AST, kind: str) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = kind
        elif isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self":
            self.attributes[target.attr] = kind
        elif isinstance(target, ast.Attribute) and (owner := self.type_of(target.value)):
            readonly = not self._member(owner, target.attr).get("settable")
            self.problems += [f"{owner}.{target.attr} cannot be set"] * readonly

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self.type_of(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        self.type_of(node)

    def type_of(self, node: ast.AST) -> str:
        """Name of the type of an expression, "class X" for a class itself, "" where it is not known."""
        match node:
            case ast.Constant():
                return type(node.value).__name__
            case ast.BinOp():
                return self.type_of(node.left)
            case ast.Name():
                return self.names.get(node.id) or ("class " + node.id if node.id in self.classes else "")
            case ast.Attribute(value=ast.Name(id="trt"), attr=name):
                if name not in self.classes and name != "__version__":
                    self.problems.append(f"there is no {name}")
                self.found.add(name)
                return "" if name == "__version__" else f"class {name}"
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if self.attributes.get(name):
                return self.attributes[name]
            case ast.Attribute():
                owner = self.type_of(node.value)
                return self._attribute(owner, node.attr) if owner else ""
            case ast.Call():
                return self._call(node)
        return ""

    def _attribute(self, owner: str, name: str) -> str:
        member = self._member(owner, name)
        if "class" in member:
            return "class " + member["class"]
        if owner.startswith("class "):
            return owner.removeprefix("class ") if "value" in member else ""
        return last(member["property"].rpartition("-> ")[2].strip()) if "property" in member else ""

    def _member(self, owner: str, name: str) -> dict:
        owner = self._known(owner.removeprefix("class "))
        if owner not in self.classes:
            return {}
        self.found.add(f"{owner}.{name}")
        if name not in self.classes[owner]:
            self.problems.append(f"{owner} has no {name}")
        return self.classes[owner].get(name, {})

    def _known(self, name: str) -> str:
        return name if name in self.classes or not name.startswith("I") else name[1:]  # IParserError is ParserError

    def _overloads(self, owner: str, name: str) -> list[ast.FunctionDef]:
        return signatures(name, self._member(owner, name).get("signatures", ""))

    def _call(self, node: ast.Call) -> str:
        if isinstance(node.func, ast.Name) and node.func.id in BUILTIN:
            return BUILTIN[node.func.id]
        kind = self.type_of(node.func)
        if kind.startswith("class "):
            made = kind.removeprefix("class ")
            if isinstance(node.func, ast.Attribute):  # else it is ours
                self._check(f"{made}()", self._overloads(made, "__init__"), node)
            return made
        if isinstance(node.func, ast.Attribute) and (owner := self.type_of(node.func.value)):
            bound = not owner.startswith("class ")
            name = self._known(owner.removeprefix("class "))
            if name in self.classes:
                overloads = self._overloads(name, node.func.attr)
                self._check(f"{name}.{node.func.attr}", overloads, node, bound)
                return last(ast.unparse(overloads[0].returns)) if overloads else ""
        return ""

    def _check(self, name: str, overloads: list[ast.FunctionDef], node: ast.Call, bound: bool = True) -> None:
        if not any(self._fits(one, node, bound) for one in overloads):
            self.problems.append(f"{name} does not take {ast.unparse(node)}")

    def _fits(self, overload: ast.FunctionDef, node: ast.Call, bound: bool) -> bool:
        takes = overload.args.args[bound:]
        if any(isinstance(argument, ast.Starred) for argument in node.args):
            return len(node.args) <= len(takes)
        named = {word.arg: word.value for word in node.keywords}
        given = {**dict(zip((a.arg for a in takes), node.args, strict=False)), **named}
        must = {a.arg for a in takes[: len(takes) - len(overload.args.defaults)]}
        if len(node.args) > len(takes) or not must <= given.keys() <= {a.arg for a in takes}:
            return False
        return all(self._suits(a.annotation, given[a.arg]) for a in takes if a.arg in given)

    def _suits(self, wanted: ast.AST | None, given: ast.AST) -> bool:
        kind = self.type_of(given).removeprefix("class ")
        if not kind or wanted is None:
            return True
        asked = last(ast.unparse(wanted))
        return asked in PLAIN.get(kind, self.kinds.get(kind, {kind}))
