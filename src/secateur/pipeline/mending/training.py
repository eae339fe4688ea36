"""The blocks of a model mended and written: by training it whole, or by least squares block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from safetensors import safe_open
from torch import Tensor

from secateur.calibration.driver import BATCH_TOKENS, Driver, OpenBlock
from secateur.calibration.windows import Windows
from secateur.checkpoint.writer import CheckpointWriter
from secateur.core.errors import AnatomyError, InputError, RecipeError
from secateur.core.progress import Progress
from secateur.evaluation.memory import available_memory_bytes
from secateur.pipeline.mending.data import RecoveryData
from secateur.pipeline.opened import Opened, choose_dtype
from secateur.pipeline.state import SCORES, as_stored, part_name
from secateur.recipe import RecoveryRecipe
from secateur.recovery.base import RecoveryMethod, Training
from secateur.recovery.refit import Refit
from secateur.recovery.stream import Refitted, adds_up, refit_block
from secateur.recovery.student import Student, matrix_parameters
from secateur.recovery.trainer import Curve, Teacher, Trainer, steps_of
from secateur.report.model import FILE_NAME, Layer, Report

__all__ = ["Mended", "Mending", "check_mending", "count_zeros", "mend"]

STATE = "training.safetensors"
TRAINED_BYTES = 16
"""Of a float32 weight, its gradient and its two moments."""
PROBE_TOKENS = 8
NOT_ADDED = "left as it is: the block does not simply add what its matrices write"
NO_BETTER = "left as it is: its error on text kept back would not have fallen"


@dataclass(frozen=True)
class Mending:
    """What a recovery works with.

    Attributes:
        opened: the pruned model.
        teacher: the dense one, or None.
        method: the way, with its options.
    """

    recipe: RecoveryRecipe
    opened: Opened
    teacher: Opened | None
    method: RecoveryMethod
    device: torch.device
    progress: Progress


@dataclass
class Mended:
    """What was done to the blocks, which are written by now.

    Attributes:
        layers: a row a matrix that was solved for.
        curve: of a training.
        trained: parameters that were trained.
        warnings: what the user should know.
    """

    layers: list[Layer] = field(default_factory=list)
    curve: Curve | None = None
    trained: int = 0
    warnings: list[str] = field(default_factory=list)


def check_mending(job: Mending) -> None:
    """Refuse, before anything is written, what cannot be done.

    Raises:
        InputError: a teacher of another kind, a model that is too large or cannot be mended this way.
    """
    job.method.check(job.opened.anatomy)
    if job.method.needs_teacher and job.teacher is None:
        raise RecipeError(f"{job.method.id} without a teacher", "the dense model", "add --teacher DENSE")
    if job.teacher is not None:
        _check_teacher(job, job.teacher)
    if isinstance(job.method, Training):
        _check_memory(job, job.method)
        job.method.check_importance(_importance(job.opened), len(job.opened.anatomy.blocks))
    else:
        _check_stream(job)


def mend(job: Mending, data: RecoveryData, writer: CheckpointWriter) -> Mended:
    """Write all blocks; those of an interrupted run are done."""
    if isinstance(job.method, Training):
        return _train(job, job.method, data, writer)
    assert isinstance(job.method, Refit)
    return _refit(job, job.method, data, writer)


def _train(job: Mending, method: Training, data: RecoveryData, writer: CheckpointWriter) -> Mended:
    recover, opened = job.recipe.recover, job.opened
    dtype, autocast = _precision(job, method)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.recipe.seed)
        model = opened.load(dtype, job.device, spread=_spread(opened, job.device))
        student = method.student(model, opened.anatomy, _importance(opened))
    teacher, warnings = _loaded_teacher(job, method)
    trainer = Trainer(
        student,
        teacher,
        method,
        data.training,
        data.validation,
        batch_size=recover.batch_size,
        steps=steps_of(recover.tokens, recover.batch_size, data.training.length),
        seed=job.recipe.seed,
        saved=writer.workspace / STATE,
        device=job.device,
        autocast=autocast,
        progress=job.progress,
    )
    curve = trainer.run()
    _write(job, student, writer)
    trained = sum(parameter.numel() for parameter in student.parameters.values())
    return Mended(curve=curve, trained=trained, warnings=warnings)


def _write(job: Mending, student: Student, writer: CheckpointWriter) -> None:
    layout, checkpoint = job.opened.layout, job.opened.checkpoint
    for block in job.opened.anatomy.blocks:
        part = part_name(block.index)
        if part in writer.parts:
            continue
        stored = layout.assemble(block.index, checkpoint.read(layout.block_names(block.index)))
        mended = student.merged(block, stored)
        writer.write(part, layout.disassemble(block.index, mended), {})


def _precision(job: Mending, method: Training) -> tuple[torch.dtype, torch.dtype | None]:
    """What weights are held in, and what is computed in where that differs. float16 has too small a range to
    train in (llm-pruner, section 5)."""
    chosen = choose_dtype(job.recipe.dtype, job.device, job.opened.stored_dtype)
    held = torch.bfloat16 if chosen == torch.bfloat16 and not method.trains_weights else torch.float32
    halves = job.device.type == "cuda" and held == torch.float32 and job.recipe.dtype != "float32"
    return held, torch.bfloat16 if halves and torch.cuda.is_bf16_supported() else None


def _loaded_teacher(job: Mending, method: Training) -> tuple[Teacher | None, list[str]]:
    """The dense model in memory, and what is to be said about it."""
    if job.teacher is None:
        return None, []
    dtype = choose_dtype(job.recipe.dtype, job.device, job.teacher.stored_dtype)
    model = job.teacher.load(dtype, job.device, spread=_spread(job.teacher, job.device)).requires_grad_(False)
    if method.hidden == "none":
        return Teacher(model), []
    matching = _matching(job.opened, job.teacher)
    if matching is None:
        return Teacher(model), [
            "Hidden states were not compared: it is not known which blocks of the teacher are left."
        ]
    blocks = job.teacher.anatomy.blocks
    return Teacher(model, [model.get_submodule(blocks[index].prefix) for index in matching]), []


def _matching(opened: Opened, teacher: Opened) -> Sequence[int] | None:
    """For each block the teacher's, where the report of the run that removed some says which are left."""
    count, dense = len(opened.anatomy.blocks), len(teacher.anatomy.blocks)
    if count == dense:
        return range(count)
    if not (opened.folder / FILE_NAME).is_file():
        return None
    rows = [row for row in Report.load(opened.folder).layers if row.matrix == "block"]
    kept = [row.block for row in rows if row.sparsity < 1]
    return kept if len(rows) == dense and len(kept) == count else None


