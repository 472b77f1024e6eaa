"""Pictures in tar shards and in Hugging Face's tables: the run of the same files, and what is wrong with them is named."""

import gzip
import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torchvision")
pytest.importorskip("datasets")

import datasets
import torch
from helpers import stop_in_second_step
from PIL import Image

from tnt_fast import check
from tnt_fast.checkpoints import read_checkpoint
from tnt_fast.cli import main
from tnt_fast.images import DataError, open_image

CLASSES = ("ant", "bee")
TINY = ["img_size=32", "embed_dim=24", "inner_dim=12", "depth=1", "num_heads_outer=2", "num_heads_inner=2"]
QUICK = ["--epochs", "2", "--batch-size", "2", "--threads", "1", "--device", "cpu", "--workers", "0"]


def content(seed: int) -> bytes:
    """Of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 10, 3)).astype(np.uint8)).save(file, "png")
    return file.getvalue()


# part: class: contents; 3 images of each class to train on, 1 held out
PARTS = {
    part: {name: [content(100 * i + 10 * c + j) for j in range(count)] for c, name in enumerate(CLASSES)}
    for i, (part, count) in enumerate((("train", 3), ("val", 1)))
}


def files(root: Path) -> Path:
    for part, classes in PARTS.items():
        for name, contents in classes.items():
            (root / part / name).mkdir(parents=True)
            for j, data in enumerate(contents):
                (root / part / name / f"{j}.png").write_bytes(data)
    return root


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def samples(part: str) -> list[tuple[str, bytes, str]]:
    return [(f"{name}-{j}", data, name) for name, contents in PARTS[part].items() for j, data in enumerate(contents)]


def web(root: Path) -> str:
    """Shards of 4 as WebDataset's own writer makes them, with a sidecar of which nothing is read."""
    wds = pytest.importorskip("webdataset")
    root.mkdir()
    for part in PARTS:
        found = samples(part)
        for shard in range(0, len(found), 4):
            with wds.TarWriter(str(root / f"made-{part}-{shard:04}.tar")) as sink:
                for key, data, name in found[shard : shard + 4]:
                    sink.write({"__key__": key, "png": data, "cls": name.encode(), "json": json.dumps({"of": name}).encode()})
    return f"wds:{root}"


def folders_in_tars(root: Path) -> str:
    """A tar a part, in a folder of its name."""
    for part in PARTS:
        tar(root / part / "all.tar", {f"./{name}/{key}.png": data for key, data, name in samples(part)})
    return f"wds:{root}"


def tables(part: str):
    rows = samples(part)
    return datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None} for _, data, _ in rows], "label": [CLASSES.index(c) for _, _, c in rows]},
        datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}),
    )


def saved(root: Path) -> str:
    held_out = {"train": "train", "val": "validation"}
    datasets.DatasetDict({name: tables(part) for part, name in held_out.items()}).save_to_disk(str(root))
    return f"hfds:{root}"


