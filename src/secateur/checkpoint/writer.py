"""A checkpoint written part by part: crash-safe, resumable, in place only when it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from secateur.checkpoint.durable import sync_folder, write_bytes
from secateur.checkpoint.journal import Journal, plain
from secateur.checkpoint.lock import Lock, require_unlocked
from secateur.checkpoint.merge import Placed, copy_files, merge_weights, write_json
from secateur.checkpoint.packing import Packed, config_entry
from secateur.checkpoint.place import bytes_below, entries, require_disk, require_place
from secateur.checkpoint.reader import Checkpoint
from secateur.checkpoint.safetensors_file import read_tensors, save_tensors
from secateur.checkpoint.safetensors_header import read_header
from secateur.core.errors import OutputError

__all__ = ["DISK_FACTOR", "CheckpointWriter", "read_part"]

HIDDEN = ".secateur"
PARTS = "parts"
CONFIG = "config.json"
Pack = Callable[[Mapping[str, Tensor | Packed]], Mapping[str, Tensor | Packed]]
DISK_FACTOR = 2.1
"""Of the bytes of a result: all parts, the merged files, and room for what lies beside them."""


class CheckpointWriter:
    """Collects parts in `OUT/.secateur/` and turns them into a checkpoint with the source's names.

    Killed at any moment and opened again with `resume`, it ends in the same bytes as without the kill,
    provided that the caller writes the same tensors.

    It holds a lock on the folder until `finish`, `close` or the end of the process; as a context manager it
    closes itself.

    Args:
        out: a folder that is empty or does not exist; its parents are made.
        source: the checkpoint whose tensor names, config and companions the output takes over.
        fingerprint: flat, JSON values: everything the result depends on. A resumed run has the same.
        resume: go on with the unfinished run in `out`, or begin when there is none.
        pack: makes of the tensors of a part those that are stored, some of them packed.
        result_bytes: what all tensors to be written have at most, by default as many as the source: room for
            them is asked of the disk.

    Raises:
        OutputError: `out` is not empty, not writable, at or inside the source, holds an unfinished run
            without `resume`, is being written by another process, or the disk is too small. Nothing has
            been created then.
        ResumeError: the unfinished run has another fingerprint.
        CheckpointError: a packed tensor of the source is damaged.

    >>> with CheckpointWriter(out, source, {"sparsity": 0.5}, resume=True) as writer:  # doctest: +SKIP
    ...     writer.write("block 0", tensors, {"loss": 0.1})
    ...     writer.finish()
    """

    def __init__(
        self,
        out: Path,
        source: Checkpoint,
        fingerprint: dict[str, Any],
        *,
        resume: bool = False,
        pack: Pack | None = None,
        result_bytes: int | None = None,
    ) -> None:
        self.out, self.source, self._pack = Path(out).expanduser(), source, pack
        self._disk_bytes = _disk_bytes(source, result_bytes)
        self._hidden = self.out / HIDDEN
        self._parts, self._final, self._assembled = self._hidden / PARTS, self._hidden / "final", False
        require_place(self.out, source.folder)
        require_unlocked(self._hidden)
        source.verify()
        self._find(fingerprint, resume)  # refuses before anything is created
        self._lock = self._begin()
        try:
            self._journal = self._find(fingerprint, resume)  # as another process may just have left it
            if not self.merged:
                self._journal.save()
        except BaseException:
            self.close()
            raise

    @classmethod
    def check(
        cls, out: Path, source: Checkpoint, *, resume: bool = False, result_bytes: int | None = None
    ) -> None:
        """Refuse a place that the constructor would refuse, before anything long is done.

        Raises:
            OutputError: as the constructor; nothing is created.
        """
        out = Path(out).expanduser()
        require_place(out, source.folder)
        require_unlocked(out / HIDDEN)
        if _find_journal(out, {}, resume).parts:
            return
        require_disk(out, _disk_bytes(source, result_bytes))

    @property
    def parts(self) -> Mapping[str, dict[str, Any]]:
        """Finished parts and their records, in the order of their first write."""
        return self._journal.parts

    @property
    def notes(self) -> Mapping[str, Any]:
        """What `note` kept, in this run or before."""
        return self._journal.notes

    @property
    def merged(self) -> bool:
        """Everything is computed: only `finish()` is left to call, and its arguments are settled.

        The parts may be gone already.
        """
        return self._journal.merged

    @property
    def workspace(self) -> Path:
        """A folder for intermediate results; it goes with `finish`."""
        folder = self._hidden / "scratch"
        folder.mkdir(exist_ok=True)
        return folder

    def write(self, part: str, tensors: Mapping[str, Tensor | Packed], record: dict[str, Any]) -> None:
        """Keep tensors (source names, any shape, strides or device) and a JSON record as finished."""
        record = plain(record)
        save_tensors(self._path(part), self._pack(tensors) if self._pack else tensors)
        self._journal.parts[part] = record
        self._journal.save()

    def read(self, part: str) -> dict[str, Tensor]:
        """The tensors of a finished part, unpacked. Raises `KeyError` for any other."""
        if part not in self.parts:
            raise KeyError(part)
        path = self._path(part)
        return read_tensors(path, read_header(path).values())

    def note(self, key: str, value: Any) -> None:
        """Keep a small JSON value."""
        self._journal.notes[key] = plain(value)
        self._journal.save()

    def assemble(
        self,
        *,
        config_updates: dict[str, Any] | None = None,
        dropped: Collection[str] = (),
        removed: Collection[str] = (),
        shard_bytes: int = 5_000_000_000,
    ) -> Path:
        """Merge the parts and add config and companions: a checkpoint to look at before it is published.

        Tensors lie in the source's order: an unchanged checkpoint of one file comes out byte for byte.
        Called again it begins anew.

        Args:
            config_updates: top-level keys of the source's config to replace or add.
            dropped: tensors of the source that the output does not have.
            removed: keys of the source's config that the output does not have.
            shard_bytes: a file of weights is closed before it grows beyond this.

        Returns:
            The folder that `finish` will publish.

        Raises:
            ValueError: a tensor of the source was never written, or one was written in two parts.
            OutputError: the disk is full.
        """
        if self._final.exists():
            shutil.rmtree(self._final)
        self._final.mkdir()
        placed = self._placed(set(dropped))
        merge_weights(self._final, placed, shard_bytes)
        copy_files(self.source.companions(), self.source.folder, self._final)
        config = {**self.source.config, **(config_updates or {})}
        if formats := {place.info.name: place.info.format for place in placed if place.info.format}:
            config["quantization_config"] = config_entry(formats)
        write_json(self._final / CONFIG, {key: value for key, value in config.items() if key not in removed})
        self._assembled = True
        return self._final

    def finish(self, *, extra: dict[str, str | bytes] | None = None) -> None:
        """Publish what `assemble` made (called here if it was not), and remove the workspace.

        Killed inside, the same call after a resume ends the work.

        Args:
            extra: further files by name, such as `report.json`.

        Raises:
            ValueError, OutputError: as `assemble`.
        """
        if not self.merged:
            if not self._assembled:
                self.assemble()
            for name, content in (extra or {}).items():
                write_bytes(self._final / name, content.encode() if isinstance(content, str) else content)
            self._journal.merged = True
            self._journal.save()
        self._publish()
        self._tidy()
        self.close()

    def close(self) -> None:
        """Let other processes write; without `finish` the run can be resumed."""
        self._lock.close()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _find(self, fingerprint: dict[str, Any], resume: bool) -> Journal:
        """The journal of this run, where nothing stands in the way; creates nothing."""
        journal = _find_journal(self.out, fingerprint, resume)
        journal.require(fingerprint)
        if not journal.merged:
            present_bytes = bytes_below(self._parts) + bytes_below(self._final)
            require_disk(self.out, self._disk_bytes - present_bytes)
        return journal

    def _begin(self) -> Lock:
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            sync_folder(self.out)
            return Lock(self._hidden)
        except OSError as error:
            raise OutputError(
                f"{self.out} cannot be written ({error.strerror})", "", "choose another output folder"
            ) from error

    def _path(self, part: str) -> Path:
        number = list(self.parts).index(part) if part in self.parts else len(self.parts)
        return self._parts / part_file(number)

    def _placed(self, dropped: set[str]) -> list[Placed]:
        """Where each tensor lies, in the source's order; those the source lacks come last."""
        placed: dict[str, Placed] = {}
        for path in map(self._path, self.parts):
            for name, info in read_header(path).items():
                if name in placed:
                    raise ValueError(f"tensor {name!r} was written in two parts")
                placed[name] = Placed(path, info)
        rank = {name: number for number, name in enumerate(self.source.tensors)}
        if missing := [name for name in rank if name not in placed and name not in dropped]:
            raise ValueError(f"{len(missing)} tensors were never written, the first is {missing[0]!r}")
        return sorted(placed.values(), key=lambda place: rank.get(place.info.name, len(rank)))

    def _publish(self) -> None:
        """Move the files into place; the config, without which nothing loads the folder, comes last."""
        for path in sorted(entries(self._final), key=lambda path: path.name == CONFIG):
            os.replace(path, self.out / path.name)
        sync_folder(self.out)

    def _tidy(self) -> None:
        """Remove the workspace, its journal last."""
        for folder in filter(Path.is_dir, entries(self._hidden)):
            shutil.rmtree(folder)
        self._journal.remove()
        if self._hidden.exists():
            shutil.rmtree(self._hidden)
        sync_folder(self.out)


