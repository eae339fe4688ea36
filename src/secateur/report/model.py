"""report.json as typed data: what a run did, what it measured, and why something was not measured."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from secateur.core.errors import InputError
from secateur.report.files import write_text
from secateur.report.numbers import percent

__all__ = [
    "FILE_NAME",
    "MEASUREMENTS",
    "RECOVERY",
    "SCHEMA_VERSION",
    "Block",
    "Budget",
    "Calibration",
    "Layer",
    "Look",
    "Machine",
    "Precision",
    "Protocol",
    "Recovery",
    "Report",
    "Runtime",
    "Stage",
    "Structure",
    "Uniform",
    "Visits",
]

FILE_NAME = "report.json"
SCHEMA_VERSION = 1
RECOVERY = "recovery"
"""The pattern of a stage that removes nothing."""
MEASUREMENTS = (
    "nonzero_parameters_before",
    "nonzero_parameters_after",
    "perplexity_before",
    "perplexity_after",
    "kl_divergence",
    "top1_agreement",
    "prefill_tokens_per_second_before",
    "prefill_tokens_per_second_after",
    "decode_tokens_per_second_before",
    "decode_tokens_per_second_after",
    "peak_memory_bytes",
    "seconds",
)
"""Keys that may be null; a null one has its reason in `not_measured`."""


def _readable(value: Any) -> Any:
    """Bytes of a path that are not UTF-8 arrive as lone surrogates, which no JSON file can hold."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_readable)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """Unknown keys are kept: a report of a later release survives being read and written."""

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="strings")


class Protocol(_Part):
    """What a perplexity or divergence was measured on; two that differ cannot share an axis.

    `window` and `stride` are tokens, `windows` how many of them were read.
    """

    text: Text | None = None
    text_sha256: str
    split: str | None = None
    window: int
    stride: int
    windows: int | None = None
    dtype: str
    tokenizer_sha256: str


class Visits(_Part):
    """By block with routed experts, the tokens of the evaluation text that visited each of them."""

    before: dict[int, list[Count]]
    after: dict[int, list[Count]]


class Calibration(_Part):
    """The text observed: `windows` sequences of `length` tokens."""

    source: Text
    windows: int
    length: int
    sha256: str


class Machine(_Part):
    """Where the run took place."""

    cpu: str | None = None
    cores: int | None = None
    memory_bytes: int | None = None
    gpu: str | None = None
    threads: int | None = None


class Layer(_Part):
    """One matrix (or unit group). `loss`: see `Report.loss_definition`; `notes`: the method's own numbers."""

    block: int
    matrix: Text
    rows: Count
    columns: Count
    sparsity_requested: Fraction
    sparsity: Fraction
    loss: float | None = None
    seconds: float | None = None
    notes: dict[str, float] = Field(default_factory=dict)
    fallbacks: list[str] = Field(default_factory=list)


class Block(_Part):
    """One decoder block: `loss` is the relative squared error of its output against the dense block."""

    block: int
    loss: float | None = None
    seconds: float | None = None


class Budget(_Part):
    """A limit on the whole model: `planned` is what the plan comes to, `dense` what the dense model has.

    `unit`: `parameters`, `bytes` or `milliseconds` (of a token, one sequence, on the machine of the run).
    """

    unit: str
    limit: float
    planned: float
    dense: float


class Uniform(_Part):
    """The plan with all blocks alike that is nearest to the one that was taken.

    `score_lost` is the sum of the scores that go (see docs/structured-pruning.md), `score_lost_unequal` that
    of the plan that was taken, `extra_loss` their difference as a fraction of the latter.
    """

    units_a_block: dict[str, int]
    parameters: Count
    bytes: Count
    stock: bool
    score_lost: float
    score_lost_unequal: float
    extra_loss: float


