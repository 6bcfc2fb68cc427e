"""Files of torch.save from before PyTorch 1.6: what torch reads of them, and what is refused."""

from __future__ import annotations

import io
import os
import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsd.errors import FastsdError
from fastsd.weights.formats import legacy_pickle
from fastsd.weights.formats.pickle_file import open_pickle, read_pickle
from fastsd.weights.layouts.upscaler_file import load_upscaler
from tests.support.upscalers import TINY_RRDB, in_layout, random_state


def save(path: Path, content: Any) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes().startswith(legacy_pickle.MAGIC)
    return path


def tensors() -> dict[str, Any]:
    """Of every dtype that has a storage; views with offsets, other orders of memory, parameters, scalars."""
    base = torch.randn(6, 4)
    dtypes = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
    )
    found = {str(dtype): (10 * base).to(dtype) for dtype in dtypes}
    found |= {"half of it": base[3:], "all of it": base, "turned": base.t(), "one": base[2, 3], "bool": base > 0}
    found |= {"none": torch.zeros(0, 3), "parameter": torch.nn.Parameter(base.clone())}
    return found | {"images last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)}


@pytest.mark.parametrize("wrapped", [False, True])
def test_it_reads_what_torch_reads(wrapped: bool, tmp_path: Path) -> None:
    content = OrderedDict(tensors() | {"epoch": 3, "name": "x", "loss": 0.5, "nested": [(1, None), {"a": True}]})
    path = save(tmp_path / "x.pth", {"state_dict": content, "iter": 2**40} if wrapped else content)
    expected = torch.load(path, weights_only=True)
    expected = expected["state_dict"] if wrapped else expected
    found = read_pickle(path, allow=True)
    assert set(found) == {name for name, value in expected.items() if isinstance(value, torch.Tensor)}
    for name, entry in found.items():
        assert entry.key == name and torch.equal(entry.read(), expected[name].detach()), name


def test_a_modules_state(tmp_path: Path) -> None:
    """Its table has a state of its own, the versions of the modules."""
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    found = read_pickle(save(tmp_path / "x.pth", module.state_dict()), allow=True)
    assert all(torch.equal(found[key].read(), value) for key, value in module.state_dict().items())


def test_an_upscaler(tmp_path: Path) -> None:
    """As most of those in ESRGAN's first layout are stored."""
    state = random_state(TINY_RRDB)
    path = save(tmp_path / "4x.pth", OrderedDict(in_layout(state, "old")))
    found = load_upscaler(path, torch.float32, allow_pickle=True).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
    with pytest.raises(FastsdError, match="allow it with allow_pickle"):
        load_upscaler(path, torch.float32)


class Calls:
    """Unpickled, it would call this."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


def handmade(content: bytes, keys: Any = (), data: bytes = b"") -> bytes:
    """A file whose fourth pickle is `content`."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = legacy_pickle.MAGIC + pickle.dumps(1001, 2) + pickle.dumps(machine, 2)
    return head + content + pickle.dumps(list(keys), 2) + data


class Stored(pickle.Pickler):
    """Writes the pair ("storage", count) as a storage of so many numbers."""

    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, tuple) and value[:1] == ("storage",):
            return ("storage", torch.FloatStorage, "0", "cpu", value[1], None)
        return None