def parquet(root: Path) -> str:
    (root / "data").mkdir(parents=True)
    for part, name in (("train", "train"), ("val", "test")):
        tables(part).to_parquet(str(root / "data" / f"{name}-00000-of-00001.parquet"))
    return f"hfds:{root}"


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "tables")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The weights of a run on the same pictures as files."""
    root = tmp_path_factory.mktemp("files")
    assert main(arguments(str(files(root / "data")), root / "run")) == 0
    return read_checkpoint(root / "run" / "last.pt")["state_dict"]


def arguments(data: str, out: Path, *more: str) -> list[str]:
    return ["train", data, "--out", str(out), "--model", "tnt_ti_patch16_224", "--model-kwargs", *TINY, *QUICK, *more]


@pytest.mark.parametrize("make", [web, folders_in_tars, saved, parquet])
def test_a_run_on_shards_is_that_on_files_stopped_or_not_whoever_reads(whole, tmp_path, capsys, monkeypatch, make):
    data, out = make(tmp_path / "data"), tmp_path / "run"
    stop_in_second_step(monkeypatch)  # of 3
    assert main(arguments(data, out)) == 143
    assert "images: 6 to train on, 2 held out" in capsys.readouterr().out
    assert main(arguments(data, out, "--resume", *(["--workers", "1"] if make in (web, saved) else []))) == 0
    found = read_checkpoint(out / "last.pt")
    assert found["classes"] == list(CLASSES)
    assert all(torch.equal(value, found["state_dict"][name]) for name, value in whole.items())


@pytest.mark.parametrize("make", [web, parquet])
def test_pictures_in_shards_are_those_that_were_put_there_in_another_process_too(tmp_path, make):
    found = pickle.loads(pickle.dumps(check.find(make(tmp_path / "data"))))
    for part in PARTS:
        expected = [(data, name) for _, data, name in samples(part)]
        assert [(picture.open().getvalue(), picture.label) for picture in found.parts[part]] == expected
        assert [picture.size for picture in found.parts[part]] == [len(data) for data, _ in expected]
        assert len({picture.name for picture in found.parts[part]}) == len(expected)
    image = open_image(found.parts["val"][0].open())
    assert np.array_equal(image, open_image(io.BytesIO(PARTS["val"]["ant"][0])))


def test_one_part_is_divided_and_what_is_the_same_picture_stays_together(tmp_path):
    once = {f"{key}.{end}": x for key, data, name in samples("train") for end, x in (("png", data), ("cls", name.encode()))}
    tar(tmp_path / "all.tar", once | {f"again-{name}": data for name, data in once.items()})
    files = check.training_files(f"wds:{tmp_path / 'all.tar'}", 0.3)
    assert {part: len(found) for part, found in files.parts.items()} == {"train": 8, "val": 4}
    for part in files.parts.values():
        names = {picture.name for picture in part}
        assert {name.replace("again-", "") for name in names if "again-" in name} == {n for n in names if "again-" not in n}
    with pytest.raises(DataError, match="hold a part of it out with --val-fraction 0.2"):
        check.training_files(f"wds:{tmp_path / 'all.tar'}")


def test_numbers_are_classes_in_their_order_and_a_table_has_its_own(tmp_path):
    members = {f"{i}.{end}": x for i in (0, 9, 10, 2) for end, x in (("png", content(i)), ("cls", b"%d\n" % i))}
    tar(tmp_path / "one" / "all.tar", members)
    assert check.find(f"wds:{tmp_path / 'one'}").classes == ["0", "2", "9", "10"]
    label = datasets.ClassLabel(names=["wasp", "none", "ant", "bee"])
    table = datasets.Dataset.from_dict(
        {"img": [{"bytes": content(i), "path": None} for i in range(3)], "sex": [0, 1, 0], "label": [2, 0, 3]},
        datasets.Features({"img": datasets.Image(), "sex": datasets.ClassLabel(names=["f", "m"]), "label": label}),
    )
    table.save_to_disk(str(tmp_path / "table"))
    files = check.find(f"hfds:{tmp_path / 'table'}")
    assert files.classes == ["wasp", "ant", "bee"]
    assert [picture.label for picture in files.pictures] == ["ant", "wasp", "bee"]
    shuffled = table.shuffle(seed=0)
    shuffled.save_to_disk(str(tmp_path / "shuffled"))
    files = check.find(f"hfds:{tmp_path / 'shuffled'}")
    assert [picture.label for picture in files.pictures] == [label.names[i] for i in shuffled["label"]]


# ---- what is wrong with shards ----


def spoilt(root: Path) -> dict[str, str]:
    """Bad members of every kind beside good ones, and words of the reason."""
    good = {f"{i}.{end}": x for i in range(4) for end, x in (("png", content(i)), ("cls", b"%d" % (i % 2)))}
    none = {"x.png": content(9), "y.cls": b"1", "z.png": content(8), "z.jpg": content(7), "z.cls": b"1"}
    odd = {"u.png": b"no image", "u.cls": b"1", "v.png": content(5), "v.cls": b"\x00\xff", "._w.png": b"x", "n.txt": b"notes"}
    tar(root / "a.tar", {**good, **none, **odd})
    with tarfile.open(root / "a.tar", "a") as file:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    cut = tar(root / "cut.tar", {f"c{name}": data for name, data in good.items()})
    cut.write_bytes(cut.read_bytes()[: 3 * 1024 + 700])
    tar(root / "damaged.tar", {"d0.cls": b"1", "d0.png": content(30), "d1.cls": b"1"})
    data = bytearray((root / "damaged.tar").read_bytes())
    data[1024 : 1024 + 100] = b"x" * 100
    (root / "damaged.tar").write_bytes(data)
    (root / "foreign.tar").write_bytes(b"no tar file" * 100)
    (root / "empty.tar").write_bytes(b"")
    endless = tar(root / "endless.tar", {"e.cls": b"1", "e.png": content(20)})
    content_ends = 512 + 512 + 512 + -(-len(content(20)) // 512) * 512
    endless.write_bytes(endless.read_bytes()[:content_ends])
    return {
        "a.tar/x.png": "no class: expected x.cls beside it", "a.tar/y.cls": "no picture beside it; accepted: .bmp",
        "a.tar/z": "2 pictures and 1 classes", "a.tar/u.png": "no image format", "a.tar/v.cls": "no class, but",
        "a.tar/link.png": "a link", "cut.tar": "truncated", "damaged.tar": "damaged at byte 1,024, after 1 files",
        "foreign.tar": "no tar file", "empty.tar": "no tar file (empty file)",
        "endless.tar": "truncated or damaged at byte", "damaged.tar/d0.cls": "no picture beside it",
    }  # fmt: skip


def test_every_bad_member_and_shard_is_named_and_the_rest_can_be_trained_on(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    expected = spoilt(tmp_path / "data")
    data = f"wds:{tmp_path / 'data'}"
    assert main(["check", data, "--json"]) == 1
    bad = {row["file"]: row["reason"] for row in json.loads(capsys.readouterr().out)["bad"]}
    assert {name: reason for name, reason in expected.items() if reason not in bad.get(name, "-")} == {}
    assert set(bad) - set(expected) <= {"cut.tar/c1.cls", "cut.tar/c1.png"}
    assert main(arguments(data, tmp_path / "run", "--val-fraction", "0.5")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert [name for name in expected if repr(name) not in said] == []
    assert not (tmp_path / "run").exists()
    assert main(arguments(data, tmp_path / "run", "--val-fraction", "0.5", "--skip-bad", "--epochs", "1")) == 0


def test_a_member_that_claims_more_than_an_image_may_have_is_not_read_into_memory(tmp_path, monkeypatch):
    path = tar(tmp_path / "a.tar", {"ant/0.png": content(0), "bee/1.png": content(1)})
    monkeypatch.setattr("tnt_fast.images.MAX_BYTES", 100)
    monkeypatch.setattr("tnt_fast.shards.MAX_BYTES", 100)
    files = check.find(f"wds:{path}")
    assert {len(picture.open().getvalue()) for picture in files.pictures} == {101}
    check.examine(files)
    assert list(files.bad.values()) == ["0.0 GiB; accepted: 0 GiB at most"] * 2


def test_a_picture_in_no_folder_and_a_foreign_file_in_a_tar_of_folders_are_named(tmp_path):
    path = tar(tmp_path / "a.tar", {"ant/0.png": content(0), "bee/1.png": content(1), "2.png": content(2), "bee/notes": b"x"})
    assert check.find(f"wds:{path}").bad == {
        "a.tar/2.png": "no class: expected KEY.cls beside it, or a class folder around it",
        "a.tar/bee/notes": "not an image by its name",
    }


def compressed(root):
    (root / "a-train.tar").write_bytes(gzip.compress((root / "a-train.tar").read_bytes()))


def packed(root):
    (root / "a-train.tar").rename(root / "a-train.tar.gz")


def missing_class(root):
    tar(root / "a-val.tar", {"ant/9.png": content(9)})


def of_no_part(root):
    (root / "a-train.tar").rename(root / "a.tar")


def of_odd_parts(root):
    (root / "a-train.tar").rename(root / "a-test.tar")


def none(root):
    for path in root.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (compressed, r"a-train.tar' is compressed \(gzip\), and cannot be read at random; unpack it"),
        (packed, r"a-train.tar.gz' is compressed, and cannot be read at random; unpack the shards \(gunzip\)"),
        (missing_class, r"only in train: \['bee'\], only in val: \[\]"),
        (of_no_part, r"a.tar' is of no part; expected train or val in the name of each file"),
        (of_odd_parts, "has the parts test, val; expected train and val or validation"),
        (none, r"holds no files \*\.tar"),
        (lambda root: none(root) or root.rmdir(), "no file or directory"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_shards_that_are_no_data_set_are_refused(tmp_path, change, named):
    for part in PARTS:
        tar(tmp_path / "data" / f"a-{part}.tar", {f"{name}/{key}.png": data for key, data, name in samples(part)})
    assert check.find(f"wds:{tmp_path / 'data'}").classes == list(CLASSES)
    change(tmp_path / "data")
    with pytest.raises(DataError, match=named):
        check.find(f"wds:{tmp_path / 'data'}")


def test_a_folder_of_shards_without_its_kind_says_how_to_name_it(tmp_path):
    tar(tmp_path / "tars" / "a.tar", {"ant/0.png": content(0)})
    with pytest.raises(DataError, match=f"no class folder; .* or wds:{tmp_path / 'tars'} to read shards"):
        check.find(tmp_path / "tars")
    saved(tmp_path / "tables")
    with pytest.raises(DataError, match=f"hfds:{tmp_path / 'tables'} to read shards"):
        check.find(tmp_path / "tables")


def test_bad_rows_and_tables_are_named(tmp_path):

    def table(name, columns, **features):
        made = datasets.Dataset.from_dict(columns, datasets.Features(features))
        made.save_to_disk(str(tmp_path / name))
        return f"hfds:{tmp_path / name}"

    pictures = [{"bytes": content(i), "path": None} for i in range(4)]
    image, text, number = datasets.Image(), datasets.Value("string"), datasets.Value("int64")
    kinds = {"image": image, "label": datasets.ClassLabel(names=["ant", "bee"])}
    bad = table("bad", {"image": [*pictures, None, pictures[0]], "label": [0, 1, 1, 0, 0, -1]}, **kinds)
    assert check.find(bad).bad == {"rows[4]": "no picture in its row", "rows[5]": "no class: its label is -1"}
    texts = table("texts", {"image": pictures, "label": ["ant", "bee", None, "ant"]}, image=image, label=text)
    assert check.find(texts).classes == ["ant", "bee"]
    assert check.find(texts).bad == {"rows[2]": "no class: its label is None"}
    assert check.find(table("numbers", {"img": pictures, "label": [10, 9, 9, 10]}, img=image, label=number)).classes == [
        "9",
        "10",
    ]
    for name, columns, features, named in (
        ("none", {"label": [0]}, {"label": kinds["label"]}, "has no columns that may be the pictures, of label; expected one"),
        ("free", {"image": pictures[:1], "text": ["x"]}, {"image": image, "text": text}, "no columns that may be the classes"),
        ("two", {"a": pictures, "b": pictures, "label": [0] * 4}, {"a": image, "b": image, "label": number}, "has 2 columns"),
    ):
        with pytest.raises(DataError, match=named):
            check.find(table(name, columns, **features))
    (tmp_path / "spoilt").mkdir()
    (tmp_path / "spoilt" / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cannot read the tables in '.*spoilt': "):
        check.find(f"hfds:{tmp_path / 'spoilt'}")
    for name in ("nosuch", "texts/data-00000-of-00001.arrow"):
        with pytest.raises(DataError, match="expected what save_to_disk wrote, or a folder of parquet files"):
            check.find(f"hfds:{tmp_path / name}")


def test_without_its_package_a_table_is_refused_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="hfds: needs one more package .*: pip install datasets"):
        check.find(f"hfds:{tmp_path}")