def _importance(opened: Opened) -> Tensor | None:
    """(L,) how much each block turns the hidden state, if a pruning run has left it beside the weights."""
    path = opened.folder / SCORES
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return file.get_tensor("turns") if "turns" in file.keys() else None  # noqa: SIM118


def _check_teacher(job: Mending, teacher: Opened) -> None:
    sizes = [model.config.get_text_config().vocab_size for model in (job.opened, teacher)]
    if sizes[0] != sizes[1]:
        raise RecipeError(
            f"a teacher with {sizes[1]} tokens in its vocabulary for a model with {sizes[0]}",
            "the same vocabulary",
            "give the dense model that was pruned",
        )
    widths = [model.anatomy.spaces["hidden"] for model in (job.opened, teacher)]
    depths = [len(model.anatomy.blocks) for model in (job.opened, teacher)]
    same_depth = depths[0] == depths[1] or not isinstance(job.method, Refit)
    alike = getattr(job.method, "hidden", "none") == "none" and isinstance(job.method, Training)
    if not alike and (widths[0] != widths[1] or not same_depth):
        raise RecipeError(
            f"a teacher of {depths[1]} blocks, {widths[1]} wide, for {depths[0]} blocks, {widths[0]} wide",
            "hidden states that compare",
            "learn from its predictions alone: --how lora or full, without -O hidden",
        )


def _check_stream(job: Mending) -> None:
    """Try the first block on a few tokens."""
    dtype = choose_dtype(job.recipe.dtype, job.device, job.opened.stored_dtype)
    driver = Driver(job.opened.source(job.device, dtype), Windows.of(torch.arange(PROBE_TOKENS).view(1, -1)))
    for block in driver.blocks(outputs=False):
        if adds_up(block):
            return
        raise AnatomyError(
            f"blocks of {job.opened.anatomy.family!r} do not simply add what their matrices write",
            "a residual stream without norms, factors or experts between",
            "train instead: --how lora or full",
        )