class Structure(_Part):
    """A model whose matrices got smaller.

    `macs_per_token` are multiply-accumulates of the matrices of the blocks and of the head, without attention
    over the cache; `kv_bytes_per_token` is what the cache keeps of one token in the dtype of the files, null
    where the architecture does not tell. `floors` are the groups (`3.ffn`) that keep no more than `min_keep`.
    """

    units_before: dict[str, Count] = Field(default_factory=dict)
    units_after: dict[str, Count] = Field(default_factory=dict)
    non_embedding_parameters_before: Count
    non_embedding_parameters_after: Count
    macs_per_token_before: Count
    macs_per_token_after: Count
    kv_bytes_per_token_before: Count | None = None
    kv_bytes_per_token_after: Count | None = None
    stock: bool | None = None
    floors: list[str] = Field(default_factory=list)
    budget: Budget | None = None
    uniform: Uniform | None = None

    def unit_ratio(self) -> float | None:
        """Fraction of the units that is gone, kinds weighing alike; None where units are not counted."""
        shares = [self.units_after[kind] / count for kind, count in self.units_before.items() if count]
        return 1 - sum(shares) / len(shares) if shares else None


class Precision(_Part):
    """Weights in few bits: averages over routed experts, and over all matrices that were rounded.

    `bits` are those of codes alone, `stored_bits` with scales and all else that is stored of a matrix;
    `weights` were rounded in all; `experts` are the bits of each, by block.
    """

    bits_experts: float | None = None
    bits_matrices: float | None = None
    stored_bits_experts: float | None = None
    stored_bits_matrices: float | None = None
    weights: Count
    experts: dict[str, list[int]] = Field(default_factory=dict)


class Stage(_Part):
    """One stage of a chain: what it did, and how good its result is compared with the dense model."""

    method: str
    pattern: str
    options: dict[str, Any] = Field(default_factory=dict)
    sparsity: Fraction
    parameters_after: Count
    nonzero_parameters_after: Count | None = None
    bytes_after: Count
    perplexity_after: float | None = None
    kl_divergence: float | None = None


class Look(_Part):
    """One look at a training: `tokens` learnt from so far, losses in nats a token (`loss` is what was trained
    on, which with a teacher is another thing than the cross-entropy `validation_loss`)."""

    step: Count
    tokens: Count
    loss: float | None = None
    validation_loss: float
    learning_rate: float


class Storage(_Part):
    """Files with packed tensors: `tensors_plain` would not have become smaller in `format`; `dense_bytes` is
    what the same tensors take unpacked."""

    format: str
    tensors_packed: Count
    tensors_plain: Count
    dense_bytes: Count


class Runtime(_Part):
    """How the two models were loaded to be timed: `dense`, `packed` with what computes from packed weights,
    or `dense` with why packed weights were unpacked.

    `weight_bytes_*` is the memory of parameters and buffers, `dtype` that of activations and dense weights.
    """

    before: Text
    after: Text
    dtype: str
    weight_bytes_before: Count
    weight_bytes_after: Count


class Recovery(_Part):
    """How a model was mended.

    `perplexity_given` is that of the model as it came, on the text of `protocol`; `tokens` were learnt from,
    of which the text held `distinct_tokens`; the weights are those after `best_step` of `steps`.
    """

    how: str
    teacher: Text | None = None
    text: Text
    text_sha256: str
    tokens: Count
    distinct_tokens: Count
    steps: Count = 0
    best_step: Count = 0
    stopped_early: bool = False
    trained_parameters: Count = 0
    training_seconds: float = 0.0
    perplexity_given: float | None = None
    looks: list[Look] = Field(default_factory=list)


