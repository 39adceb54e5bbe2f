"""What passes share: the graph on its way, the sites found in it, and what was refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from fxquant.codegen.spec import WeightOperand
from fxquant.config import Config
from fxquant.formats import Encoding, PackedWeight
from fxquant.passes.groups import Ends, Picked
from fxquant.passes.regions import Region
from fxquant.passes.scales import ScaledWeight
from fxquant.passes.sources import DerivedPart, PackedPart, Remember, Rule, Tools
from fxquant.schemes import Recipe

# Kinds of refusals that `strict` and `min_coverage` do not count.
SKIPPED, NOT_A_PARAMETER = "skipped", "not a parameter"
LEFT = "left"


@dataclass(frozen=True)
class Refusal:
    """Why a product was left alone, and where it stands in the user's source.

    Attributes:
        reason: One clause, as in ``"the skip pattern 'lm_head' matches"``.
        where: ``file:line`` of the user's code, or ``""`` when Dynamo did not record it.
        module: Path of the module, as in ``"encoder.layer.0.output.dense"``.
        op: The call that was looked at, as in ``"aten.linear"``.
        shape: Shape of the parameter, or ``()``.
        parameter: Name of the parameter, or ``""``.
        kind: ``SKIPPED`` and ``NOT_A_PARAMETER`` are no loss of coverage; ``LEFT`` is.
    """

    reason: str
    where: str
    module: str
    op: str
    shape: tuple[int, ...] = ()
    parameter: str = ""
    kind: str = LEFT

    @property
    def is_loss(self) -> bool:
        """Whether `strict` and `min_coverage` count it."""
        return self.kind == LEFT


@dataclass
class BoundParameter:
    """A placeholder and the parameter behind it.

    Attributes:
        node: The placeholder in the outermost graph.
        value: The real tensor: a dense `nn.Parameter` or a `PackedWeight`.
        name: Its path in the model, as in ``"layers.0.weight"``.
        index: Its position among Dynamo's inputs.
    """

    node: fx.Node
    value: Tensor
    name: str
    index: int


@dataclass
class LinearSite:
    """A product against a parameter.

    Attributes:
        node: The ATen product.
        x: The activation; `to_x` and `from_out` adapt it to ``[.., K]`` and back.
        parameter: The weight.
        operand: Where the logical weight lies in the parameter, by strides; its encoding is a
            placeholder until `plan` sets it.
        n_dims: Dimensions of the parameter that make up the outputs.
        k_dims: Dimensions of the parameter that make up the inputs.
        bias: Added in the product's own op (``linear``, ``addmm``, ``conv``), or None.
        module: Path of the module that the product belongs to.
        where: ``file:line`` in the user's source.
        region: The graph it stands in: the outermost one, or the body of a higher-order op.
        scheme: Set by `plan`.
        recipe: Set by `plan`.
        in_scale: By what `smooth` divides the activation's channels, a rule that gives float32
            ``[k]``, or None. The weight's columns are multiplied by it, and `x` is divided already.
        scaled: How the weight is packed with its scales, or None where it has none. Set by
            `smooth`.
        ends: Of a grouped product: gives the row after the last of each matrix of the batch, which
            are int32 ``[batch]``. Else None.
        notes: What was done to the site, for the report.
        packed: Set by `pack`.
        spec_json: Set by `pack`.
        quantize_json: What quantizes the activation apart from the product, or ``""``. Set by
            `pack`.
        limit: What that saturates at, a rule that gives float32 ``[1]``, or None. Set by `pack`.
    """

    node: fx.Node
    x: fx.Node
    parameter: BoundParameter
    operand: WeightOperand
    n_dims: tuple[int, ...]
    k_dims: tuple[int, ...]
    bias: fx.Node | None
    module: str
    where: str
    region: Region
    to_x: Callable[[fx.Node], fx.Node] | None = None
    from_out: Callable[[fx.Node], fx.Node] | None = None
    ends: Ends | None = None
    scheme: str = ""
    recipe: Recipe | None = None
    in_scale: Rule | None = None
    scaled: ScaledWeight | None = None
    notes: list[str] = field(default_factory=list)
    packed: PackedWeight | None = None
    spec_json: str = ""
    quantize_json: str = ""
    limit: Rule | None = None


@dataclass(frozen=True)
class PassReport:
    """What one pass did: its name, and a line for the log."""

    name: str
    summary: str


@dataclass
class Context:
    """One graph on its way through the passes.

    Attributes:
        gm: The graph module being rewritten: after `normalize` a copy, never Dynamo's own.
        inputs: Example inputs, one a placeholder, in order. `pack` appends and drops some.
        config: The options.
        pack_weight: ``(tensor, encoding, name) -> PackedWeight``: packs, or finds what was packed.
        sources: For each of the final inputs: the position among Dynamo's inputs that it comes
            from, the part of a packed parameter, or of what a rule makes of parameters.
        remember: Keeps what is made of parameters for as long as they live unchanged.
        derived: Inputs that are made of parameters, by their placeholder in the outermost graph.
        regions: The graph and the bodies of its higher-order ops, the outermost first.
        parameters: Bound parameters by their placeholder in the outermost graph.
        sites: Products to quantize.
        refusals: Products left alone.
        picked: Orders of rows, by the numbers that pick their matrices and how many there are.
    """

    gm: fx.GraphModule
    inputs: list[Any]
    config: Config
    pack_weight: Callable[[Tensor, Encoding, str], PackedWeight]
    sources: list[int | PackedPart | DerivedPart] = field(default_factory=list)
    remember: Remember = lambda key, parameters, make: make()  # noqa: ARG005
    derived: dict[fx.Node, DerivedPart] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)
    parameters: dict[fx.Node, BoundParameter] = field(default_factory=dict)
    sites: list[LinearSite] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    picked: dict[tuple[fx.Node, int], Picked] = field(default_factory=dict)

    @property
    def tools(self) -> Tools:
        """What rules may use."""
        return Tools(self.pack_weight, self.remember)
