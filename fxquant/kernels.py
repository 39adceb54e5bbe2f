"""The kernels of one graph: settled when fusing has decided what they are."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fxquant import errors
from fxquant.codegen import Header
from fxquant.config import Config
from fxquant.passes.context import LinearSite
from fxquant.passes.fuse import Decision
from fxquant.runtime import cache, dump, launch, targets, timing, verify
from fxquant.runtime.targets import Choice

LOG = logging.getLogger("fxquant.backend")


class Kernels:
    """What computes each product of a graph.

    Inductor may take a graph from its caches, and then nothing is fused again: what was decided is
    kept beside, in the kernel cache. It has to be what was decided for that very code, which reads
    codes itself where a kernel could not be built: hence the edition.

    Args:
        sites: The graph's products.
        choice: The graph's target.
        device: Where it runs.
        config: The options.
    """

    def __init__(
        self, sites: Sequence[LinearSite], choice: Choice, device: torch.device, config: Config
    ) -> None:
        # Texts only: a graph must not keep its parameters alive.
        self.origins = [(site.module, site.scheme, site.where) for site in sites]
        self.choice = choice
        self.device = device
        self.verify = config.verify
        self.is_dumped = dump.folder(config.dump) is not None
        self.choices: dict[str, Choice] = {}
        self.serves: dict[str, tuple[int, ...]] = {}
        self.decisions: list[Decision] = []

    @property
    def version(self) -> tuple[str, ...]:
        """What the code of a graph depends on beside the graph and the options of Inductor."""
        modules = (module for module, *_ in self.origins)
        return (*targets.identity(self.choice), self._named(""), *modules)

    def build(
        self, serves: Mapping[str, tuple[int, ...]], decisions: Sequence[Decision]
    ) -> dict[str, str]:
        """Builds what a graph launches; a graph for the gradient may come later.

        Args:
            serves: Specs as JSON, each with the products that it serves.
            decisions: What was fused and what was not.

        Returns:
            What launches of each spec call their target.
        """
        for text, numbers in serves.items():
            self.serves[text] = tuple(dict.fromkeys((*self.serves.get(text, ()), *numbers)))
        self.decisions += [new for new in decisions if new not in self.decisions]
        headers = {text: self._header(text) for text in serves}
        self.choices.update(targets.build(self.choice, headers, self.device))
        return {text: self._named(self.choices[text].runs) for text in serves}

    def _named(self, target: str) -> str:
        """What launches call a target whose kernels are checked, or counted for the dump."""
        return timing.named(verify.named(target, wanted=self.verify), wanted=self.is_dumped)

    def of(self, number: int) -> list[str]:
        """The specs that serve a product, the one that gives its result last."""
        found = [text for text, numbers in self.serves.items() if number in numbers]
        return sorted(found, key=lambda text: '"kind":"quantize"' not in text)

    def fused(self, number: int) -> list[str]:
        """What was fused with a product, or why nothing was."""
        return [self._note(d, number) for d in self.decisions if number in d.sites]

    def _note(self, decision: Decision, number: int) -> str:
        beside = ""
        if decision.kind == "join":
            own = self.origins[number][0]
            others = [self.origins[other][0] for other in decision.sites if other != number]
            beside = f" with {', '.join(_seen_from(own, other) for other in others)}"
        if decision.done:
            return f"{_DONE[decision.kind]}{beside}: {decision.reason}"
        return f"{_NOT_DONE[decision.kind]}{beside}: {decision.reason}"

    def printed(self) -> list[launch.Kernel]:
        """The kernels that run, and those that were asked for and do not."""
        kernels = []
        for text, choice in self.choices.items():
            spec, header = launch.parse(text), self._header(text)
            if choice.asked != choice.runs:
                try:
                    kernels.append(launch.make_kernel(spec, choice.asked, header, choice.note))
                except errors.NotPrintedError as error:
                    LOG.info("%s", error)
            kernels.append(launch.make_kernel(spec, choice.runs, header))
        return kernels

    def dump(self, where: Path) -> None:
        """Writes the kernels out for people to read."""
        dump.write(where, self.printed())
        verify.write_to(where, self.serves)

    def recall(self, key: str) -> str:
        """Takes up what an earlier compile of the same graph decided.

        Args:
            key: Of the graph with all that its code depends on, but for its kernels.

        Returns:
            The edition of the code that was made then, or ``""`` if that is not known, or a kernel
            runs on another target than it ran on then.
        """
        try:
            kept = json.loads(_path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        serves = {text: tuple(numbers) for text, (_, numbers) in kept["kernels"].items()}
        decisions = [Decision(k, tuple(n), done=d, reason=r) for k, n, d, r in kept["decisions"]]
        self.build(serves, decisions)
        if all(self.choices[text].runs == runs for text, (runs, _) in kept["kernels"].items()):
            return str(kept["edition"])
        self.choices, self.serves, self.decisions = {}, {}, []
        return ""

    def keep(self, key: str, edition: str) -> None:
        """Keeps what was decided, for compiles of the same graph that Inductor's caches answer.

        Args:
            key: As for `recall`.
            edition: Of the code that Inductor made of it.

        Raises:
            FolderError: The kernel cache cannot be written.
        """
        kernels = {t: (self.choices[t].runs, numbers) for t, numbers in self.serves.items()}
        decisions = [(d.kind, d.sites, d.done, d.reason) for d in self.decisions]
        kept = {"edition": edition, "kernels": kernels, "decisions": decisions}
        path = _path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            cache.write_atomically(path, json.dumps(kept))
        except OSError as error:
            place = ("kernel cache", path.parent, cache.ENVIRONMENT)
            raise errors.unwritable_folder(*place, error) from error

    def _header(self, text: str) -> Header:
        served = [self.origins[number] for number in self.serves.get(text, ())]
        modules, _, places = zip(*served, strict=True) if served else ((), (), ())
        where = dict.fromkeys(place for place in places if place)
        scheme = served[0][1] if served else ""
        return Header(tuple(dict.fromkeys(modules)), scheme, tuple(where))


def _path(key: str) -> Path:
    return cache.root() / "fused" / f"{key}.json"


_DONE = {"epilogue": "fused", "join": "joined", "prologue": "fused before it"}
_NOT_DONE = {
    "epilogue": "nothing fused after it",
    "join": "not joined",
    "prologue": "nothing fused before it",
}


def _seen_from(own: str, other: str) -> str:
    """A module's path without what it has in common with another's: ``key`` beside ``query``."""
    parts, beside = other.split("."), own.split(".")
    at = 0
    while at < min(len(parts), len(beside)) - 1 and parts[at] == beside[at]:
        at += 1
    return ".".join(parts[at:])
