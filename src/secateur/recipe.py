"""What the user asked for, checked before any weight is read."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from secateur.checkpoint.packing import DENSE, FORMATS
from secateur.core.budget import Target
from secateur.core.errors import InputError, RecipeError, did_you_mean
from secateur.core.method import METHODS, Method
from secateur.core.pattern import Pattern
from secateur.core.plan import Plan
from secateur.recovery.schedule import Split, shard_sizes, stage_sparsities

if TYPE_CHECKING:
    from secateur.recovery.base import RecoveryMethod

__all__ = ["Calibration", "Job", "Recipe", "Recovery", "RecoveryRecipe", "read_recipe"]

DType = Literal["auto", "float32", "bfloat16", "float16"]
MAX_DEFAULT_LENGTH = 2048
SMALLER = {"budget": ("structure", "experts"), "plan": ("structure",)}
"""The families that take it in place of a sparsity."""


class Calibration(BaseModel):
    """The data that is observed.

    Attributes:
        source: `self` (sampled from the model), a text, JSONL or Parquet file, or a hub data set.
        samples: windows to observe.
        length: tokens a window; by default what the model allows, at most 2,048.
        column: which column of a JSONL, Parquet or hub data set holds the text.
        batch_size: windows a forward pass, by default what suits the device; changes speed and memory, not
            the result beyond rounding.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "self"
    samples: int = Field(default=128, ge=1)
    length: int | None = Field(default=None, ge=2)
    column: str | None = None
    batch_size: int | None = Field(default=None, ge=1)