class Made:
    """A tensor as torch pickles it, on a storage of `count` numbers."""

    def __init__(self, count: Any, offset: Any, shape: Any, strides: Any):
        self.arguments = (("storage", count), offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


def on_storage(count: Any, offset: Any, shape: Any, strides: Any) -> bytes:
    buffer = io.BytesIO()
    Stored(buffer, 2).dump({"x": Made(count, offset, shape, strides)})
    return handmade(
        buffer.getvalue(), ["0"], (count if isinstance(count, int) else 0).to_bytes(8, "little") + bytes(64)
    )


itself: list[Any] = []
itself.append(itself)
CASES: dict[str, tuple[Any, str]] = {
    "a call": (lambda: handmade(pickle.dumps(Calls(os.system, ("touch ran",)), 2)), "it refers to posix.system"),
    "a computed name": (lambda: handmade(pickle.dumps(Calls(os.system, ("touch ran",)), 4)), "refused|damaged"),
    "more than a million parts": (lambda: handmade(b"\x80\x02(" + b"N" * 1_100_000 + b"t."), "that many parts"),
    "a place in the memo that is not there": (lambda: handmade(b"\x80\x02j\xff\xff\xff\x7f."), "damaged or cut short"),
    "an empty stack": (lambda: handmade(b"\x80\x02."), "damaged or cut short"),
    "a big-endian machine": (
        lambda: handmade(pickle.dumps({}, 2)).replace(b"endianq\x02\x88", b"endianq\x02\x89"),
        "a form that fastsd does not read",
    ),
    "far more numbers than the file has": (lambda: on_storage(2**40, 0, (2**20, 2**20), (2**20, 1)), "cut short"),
    "a shape larger than its storage": (lambda: on_storage(4, 0, (5,), (1,)), "needs 20 bytes, the file holds 16"),
    "an offset past its storage": (lambda: on_storage(4, 3, (2,), (1,)), "needs 8 bytes, the file holds 16"),
    "one number a million times": (lambda: on_storage(4, 0, (1000, 1000), (0, 0)), "has strides"),
    "a negative offset": (lambda: on_storage(4, -1, (2,), (1,)), "damaged"),
    "fewer strides than sides": (lambda: on_storage(4, 0, (2, 2), (1,)), "damaged"),
    "no storage": (
        lambda: handmade(pickle.dumps(Made(4, 0, (4,), (1,)), 2)),
        "damaged",
    ),
    "storages without bytes": (lambda: on_storage(4, 0, (4,), (1,))[: -64 - 8 - 20], "damaged|cut short|no bytes"),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = CASES[name]
    (tmp_path / "x.pth").write_bytes(make())
    with pytest.raises(FastsdError, match=message) as caught:
        read_pickle(tmp_path / "x.pth", allow=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "ran").exists()


def test_content_that_holds_itself(tmp_path: Path) -> None:
    """It is no checkpoint, but ends; so does one that holds one list a million times in three levels."""
    (tmp_path / "x.pth").write_bytes(handmade(pickle.dumps(itself, 2)))
    content, _ = open_pickle(tmp_path / "x.pth", allow=True)
    assert content[0] is content
    wide: Any = [1.5]
    for _ in range(6):
        wide = [wide] * 100
    (tmp_path / "x.pth").write_bytes(handmade(pickle.dumps(wide, 2)))
    assert len(open_pickle(tmp_path / "x.pth", allow=True)[0]) == 100
    marks = b"]" * 50_000 + b"a" * 49_999  # a list in a list in a list
    (tmp_path / "x.pth").write_bytes(handmade(b"\x80\x02" + marks + b"."))
    with pytest.raises(FastsdError, match="nested that deeply"):
        open_pickle(tmp_path / "x.pth", allow=True)


def test_damage_of_every_kind_is_one_line(tmp_path: Path) -> None:
    """Bytes changed, and the file cut, wherever: it is read or refused, and never anything else."""
    whole = save(
        tmp_path / "x.pth", {"a": torch.arange(6.0).view(2, 3), "b": [torch.ones(2)], "c": "text"}
    ).read_bytes()
    chance, read = random.Random(0), 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(legacy_pickle.MAGIC), len(data))] = chance.randrange(256)
        del data[chance.choice([len(data), chance.randrange(len(data))]) :]
        (tmp_path / "y.pth").write_bytes(data)
        try:
            read_pickle(tmp_path / "y.pth", allow=True)
            read += 1
        except FastsdError as error:
            assert "\n" not in str(error)
    assert 0 < read < 400
