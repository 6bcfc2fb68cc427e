"""What training leaves beside the tensors of a .ckpt is ignored: nothing of it is imported, built or run."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsd.errors import FastsdError
from fastsd.weights.formats.pickle_file import read_pickle
from fastsd.weights.formats.pickle_globals import ENCODE, encodes_bytes_only, global_names

CALLBACK = "pytorch_lightning.callbacks.model_checkpoint"


class ModelCheckpoint:
    """Stands in for Lightning's class of that name; unpickling must not build one."""

    def __init__(self, monitor: str):
        self.monitor, self.best = monitor, np.float32(0.25)

    def __setstate__(self, _: Any) -> None:
        raise AssertionError("a callback was built")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Like the full checkpoint of Stable Diffusion 1.4: callbacks by class, numpy scores, and the network."""
    module = types.ModuleType(CALLBACK)
    module.ModelCheckpoint = ModelCheckpoint  # type: ignore[attr-defined]
    monkeypatch.setattr(ModelCheckpoint, "__module__", CALLBACK)
    content = {
        "epoch": 12,
        "global_step": np.int64(470_000),
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {
            ModelCheckpoint: {"best_model_score": np.float64(0.5), "current_score": torch.tensor(0.5)},
            "by its name": ModelCheckpoint("val/loss"),
        },
        "lr_schedulers": [{"base_lrs": [np.float64(1e-4)], "kinds": {"a"}}],
        "state_dict": {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)},
    }
    with monkeypatch.context() as during:
        for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
            during.setitem(sys.modules, parent, types.ModuleType(parent))
        during.setitem(sys.modules, CALLBACK, module)
        torch.save(content, tmp_path / "full.ckpt")
    return tmp_path / "full.ckpt"


def test_training_state_is_ignored(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are read. Modules of the names it refers to could be imported, and none is."""
    for package in ("pytorch_lightning", "omegaconf"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    entries = read_pickle(checkpoint, allow=True)
    assert {key: entry.read().tolist() for key, entry in entries.items()} == {
        "a.weight": [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]],
        "b": [1.0, 1.0],
    }
    assert not {"pytorch_lightning", CALLBACK} & set(sys.modules)


def test_the_checkpoint_refers_to_training_state(checkpoint: Path) -> None:
    """Otherwise the test above would prove nothing."""
    with zipfile.ZipFile(checkpoint) as archive:
        found = set(global_names(archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))))
    assert {(CALLBACK, "ModelCheckpoint"), ENCODE, ("numpy", "dtype")} <= found
    assert {name for module, name in found if module.endswith("core.multiarray")} == {"scalar"}


def test_placeholders_are_removed_afterwards(checkpoint: Path) -> None:
    """torch's list of safe globals is unchanged."""
    before = set(torch.serialization.get_safe_globals())
    read_pickle(checkpoint, allow=True)
    assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("name", ["numpy.load", "pytorch_lightningx.Y", "torch.load", "builtins.getattr"])
def test_other_names_are_still_refused(name: str, tmp_path: Path) -> None:
    module, _, function = name.rpartition(".")
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + f"c{module}\n{function}\n.".encode())
    with pytest.raises(FastsdError, match=f"it refers to {name}, not only to tensors"):
        read_pickle(tmp_path / "x.ckpt", allow=True)


TEXTS = [b"X" + struct.pack("<I", len(text)) + text for text in (b"latin1", b"hex", b"abc")]
CALL = b"c_codecs\nencode\n" + TEXTS[2] + TEXTS[0] + b"\x86R"
OPCODES = [
    *(b"c_codecs\nencode\n", *TEXTS, CALL, b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"r\x00\x00\x00\x00", b"g0\n"),
    *(b"\x86", b"\x85", b"R", b"0", b"1", b"(", b"t", b"]", b"a", b"N", b"2", b"\x94", b"}"),
]


@pytest.mark.heavy
def test_programs_of_encodings() -> None:
    """Random pickles: when Python runs one that is let through, it encodes nothing but texts, by latin1."""
    programs_with_calls = 0

    @settings(max_examples=3000, derandomize=True, database=None, deadline=None)
    @given(st.lists(st.sampled_from(OPCODES), min_size=4, max_size=24))
    def check(program: list[bytes]) -> None:
        nonlocal programs_with_calls
        raw = b"\x80\x02" + b"".join(program) + b"N."
        try:
            if ENCODE not in set(global_names(raw)) or not encodes_bytes_only(raw):
                return
        except ValueError:  # not a pickle to pickletools, so it is refused too
            return
        calls: list[tuple[Any, ...]] = []

        class Recorder(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> Any:
                return lambda *arguments: calls.append(arguments) or b""

        with contextlib.suppress(pickle.UnpicklingError, KeyError, IndexError, TypeError, AttributeError, ValueError):
            Recorder(io.BytesIO(raw)).load()
        assert all(len(call) == 2 and isinstance(call[0], str) and call[1] == "latin1" for call in calls), program
        programs_with_calls += bool(calls)

    check()
    assert programs_with_calls > 30, "too few programs call anything"