class Job(BaseModel):
    """What every run has: a model, where and in what to compute, and the text that judges the result.

    Attributes:
        model: a local folder, a hub id, or `seedling`.
        calibration: the data observed.
        text: held-out text for the evaluation; by default windows kept back from the calibration source.
        evaluation_windows: windows evaluated before and after; 0 skips the evaluation.
        seed: of sampling and of random choices.
        device: `auto`, `cpu`, `cuda` or `cuda:n`.
        dtype: computing precision; `auto` is float32 on the CPU and the model's own on a GPU.
        measure_speed: measure prefill and decode before and after (needs the whole model in memory).
        check_loading: open the result in a fresh process, as a stranger would.
        format: how weights with zeros are stored: `dense`, `bitmask`, or `nm` for N:M patterns.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    calibration: Calibration = Field(default=Calibration())
    text: str | None = None
    evaluation_windows: int = Field(default=64, ge=0)
    seed: int = 0
    device: str = "auto"
    dtype: DType = "auto"
    measure_speed: bool = True
    check_loading: bool = True
    format: str = DENSE

    def check_format(self) -> None:
        """Raises `RecipeError` for a format that does not exist."""
        if self.format != DENSE and (self.format not in FORMATS or FORMATS.get(self.format).variant):
            names = [DENSE, *(name for name, format in FORMATS if format.exact and not format.variant)]
            raise RecipeError(f"unknown format {self.format!r}", "", did_you_mean(self.format, names))


class Recipe(Job):
    """One pruning run.

    Attributes:
        method: id of a method (`secateur methods`).
        sparsity: fraction of the prunable parameters to remove; may be left out with an N:M pattern.
        budget: what the whole model comes down to instead: `parameters=1.2M`, `bytes=900MB`, `decode=0.8x`.
        pattern: `unstructured`, `row`, `matrix`, `global` or `N:M`.
        allocation: how the budget is spread over the blocks.
        options: options of the method.
        allocation_options: options of the allocation.
        scores: `scores.safetensors` of an earlier structured run on this model, to plan from.
        plan: file of a plan to apply, which also says the method and its options.
    """

    method: str
    sparsity: float | None = None
    budget: str | None = None
    pattern: str = "unstructured"
    allocation: str = "uniform"
    options: dict[str, Any] = Field(default_factory=dict)
    allocation_options: dict[str, Any] = Field(default_factory=dict)
    scores: str | None = None
    plan: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _as_planned(cls, values: Any) -> Any:
        """A plan says the method and the options that are not given."""
        if not isinstance(values, dict) or not values.get("plan"):
            return values
        plan = Plan.load(values["plan"])
        options = {**plan.options, **(values.get("options") or {})}
        return {**values, "method": values.get("method") or plan.method, "options": options}

    @property
    def parsed_pattern(self) -> Pattern:
        return Pattern.parse(self.pattern)

    @property
    def target(self) -> Target | None:
        """The budget asked for. Raises `RecipeError`."""
        return None if self.budget is None else Target.parse(self.budget)

    @property
    def resolved_sparsity(self) -> float:
        """The sparsity asked for, from the number or from the N:M pattern. Raises `RecipeError`."""
        implied = self.parsed_pattern.sparsity
        if self.sparsity is None:
            if implied is None:
                raise RecipeError(
                    "no sparsity", "a fraction between 0 and 1", "add --sparsity 0.5 or --pattern 2:4"
                )
            return implied
        if not 0 <= self.sparsity < 1:
            raise RecipeError(
                f"sparsity {self.sparsity:g}",
                "a fraction removed, at least 0 and below 1",
                "for half of the weights give 0.5",
            )
        if implied is not None and abs(implied - self.sparsity) > 1e-9:
            raise RecipeError(
                f"sparsity {self.sparsity:g} with pattern {self.pattern}",
                f"{implied:g}, which {self.pattern} fixes",
                "leave --sparsity out",
            )
        return self.sparsity

    def validated(self) -> Recipe:
        """Check everything that needs no model: sparsity, pattern, method, allocation and their options.

        Raises:
            RecipeError: the first thing that does not exist or does not fit, with a suggestion.
        """
        from secateur.weights.allocation import ALLOCATIONS

        self.check_format()
        method = METHODS.get(self.method)
        self._check_amount(method)
        method.from_options(self.options)
        ALLOCATIONS.get(self.allocation).from_options(self.allocation_options)
        if self.scores is not None and method.family == "weights":
            raise RecipeError(
                f"scores with method {self.method!r}, which removes {method.removes}",
                "a method that removes whole units",
                "leave --scores out",
            )
        for key in ("pattern", "allocation"):
            if method.family != "weights" and getattr(self, key) != Recipe.model_fields[key].default:
                raise RecipeError(
                    f"{key} {getattr(self, key)} with method {self.method!r}, which removes {method.removes}",
                    f"a method of single weights, or no {key}",
                    f"leave --{key} out",
                )
        if self.format == "nm" and self.parsed_pattern.kind != "n:m":
            raise RecipeError(
                f"format nm with pattern {self.pattern}", "an N:M pattern such as 2:4", "use --format bitmask"
            )
        if self.parsed_pattern.kind == "global" and self.allocation != "uniform":
            raise RecipeError(
                f"pattern global with allocation {self.allocation!r}",
                "one of the two, since both spread the budget over the blocks",
                "leave --allocation out",
            )
        return self

    def _check_amount(self, method: type[Method]) -> None:
        """Exactly one thing says how much goes."""
        given = [name for name in ("sparsity", "budget", "plan") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(" and ".join(given), "one of them", f"leave --{given[0]} out")
        if method.sized_by:
            if given:
                raise RecipeError(
                    f"a {given[0]} with method {self.method!r}",
                    f"the option {method.sized_by}, which says how much goes",
                    f"leave --{given[0]} out and give -O {method.sized_by}=...",
                )
            return
        if self.budget is None and self.plan is None:
            _ = self.resolved_sparsity
            return
        if method.family not in SMALLER[given[0]]:
            raise RecipeError(
                f"a {given[0]} with method {self.method!r}, which removes {method.removes}",
                "a structured method, whose result is smaller",
                "give --sparsity, or choose a method of `secateur methods` that removes whole units",
            )
        _ = self.target
        if self.plan is not None:
            planned = Plan.load(self.plan).method
            if planned != self.method:
                raise RecipeError(
                    f"method {self.method!r} with a plan of {planned!r}", "", "leave --method out"
                )
            if self.scores is not None:
                raise RecipeError("scores and a plan", "one of them", "leave --scores out")


class Recovery(BaseModel):
    """How a pruned model is mended.

    Attributes:
        how: `lora`, `full` or `refit`.
        text: what it learns from: a text, JSONL or Parquet file, a hub data set, or `self` (sampled).
        column: which column of the text holds it.
        teacher: the dense model to learn from and to be judged against; None: of a chain the dense model,
            else none. `none` is for none in a chain, too.
        tokens: that are learnt from in all; a text with fewer is read again in another order.
        skip: tokens of the text that are passed over first, such as those an earlier stage has learnt from.
        length: tokens a window; by default what the model allows, at most 2,048.
        batch_size: windows a step.
        learning_rate, rank: the options of these names.
        validation_windows: kept back from the text to choose the best weights by.
        options: of `lora`, `full` or `refit`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    how: str = "lora"
    text: str
    column: str | None = None
    teacher: str | None = None
    tokens: int = Field(default=200_000, ge=0)
    skip: int = Field(default=0, ge=0)
    length: int | None = Field(default=None, ge=2)
    batch_size: int = Field(default=8, ge=1)
    learning_rate: float | None = None
    rank: int | None = None
    validation_windows: int = Field(default=16, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)

    def method(self) -> RecoveryMethod:
        """The way to recover with its options. Raises `RecipeError` for one that does not exist."""
        from secateur.recovery.base import RECOVERIES

        given = {"learning_rate": self.learning_rate, "rank": self.rank}
        named = {name: value for name, value in given.items() if value is not None}
        method: RecoveryMethod = RECOVERIES.get(self.how).from_options({**self.options, **named})
        return method


