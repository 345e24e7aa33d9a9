"""Reads a Dockerfile: instructions and stages, as far as ours use the language."""

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name in capitals, flags such as --from, and what follows."""

    name: str
    flags: dict[str, str]
    rest: str

    @property
    def words(self) -> list[str]:
        """The arguments, of the JSON form or of the other."""
        if self.rest.startswith("["):
            words: list[str] = json.loads(self.rest)
            return words
        return shlex.split(self.rest)


@dataclass
class Stage:
    """One FROM and what follows it."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [one for one in self.instructions if one.name == name]

    def last(self, name: str) -> Instruction:
        return self.all(name)[-1]

    @property
    def environment(self) -> dict[str, str]:
        """What ENV sets."""
        return dict(word.split("=", 1) for one in self.all("ENV") for word in one.words)


def read(path: Path) -> list[Stage]:
    """The stages of a Dockerfile, its global ARGs put in their FROM lines."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in _instructions(path.read_text(encoding="utf-8")):
        if instruction.name == "FROM":
            base, *name = instruction.words
            for argument, value in arguments.items():
                base = base.replace(f"${{{argument}}}", value)
            stages.append(Stage(base, name[1] if name else ""))
        elif stages:
            stages[-1].instructions.append(instruction)
        else:
            assert instruction.name == "ARG"
            argument, _, value = instruction.rest.partition("=")
            arguments[argument] = value
    return stages


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    found = []
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        name, _, rest = line.strip().partition(" ")
        flags = {}
        while match := re.match(r"--([a-z-]+)=(\S+)\s+", rest.strip()):
            flags[match[1]] = match[2]
            rest = rest.strip()[match.end() :]
        found.append(Instruction(name.upper(), flags, " ".join(rest.split())))
    return found
