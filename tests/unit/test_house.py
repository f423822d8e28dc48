"""The rules of CONTRIBUTING.md that a program can see: sizes, docstrings, words, types."""

import ast
import inspect
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

import tpkernels as tpk

ROOT = Path(__file__).resolve().parents[2]

OPENER = re.compile(r"(What|Of|As|Whether|For|From|Where|Who)\b")
COMMENT = re.compile(r"\s*(?:#|//)\s*(.*)")
IGNORE = re.compile(r"# (?:pyright|type): ignore(.*)")
RULE = re.compile(r"\[report\w+(, report\w+)*\]")
# Decorators and names of functions whose parameters an op's schema or an autograd.Function fixes,
# and public functions whose options users name.
MANY_PARAMETERS = re.compile(
    r"register_|jit|impl|^forward$|^parallelize$|^plan$|^(row|column)_parallel_linear|^vocab_"
)
# Public functions and classes that neither communicate nor hold a group.
LOCAL = {
    *("auto_plan", "load_unsharded_state_dict", "log_collectives", "plan"),
    *("Dropout", "LayerNorm", "RMSNorm", "dropout", "layer_norm", "rms_norm"),
    *("bias_act", "gated_act", "rotary", "rotary_tables"),
}


def tracked(*suffixes: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, cwd=ROOT, text=True).split()
    return [n for n in names if n.endswith(suffixes)]


PYTHON = tracked(".py")
SOURCES = PYTHON + tracked(".cpp", ".h", ".cu", ".cuh")


def read(name: str) -> str:
    return (ROOT / name).read_text()


def nodes(kind):
    for name in PYTHON:
        for node in ast.walk(ast.parse(read(name))):
            if isinstance(node, kind):
                yield name, node


def fail_if(places):
    places = list(places)
    assert not places, f"{len(places)} places:\n" + "\n".join(places[:150])


def lines_that_break_rules(name):
    lines = read(name).splitlines()
    if len(lines) > 400:
        yield f"{name}: {len(lines)} lines, more than 400"
    before = None
    for number, line in enumerate(lines, 1):
        if len(line) > 100:
            yield f"{name}:{number}: {len(line)} columns, more than 100"
        if "fmt: " + "skip" in line:
            yield f"{name}:{number}: a formatter's skip"
        comment = COMMENT.match(line)
        if comment and not before and OPENER.match(comment[1]):
            yield f"{name}:{number}: the comment opens without a verb: {comment[1][:60]}"
        before = comment


def test_lines():
    fail_if(place for name in SOURCES for place in lines_that_break_rules(name))


def may_have_many_parameters(name, node):
    if name.startswith(("tests/", "tpkernels/kernels/")):
        return True
    if name.startswith("tpkernels/nn/") and node.name == "__init__":
        return True
    names = [node.name, *map(ast.unparse, node.decorator_list)]
    return any(map(MANY_PARAMETERS.search, names))


def parameter_count(node):
    parameters = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    return len([p for p in parameters if p.arg not in ("self", "cls", "ctx")])