class RecoveryRecipe(Job):
    """One recovery run; `calibration` and `text` are what judges the result, never what it learns from."""

    recover: Recovery

    @classmethod
    def alone(cls, values: dict[str, Any], where: str) -> RecoveryRecipe:
        """From flat settings, those of `Recovery` and of `Job` side by side: `text` is what is learnt from,
        `evaluation_text` what judges the result; by default the first windows of `text`, kept back."""
        recover: Recovery = parse(Recovery, {k: v for k, v in values.items() if k not in _JOB_ONLY}, where)
        first = {"source": recover.text, "column": recover.column, "length": recover.length, "samples": 1}
        own = {key: value for key, value in values.items() if key in _JOB_ONLY}
        own["text"] = own.pop("evaluation_text", None)
        made: RecoveryRecipe = parse(cls, {**own, "recover": recover, "calibration": first}, where)
        return made

    def validated(self) -> RecoveryRecipe:
        """Check everything that needs no model. Raises `RecipeError` and `MissingExtraError`."""
        self.check_format()
        self.recover.method().require_packages()
        return self


_JOB_ONLY = {*Job.model_fields, "evaluation_text"} - {"text", "calibration"}


def parse(model: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    """Validate `values` as `model`; a wrong or unknown key becomes one clear line."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise RecipeError(
                f"unknown key {key!r} in {where}", "", did_you_mean(key, _keys(model))
            ) from error
        raise RecipeError(f"{key} = {first['input']!r} in {where}", first["msg"].lower()) from error


def _keys(model: type[BaseModel]) -> list[str]:
    nested = [f"calibration.{name}" for name in Calibration.model_fields] if issubclass(model, Job) else []
    nested += [f"recover.{name}" for name in Recovery.model_fields] if model is RecoveryRecipe else []
    return [*model.model_fields, *nested]


def read_recipe(path: Path, **overrides: Any) -> list[Recipe | RecoveryRecipe]:
    """The stages of a YAML file, one where it has no `stages`; what the command line says wins everywhere.

    Raises:
        InputError: file missing or not YAML.
        RecipeError: an unknown or wrong key.
    """
    values = _read_yaml(path)
    turns = values.pop("interleave", None)
    if turns is not None and "stages" in values:
        raise RecipeError(f"stages and interleave in {path}", "one of them", "see docs/recipes.md")
    if turns is not None:
        values["stages"] = parse(Interleave, turns, f"interleave in {path}").stages()
    stages = values.pop("stages", [{}])
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise RecipeError(
            f"stages in {path}", "a list with the settings of each stage", "see docs/recipes.md"
        )
    shared = ("model", "device", "dtype") if len(stages) > 1 else ()
    own = [key for stage in stages for key in shared if key in stage]
    if own:
        raise RecipeError(
            f"{own[0]} in a stage of {path}", "one for all stages", f"write {own[0]} above the stages"
        )
    return [_stage(_merged(values, stage), overrides, str(path)) for stage in stages]


class Interleave(BaseModel):
    """Pruning and training in turns, which become the stages of a chain (adapt-pruner, section 2.4).

    Attributes:
        turns: of pruning and training.
        sparsity: fraction removed after all of them, in equal amounts.
        prune: settings of the pruning stages.
        recover: settings of the training stages; `tokens` is what all of them learn from.
        split: `linear` gives later turns more of the tokens, `constant` all the same.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    turns: int = Field(ge=2)
    sparsity: float = Field(gt=0, lt=1)
    prune: dict[str, Any]
    recover: dict[str, Any]
    split: Split = "linear"

    def stages(self) -> list[dict[str, Any]]:
        """The stages; one curve of the learning rate and one pass over the text run through them."""
        recover = Recovery.model_validate(self.recover)
        sizes = shard_sizes(recover.tokens, self.turns, self.split)
        found: list[dict[str, Any]] = []
        for size, sparsity, behind in zip(
            sizes, stage_sparsities(self.sparsity, self.turns), accumulate([0, *sizes]), strict=False
        ):
            part = {
                "schedule": "wsd",
                **recover.options,
                "schedule_start": behind / max(recover.tokens, 1),
                "schedule_end": (behind + size) / max(recover.tokens, 1),
            }
            train = {**self.recover, "tokens": size, "skip": recover.skip + behind, "options": part}
            found += [{**self.prune, "sparsity": sparsity}, {"recover": train}]
        return found


def _stage(values: dict[str, Any], overrides: dict[str, Any], where: str) -> Recipe | RecoveryRecipe:
    """A stage that prunes, or one with the key `recover`, which takes of the rest what every run has."""
    kind = RecoveryRecipe if "recover" in values else Recipe
    if kind is RecoveryRecipe:
        overrides = {key: value for key, value in overrides.items() if key in Job.model_fields}
    made: Recipe | RecoveryRecipe = parse(kind, _merged(values, overrides), where)
    return made


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {path} cannot be read ({error.strerror})", "a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {path} is not YAML ({str(error).splitlines()[0]})", "keys and values"
        ) from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"recipe {path} holds a {type(values).__name__}", "keys and values, such as 'method: wanda'"
        )
    return values


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`values` with `changes`, the settings of calibration one by one."""
    merged = {**values, **changes}
    both = values.get("calibration"), changes.get("calibration")
    if all(isinstance(part, dict) for part in both):
        merged["calibration"] = {**both[0], **both[1]}  # type: ignore[dict-item]
    return merged