def _check_memory(job: Mending, method: Training) -> None:
    parameters = job.opened.checkpoint.parameters
    held = _precision(job, method)[0].itemsize
    needed = parameters * (TRAINED_BYTES if method.trains_weights else held)
    if job.teacher is not None:
        dtype = choose_dtype(job.recipe.dtype, job.device, job.teacher.stored_dtype)
        needed += job.teacher.checkpoint.parameters * dtype.itemsize
    free = _free_bytes(job.device)
    if needed > free:
        raise InputError(
            f"{job.method.id} needs {needed / 1e9:.1f} GB for weights alone and {free / 1e9:.1f} GB are free",
            "a model that fits",
            "use --how refit, which holds one block at a time"
            + (", or --how lora" if method.trains_weights else ""),
        )


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return available_memory_bytes()
    return sum(torch.cuda.mem_get_info(index)[0] for index in _places(device))


def _places(device: torch.device) -> Sequence[int]:
    """The GPUs that may be used: the one that was named, or all."""
    return range(torch.cuda.device_count()) if device.index is None else [device.index]


def _spread(opened: Opened, device: torch.device) -> bool:
    """Whether accelerate shall place the blocks on several GPUs: where one cannot hold them twice."""
    if device.type != "cuda" or len(_places(device)) < 2:
        return False
    return 2 * opened.checkpoint.dense_nbytes > torch.cuda.mem_get_info(device)[0]


def _refit(job: Mending, method: Refit, data: RecoveryData, writer: CheckpointWriter) -> Mended:
    assert job.teacher is not None
    layers: list[Layer] = []
    pruned = _driver(job, job.opened, data, _reader(writer))
    dense = _driver(job, job.teacher, data)
    with job.progress.task("refitting", len(job.opened.anatomy.blocks)) as task:
        pairs = zip(pruned.blocks(outputs=False), dense.blocks(outputs=False), strict=True)
        for student, teacher in pairs:
            record = writer.parts.get(part_name(student.index))
            if record is None:
                rows = _refit_one(job, method, student, teacher, len(data.training))
                stored, _ = as_stored(job.opened, student)
                record = {"layers": [row.model_dump(mode="json") for row in rows]}
                writer.write(part_name(student.index), stored, record)
            layers += [Layer.model_validate(row) for row in record["layers"]]
            student.finish()
            teacher.finish()
            task.advance()
    return Mended(layers)


def _refit_one(
    job: Mending, method: Refit, student: OpenBlock, teacher: OpenBlock, first_judging: int
) -> list[Layer]:
    if not (adds_up(student) and adds_up(teacher)):
        return [_left(student.index)]
    done = refit_block(method, student, teacher, first_judging, job.opened.stored_dtype)
    return [_row(student.index, refitted) for refitted in done]


def _left(block: int) -> Layer:
    return Layer(
        block=block,
        matrix="block",
        rows=0,
        columns=0,
        sparsity_requested=0,
        sparsity=0,
        fallbacks=[NOT_ADDED],
    )


def _row(block: int, done: Refitted) -> Layer:
    rows, columns = done.matrix.shape
    return Layer(
        block=block,
        matrix=done.matrix.name,
        rows=rows,
        columns=columns,
        sparsity_requested=0,
        sparsity=0,
        loss=done.after,
        notes={"loss_before": done.before, **({"damping": done.damping} if done.changed else {})},
        fallbacks=[] if done.changed else [NO_BETTER],
    )


def _driver(
    job: Mending,
    opened: Opened,
    data: RecoveryData,
    read: Callable[[int], dict[str, Tensor] | None] | None = None,
) -> Driver:
    """A pass over all windows, in batches so small that one lies in those that judge."""
    dtype = choose_dtype(job.recipe.dtype, job.device, opened.stored_dtype)
    fitting = BATCH_TOKENS[job.device.type] // data.training.length
    at_once = max(1, min(len(data.validation), fitting))
    return Driver(opened.source(job.device, dtype, read=read), data.both, batch_size=at_once)


def _reader(writer: CheckpointWriter) -> Callable[[int], dict[str, Tensor] | None]:
    """Blocks that an interrupted run has refitted."""
    done = frozenset(writer.parts)
    return lambda index: writer.read(part_name(index)) if part_name(index) in done else None


def count_zeros(opened: Opened) -> int:
    """Weights of matrices that are zero."""
    zeros = 0
    for block in opened.anatomy.blocks:
        layout = opened.layout
        tensors = layout.assemble(block.index, opened.checkpoint.read(layout.block_names(block.index)))
        zeros += sum(int((tensors[name] == 0).sum()) for name in matrix_parameters(block))
    return zeros