class Report(_Part):
    """A run: what was asked, what came out, what it cost. Field names are the keys of report.json.

    `sparsity` is the fraction removed of the prunable parameters; `kl_divergence` is in nats a token, from
    dense to pruned; `top1_agreement` a fraction of tokens. `family` is the architecture of the model.
    `loads_in` says of each engine `yes: ...` or `no: ...`, and whether it was tried.
    """

    schema_version: int = SCHEMA_VERSION
    model: Text
    family: str
    method: str
    pattern: str
    allocation: str
    options: dict[str, Any] = Field(default_factory=dict)
    sparsity_requested: Fraction
    sparsity: Fraction
    parameters_before: Count
    parameters_after: Count
    nonzero_parameters_before: Count | None = None
    nonzero_parameters_after: Count | None = None
    bytes_before: Count
    bytes_after: Count
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    kl_divergence: float | None = None
    top1_agreement: Fraction | None = None
    prefill_tokens_per_second_before: float | None = None
    prefill_tokens_per_second_after: float | None = None
    decode_tokens_per_second_before: float | None = None
    decode_tokens_per_second_after: float | None = None
    peak_memory_bytes: Count | None = None
    seconds: float | None = None
    protocol: Protocol | None = None
    expert_visits: Visits | None = None
    calibration: Calibration | None = None
    seed: int
    versions: dict[str, str]
    machine: Machine = Field(default_factory=Machine)
    date: datetime
    command: Text
    fingerprint: str
    effect: str
    loads_in: dict[str, Text] = Field(default_factory=dict)
    loss_definition: str = (
        "relative squared error of the output on the calibration text "
        "(of a matrix: from the second moment of its input where the method collects no Hessian)"
    )
    budget: str | None = None
    structure: Structure | None = None
    precision: Precision | None = None
    layers: list[Layer] = Field(default_factory=list)
    blocks: list[Block] = Field(default_factory=list)
    stages: list[Stage] = Field(default_factory=list)
    recovery: Recovery | None = None
    storage: Storage | None = None
    runtime: Runtime | None = None
    warnings: list[Text] = Field(default_factory=list)
    not_measured: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _nulls_have_reasons(self) -> Report:
        for key in MEASUREMENTS:
            absent, reason = getattr(self, key) is None, self.not_measured.get(key)
            if absent and not reason:
                raise ValueError(f"{key} is null and not_measured gives no reason")
            if reason and not absent:
                raise ValueError(f"{key} has a value and a reason for having none")
        if self.protocol is None and (self.perplexity_after is not None or self.kl_divergence is not None):
            raise ValueError("quality was measured but its protocol is not given")
        return self

    @property
    def name(self) -> str:
        """The model as people call it: a hub id in full, of a path the last folder."""
        path = PurePath(self.model.replace("\\", "/"))
        local = path.is_absolute() or len(path.parts) != 2 or path.parts[0] in ("..", "~") or path.drive
        return path.name or self.model if local else str(path)

    @property
    def title(self) -> str:
        """What was done, in two words."""
        if self.precision:
            return f"{self.method} {self.precision.stored_bits_matrices or 0:.2f} bits"
        return f"{self.method} recovery" if self.recovery else f"{self.method} {percent(self.sparsity)}"

    def fallbacks(self) -> Iterator[tuple[str, list[Layer]]]:
        """Each thing that was done differently than asked, with the matrices it was done to."""
        phrases = dict.fromkeys(phrase for layer in self.layers for phrase in layer.fallbacks)
        for phrase in phrases:
            yield phrase, [layer for layer in self.layers if phrase in layer.fallbacks]

    def as_stage(self) -> Stage:
        """What a chain remembers of this run."""
        return Stage.model_validate({name: getattr(self, name) for name in Stage.model_fields})

    def measured(self, **values: Any) -> Report:
        """A copy with these fields set, their reasons for being null dropped, and everything validated."""
        now = {key for key, value in values.items() if value is not None}
        reasons = {key: why for key, why in self.not_measured.items() if key not in now}
        return Report.model_validate({**dict(self), "not_measured": reasons, **values})

    def save(self, path: Path) -> None:
        """Write `path`, or `path`/report.json for a folder, atomically. Raises `OutputError`."""
        write_text(path / FILE_NAME if path.is_dir() else path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report.json, or the one in a folder. Raises `InputError` when none is valid."""
        file = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        try:
            report = cls.model_validate_json(file.read_bytes())
        except OSError as error:
            raise InputError(
                f"cannot read {file} ({error.strerror or error})",
                f"a folder written by secateur, with a {FILE_NAME} inside",
                "run `secateur prune MODEL -o FOLDER` first, or correct the path",
            ) from error
        except ValidationError as error:
            raise _invalid(file, error) from error
        if report.schema_version > SCHEMA_VERSION:
            seen = f"{file} has schema_version {report.schema_version}"
            raise InputError(seen, f"at most {SCHEMA_VERSION}", "upgrade: pip install -U secateur")
        return report


def _invalid(file: Path, error: ValidationError) -> InputError:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return InputError(
        f"{file} is no valid report ({where}: {first['msg'].lower()})",
        "the keys and types of a report",
        "write it again with `secateur prune` or `secateur evaluate`",
    )