def test_functions():
    def places():
        for name, node in nodes((ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = len((ast.get_docstring(node, clean=False) or "").splitlines())
            length = node.end_lineno - node.lineno + 1 - docstring
            if length > 50 and not name.startswith("tpkernels/kernels/"):
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, more than 50"
            count = parameter_count(node)
            if count > 7 and not may_have_many_parameters(name, node):
                yield f"{name}:{node.lineno}: {node.name} has {count} parameters, more than 7"

    fail_if(places())


def test_docstrings_open_with_a_subject_or_an_imperative():
    def places():
        for name, node in nodes((ast.Module, ast.ClassDef, ast.FunctionDef)):
            if OPENER.match(ast.get_docstring(node) or ""):
                yield f"{name}:{getattr(node, 'lineno', 1)}: the docstring opens without a verb"

    fail_if(places())


def test_imports():
    def places():
        for name, node in nodes((ast.ImportFrom, ast.FunctionDef, ast.ClassDef)):
            where = f"{name}:{node.lineno}"
            if not isinstance(node, ast.ImportFrom):
                if name.endswith("/__init__.py"):
                    yield f"{where}: {node.name} is defined in an __init__.py"
            elif node.level or (node.module or "").startswith("tpkernels"):
                private = {alias.name for alias in node.names if re.match("_(?!_)", alias.name)}
                for other in private - {"_C"}:
                    yield f"{where}: imports {other}, which is private to {node.module}"

    fail_if(places())


def test_type_checker_is_ignored_rarely_and_with_a_reason():
    found, bad = [], []
    for name in PYTHON:
        lines = read(name).splitlines()
        for number, line in enumerate(lines, 1):
            if (match := IGNORE.search(line)) and name != "tests/unit/test_house.py":
                found.append(f"{name}:{number}")
                above = any(map(COMMENT.match, lines[max(0, number - 4) : number - 1]))
                if not RULE.match(match[1]) or not (above or "  # " in match[1]):
                    bad.append(f"{name}:{number}: no rule, or no reason beside or above it")
    assert len(found) <= 20, found
    fail_if(bad)


def test_the_extension_has_types():
    stub = ast.parse(read("tpkernels/_C.pyi"))
    typed = {node.name for node in stub.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert typed == {name for name in dir(tpk._C) if not name.startswith("__")}


def public_objects():
    for module in (tpk, tpk.nn, tpk.functional):
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.ismodule(thing):
                continue
            yield f"{module.__name__}.{name}", thing


def missing_sections(name, thing):
    text = inspect.getdoc(thing) or ""
    signature = inspect.signature(thing)
    if signature.parameters and "Args:" not in text:
        yield "Args:"
    result = signature.return_annotation
    if (
        not inspect.isclass(thing)
        and result not in (None, "None")
        and not re.search("(Returns|Yields):", text)
    ):
        yield "Returns:"
    if re.search(r"^\s+raise ", inspect.getsource(thing), re.M) and "Raises:" not in text:
        yield "Raises:"
    if name.rpartition(".")[2] not in LOCAL and "Collective: " not in text:
        yield "Collective: every rank of the group must call it."
    if "Example" not in text:
        yield "Example:"


def test_public_objects_are_documented():
    fail_if(
        f"{name}: no {section!r}"
        for name, thing in public_objects()
        for section in missing_sections(name, thing)
    )


def glossary():
    """Yield (old words, words to use, "code" or "text", path pattern) for each row of the table."""
    rows = [line for line in read("docs/glossary.md").splitlines() if line.startswith("| `")]
    for row in rows:
        old, use, scope = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:4])
        if match := re.fullmatch(r"(code|text) `(.+)`", scope):
            yield re.findall(r"`(\w+)`", old), use, match[1], match[2].replace("\\|", "|")
        else:
            assert scope == "-", f"docs/glossary.md: a scope that is not understood: {row}"


def identifiers(name):
    """Yield (line number, identifier) of a source file, without its comments and strings."""
    text = read(name)
    if name.endswith(".py"):
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                yield token.start[0], token.string
        return
    blank = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:[^\"\\\n]|\\.)*\"", re.S)
    text = blank.sub(lambda match: "\n" * match[0].count("\n"), text)
    for number, line in enumerate(text.splitlines(), 1):
        for word in re.findall(r"[A-Za-z_]\w*", line):
            yield number, word


def words(name):
    """Yield (line number, word) of a file's whole text; `a_b` is three words: a_b, a and b."""
    for number, line in enumerate(read(name).splitlines(), 1):
        for word in re.findall(r"\w+", line):
            yield number, word
            yield from ((number, part) for part in word.split("_") if part != word)


@pytest.mark.parametrize("kind", ["code", "text"])
def test_old_words_are_gone(kind):
    rows = [row for row in glossary() if row[2] == kind]
    files = SOURCES if kind == "code" else [*SOURCES, *tracked(".md")]
    find = identifiers if kind == "code" else words

    def places():
        for name in files:
            forbidden = {old: row[1] for row in rows if re.search(row[3], name) for old in row[0]}
            if name == "docs/glossary.md" or not forbidden:
                continue
            for number, word in find(name):
                if word in forbidden:
                    yield f"{name}:{number}: {word}: write {forbidden[word]} (docs/glossary.md)"

    assert rows
    fail_if(places())
