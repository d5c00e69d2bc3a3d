"""A kernel's PTX, taken apart."""

from __future__ import annotations

import re
from typing import NamedTuple

_ENTRY = re.compile(r"^\s*(?:\.weak |\.visible )?\.entry ", re.MULTILINE)
_PARAMETER = re.compile(r"\.param\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]")
_INSTRUCTION = re.compile(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)


class Instruction(NamedTuple):
    predicate: str  # the register that switches it on, if any
    negated: bool
    name: str
    operands: list[str]
    text: str

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")


class Program(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]
    register_types: dict[str, str]  # by prefix
    parameter: str  # a kernel has one
    parameter_bytes: int


def elements(operand: str) -> list[str]:
    """Of a vector operand, or the operand."""
    return [word.strip() for word in operand.strip("{}").split(",")]


def program(text: str, pattern: str) -> Program:
    """Of the one kernel whose mangled name the pattern fits."""
    entries = [entry for entry in _ENTRY.split(text)[1:] if re.search(pattern, entry[:500])]
    assert len(entries) == 1, f"{len(entries)} kernels like {pattern}"
    head, body = entries[0].split("{", 1)
    parameter = _PARAMETER.search(head)
    assert parameter is not None, head
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    types: dict[str, str] = {}
    body = re.sub(r"//.*", "", body[: body.rindex("}")])
    body = re.sub(r"(\$\w+):", r"label \1;", body)
    for statement in body.split(";"):
        words = " ".join(statement.split()).lstrip("{} ")  # braces before a name are scopes
        if words.startswith("label "):
            labels[words.removeprefix("label ")] = len(instructions)
        elif words.startswith(".reg"):
            _, type_, names = words.split(" ", 2)
            types |= {name.strip().split("<")[0]: type_[1:] for name in names.split(",")}
        elif words and words[0] != ".":
            instructions.append(_instruction(words))
    return Program(instructions, labels, types, parameter[2], int(parameter[3]))


def _instruction(words: str) -> Instruction:
    match = _INSTRUCTION.fullmatch(words)
    assert match is not None, words
    negated, predicate, name, rest = match.groups()
    operands = [op.strip() for op in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,{}\[\]]+", rest)]
    return Instruction(predicate or "", negated == "!", name, [op for op in operands if op], words)
