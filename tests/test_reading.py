"""Files from strangers: what they declare is held against their size before anything is built."""

import argparse
import io
import struct
import tracemalloc
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from tnt_fast.reading import CheckpointError, read_checkpoint, shown

GOOD = {"state_dict": {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}, "epoch": 3}


def saved(contents=GOOD, **options) -> bytes:
    out = io.BytesIO()
    torch.save(contents, out, **options)
    return out.getvalue()


def with_program(program: bytes) -> bytes:
    """A file of torch.save whose pickled program is another."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved())) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, program if name.endswith("data.pkl") else source.read(name))
    return out.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def tensor(shape: bytes, stride: bytes, key: str = "0", count: bytes = b"K\x06") -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + count + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + shape + stride + b"\x89}tR"


def in_dict(value: bytes) -> bytes:
    return b"\x80\x02}" + text("a") + value + b"s."


LARGE = b"\x8a\x06" + (2**40).to_bytes(6, "little")
PROGRAMS = {
    "a tensor of 2**40 elements over six": (in_dict(tensor(LARGE + b"\x85", b"K\x00\x85")), "elements over 6 stored"),
    "a tensor behind its storage": (in_dict(tensor(b"K\x02\x85", b"K\x09\x85")), "over 6 stored"),
    "a storage larger than its numbers": (in_dict(tensor(b"K\x02\x85", b"K\x01\x85", count=LARGE)), "said to take"),
    "numbers that are missing": (in_dict(tensor(b"K\x02\x85", b"K\x01\x85", key="9")), "numbers 9 are missing"),
    "a shape of names": (in_dict(tensor(text("x") + b"\x85", b"K\x01\x85")), "shape or strides"),
    "a FloatTensor of 8 GiB": (in_dict(b"ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R"), "holds more than weights"),
    "a FloatStorage of 8 GiB": (in_dict(b"ctorch\nFloatStorage\nJ\xff\xff\xff\x7f\x85R"), "holds more than weights"),
    "a bytearray of 2 GiB": (in_dict(b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R"), "holds more than weights"),
    "a meta tensor": (in_dict(b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n)R"), "a meta tensor, without numbers"),
    "tuples so deep that hashing them overflows the stack": (b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.", "as a key"),
    "such tuples to count": (in_dict(b"ccollections\nCounter\n])" + b"\x85" * 200_000 + b"a\x85R"), "no readable file"),
    "keys that collide": (b"\x80\x02}G" + struct.pack(">d", 2.0**61) + b"K\x01s.", "as a key"),
    "a number of 2040 bits": (in_dict(b"\x8a\xff" + b"\x01" * 255), "more than 64 bits"),
    "dicts without end": (b"\x80\x02" + b"}" * 1_000_000 + b".", "lists and dicts"),
    "a dict in itself": (b"\x80\x02}q\x00" + text("a") + b"h\x00s.", "holds itself"),
    "a list in itself": (in_dict(b"]q\x00h\x00a"), "holds itself"),
    "lists 900 deep": (in_dict(b"]" + b"]" * 900 + b"a" * 900), "more than 50 deep"),
    "ten to the thirtieth laughs": (in_dict(b"(]q\x00" + text("ha") + b"a" + b"".join(
        b"]q" + bytes([i + 1]) + b"(" + (b"h" + bytes([i])) * 10 + b"e" for i in range(30)) + b"t"), "stand for"),
    "a compressing codec": (in_dict(b"c_codecs\nencode\n" + text("a") + text("zip") + b"\x86R"), "it encodes a text"),
    "a program of another language": (in_dict(b"\x95" + bytes(8)), "pickle's FRAME"),
    "attributes of a class": (in_dict(b"ctorch\nSize\n}b"), "could execute code"),
    "nothing": (b"", "no readable file"),
}  # fmt: skip


@pytest.mark.parametrize("what", PROGRAMS)
def test_a_program_that_asks_for_more_than_its_file_holds_is_refused_before_it_is_built(tmp_path, monkeypatch, what):
    program, message = PROGRAMS[what]
    (tmp_path / "a.pt").write_bytes(with_program(program))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("PyTorch was let at the file"))
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert message in str(caught.value)
    assert "a.pt' (" in str(caught.value)


def rezipped(how: str) -> bytes:
    out = io.BytesIO()
    kind = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(io.BytesIO(saved())) as source, zipfile.ZipFile(out, "w", kind) as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, bytes(10**7) if how == "compressed" and name.endswith("/0") else data)
            if how == "doubled" and name.endswith("data.pkl"):
                with pytest.warns(UserWarning, match="Duplicate name"):
                    target.writestr(name, data)
    data = out.getvalue()
    if how == "larger":  # the directory at the end says so of data/0
        at = data.rfind(b"archive/data/0") - 46
        huge = struct.pack("<II", 2**31, 2**31)
        return data[: at + 20] + huge + data[at + 28 :]
    return data


@pytest.mark.parametrize("how", ["compressed", "doubled", "larger"])
def test_archives_that_are_larger_inside_than_outside_are_refused(tmp_path, how):
    (tmp_path / "a.pt").write_bytes(rezipped(how))
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="compressed, doubled, or larger than the file"):
        read_checkpoint(tmp_path / "a.pt")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_numbers_that_were_damaged_do_not_have_their_checksum(tmp_path):
    data = bytearray(saved())
    data[data.index(struct.pack("<f", 5.0))] ^= 1
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"Bad CRC-32 for file '\w+/data/0'"):
        read_checkpoint(tmp_path / "a.pt")
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(GOOD, tmp_path / "b.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(tmp_path / "b.pt")["state_dict"]["a.bias"], torch.ones(2))


def test_the_format_before_pytorch_1_6_is_read_and_held_to_its_size(tmp_path):
    data = saved(_use_new_zipfile_serialization=False)
    (tmp_path / "a.pt").write_bytes(data)
    found = read_checkpoint(tmp_path / "a.pt")
    assert torch.equal(found["state_dict"]["a.weight"], GOOD["state_dict"]["a.weight"])
    for said in (b"K\x06", b"K\x02"):  # how many elements the storages have
        at = data.rindex(said + b"N", 0, data.index(b"a.bias") if said == b"K\x06" else len(data))
        (tmp_path / "b.pt").write_bytes(data[:at] + b"J\xff\xff\xff\x7f" + data[at + 2 :])
        with pytest.raises(CheckpointError, match="declares more numbers than it has bytes"):
            read_checkpoint(tmp_path / "b.pt")


def test_what_comes_back_is_plain(tmp_path):
    shared = ["x"]
    odd = {
        "args": argparse.Namespace(lr=0.1),
        "state": torch.nn.Linear(2, 2).state_dict(),
        "p": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save({**odd, "lists": (shared, shared), "size": torch.Size([2]), "set": {"a"}, "bytes": b"\xff"}, tmp_path / "a.pt")
    found = read_checkpoint(tmp_path / "a.pt")
    assert found["args"] == {"lr": 0.1}
    assert type(found["state"]) is dict
    assert not hasattr(found["state"], "_metadata")
    assert type(found["p"]) is torch.Tensor
    assert found["lists"][0] is found["lists"][1]
    assert (found["size"], found["set"], found["bytes"]) == ((2,), {"a"}, b"\xff")


def test_safetensors_are_known_by_their_contents_and_their_header_is_held_to_the_size(tmp_path):
    save_file(GOOD["state_dict"], tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.bin").write_bytes(data)
    assert torch.equal(read_checkpoint(tmp_path / "a.bin")["a.bias"], torch.ones(2))
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", 2**40) + data[8:])
    with pytest.raises(CheckpointError, match=r"declares a header of 1,099,511,627,776 bytes"):
        read_checkpoint(tmp_path / "b.safetensors")


def test_a_folder_of_hugging_face_is_read(tmp_path):
    save_file(GOOD["state_dict"], tmp_path / "model.safetensors")
    assert set(read_checkpoint(tmp_path)) == {"a.weight", "a.bias"}
    (tmp_path / "config.json").write_text('{"architecture": "tnt_s_patch16_224"}')
    assert read_checkpoint(tmp_path)["config"] == {"architecture": "tnt_s_patch16_224"}
    for bad in ("[" * 10**5, "3", "{"):
        (tmp_path / "config.json").write_text(bad)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            read_checkpoint(tmp_path)


def test_names_are_shown_short_and_without_control_characters():
    assert shown("blocks.0.mlp.fc1.weight") == "blocks.0.mlp.fc1.weight"
    assert len(shown("x" * 10**6)) < 120
    assert shown("\x1b[2J\u202e") == r"'\x1b[2J\u202e'"
    assert len(str(CheckpointError("x" * 10**6))) <= 2000