def read_part(out: Path, part: str) -> dict[str, Tensor]:
    """A finished part of the unfinished run in `out`, for a process that does not write it.

    Raises `KeyError` for a part that is not there.
    """
    journal = Journal.load(out / HIDDEN)
    if journal is None or part not in journal.parts:
        raise KeyError(part)
    path = out / HIDDEN / PARTS / part_file(list(journal.parts).index(part))
    return read_tensors(path, read_header(path).values())


def _disk_bytes(source: Checkpoint, result_bytes: int | None) -> int:
    return int(DISK_FACTOR * (source.dense_nbytes if result_bytes is None else result_bytes))


def part_file(number: int) -> str:
    return f"{number:05d}.safetensors"


def _find_journal(out: Path, fingerprint: dict[str, Any], resume: bool) -> Journal:
    """The unfinished run in `out`, or a new one where nothing stands in the way."""
    hidden = out / HIDDEN
    journal = Journal.load(hidden)
    if journal is not None:
        if resume:
            return journal
        raise OutputError(f"{out} holds an unfinished run", "", "add --resume or choose another folder")
    others = [path.name for path in entries(out) if path != hidden]
    # A workspace without a journal: killed before the first step or after the last but one of `finish`.
    last_step = bool(others) and resume and hidden.is_dir()
    if others and not last_step:
        raise OutputError(
            f"{out} is not empty (it holds {others[0]})",
            "an unfinished run or an empty folder" if resume else "an empty folder",
            "choose another output folder",
        )
    return Journal(hidden, plain(fingerprint), merged=last_step)
