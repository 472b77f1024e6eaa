"""The sweep of launch tables: what it tries, that it keeps to what is right, goes on, and writes what won."""

import ast
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import measure, tune
from benchmarks.launched import Launched
from tnt_fast import kernels
from tnt_fast.kernels import inner, norm, pixel_embed
from tnt_fast.kernels.operation import Config, Launch

BOWL = {"rows": 64, "warps": 4, "per_sm": 3, "chunk": 32, "stages": 1, "mma_arch": None, "registers": None, "capability": None}
"""Where the made-up times are least."""


def us(fields):
    """Made-up microseconds: a tenth more for each step that a number is away from ``BOWL``."""
    away = [abs(tune.CHOICES[name].index(fields[name]) - tune.CHOICES[name].index(BOWL[name])) for name in BOWL]
    return {"us": 100.0 * 1.1 ** sum(away)}


@pytest.fixture
def entry():
    """An entry of a table that no kernel has."""
    module = SimpleNamespace(__name__="tnt_fast.kernels.made_up", CONFIGS={"_kernel": {(16, True): Config(16, 1, 5, 16, 2)}})
    return tune.Entry(module, "_kernel", (16, True), "s", "bf16", ())


@pytest.fixture
def right(monkeypatch):
    """What is said of a configuration's error; all are right unless a test says otherwise."""
    wrong = {}
    monkeypatch.setattr(tune, "checked", lambda entry, fields: wrong.get(tune.key(fields), 0.5))
    return wrong


def swept(entry, known, stop=None):
    """What was tried anew; ``stop``: after so many the user interrupts."""
    tried = []

    def try_them(work):
        for i, (_, fields) in enumerate(work):
            if len(tried) == stop:
                raise KeyboardInterrupt
            tried.append(fields)
            yield i, us(fields)

    try:
        tune.sweep([entry], try_them, known, lambda entry: "digest", lambda: None)
    except KeyboardInterrupt:
        assert stop is not None
    return tried


def test_a_step_changes_one_number_or_those_that_go_together():
    start = Config(32, 2, 8, 0, 1, None)._asdict()
    found = [{k: v for k, v in each.items() if v != start[k]} for each in tune.neighbours(start)]
    steps = [{"rows": 16}, {"rows": 64}, {"warps": 1}, {"warps": 4}, {"per_sm": 7}, {"per_sm": 10}, {"stages": 2}]
    steps += [{"mma_arch": "sm80"}, {"rows": 16, "warps": 1}, {"rows": 64, "warps": 4}]
    assert sorted(map(str, found)) == sorted(map(str, steps))  # no chunk: the kernel has none


def test_the_sweep_ends_where_no_step_is_better(entry, right):
    known = {}
    tried = swept(entry, known)
    (about,) = known.values()
    assert about["chosen"] == BOWL
    assert about["shipped"] == entry.fields == Config(16, 1, 5, 16, 2)._asdict()
    assert len(tried) == len(about["tried"]) < 80
    line = tune.differences(known).splitlines()[1]
    assert "rows 16 → 64, warps 1 → 4, per_sm 5 → 3, chunk 16 → 32, stages 2 → 1" in line


def test_what_breaks_the_rule_or_does_not_compile_never_wins(entry, right, monkeypatch):
    right[tune.key(BOWL)] = 1.2
    known = {}
    swept(entry, known)
    (about,) = known.values()
    assert about["chosen"] != BOWL
    assert about["tried"][tune.key(BOWL)]["error"] == "breaks the rule: 1.2 of the allowed error"
    assert us(about["chosen"])["us"] == pytest.approx(110)  # next to it
    known = {}
    real = us

    def fails(fields):
        return {"error": "OutOfResources"} if fields["warps"] == 4 else real(fields)

    monkeypatch.setitem(globals(), "us", fails)
    swept(entry, known)
    assert known[entry.name]["chosen"] == BOWL | {"warps": 2}


def test_an_interrupted_sweep_goes_on_and_a_changed_kernel_begins_anew(entry, right):
    whole, known = swept(entry, {}), {}
    first = swept(entry, known, stop=9)
    known = json.loads(json.dumps(known))  # as from the file
    rest = swept(entry, known)
    assert len(first) == 9
    assert sorted(map(str, first + rest)) == sorted(map(str, whole))
    assert known[entry.name]["chosen"] == BOWL
    assert swept(entry, known) == []
    known[entry.name]["of"] = "another kernel's digest"
    assert len(swept(entry, known)) == len(whole)


def test_every_entry_of_a_named_variant_is_swept():
    before = [dict(inner.CONFIGS[name]) for name in inner.CONFIGS]
    found = {entry.name: entry for entry in tune.entries(kernels.OPERATIONS, ["bf16"])}
    keys = {"inner/_inner_fwd_kernel/(16, True)": "ti", "inner/_inner_bwd_kernel/(32, True)": "s"}
    keys |= {"inner/_inner_bwd_attention_kernel/(64, True)": "b", "pixel_embed/_pixel_embed_fwd_kernel/True": "s", "norm": "s"}
    assert {name: found[name].variant for name in keys} == keys
    assert not [name for name in found if "False" in name or "128" in name]
    assert found["norm"].fields == dict(VALUES=norm.VALUES, EACH=norm.EACH, PER_SM=norm.PER_SM, STAGES=norm.STAGES)
    assert {name for name, _ in found["norm"].launches} == {"fold", "outer", "block"}
    assert before == [inner.CONFIGS[name] for name in inner.CONFIGS]
    assert all(type(table) is dict for table in inner.CONFIGS.values())
    fp32 = [entry.name for entry in tune.entries(["inner"], ["fp32"])]
    assert "inner/_inner_fwd_kernel/(32, False)" in fp32


def test_a_table_has_the_numbers_inside_and_as_they_were_behind():
    found = {entry.name: entry for entry in tune.entries(kernels.OPERATIONS, ["bf16"])}

    def launched(entry):
        return entry.launches[0][1].spec

    for name, changes in {"inner/_inner_fwd_kernel/(32, True)": {"rows": 32, "warps": 2}, "norm": {"VALUES": 4096}}.items():
        entry, before = found[name], launched(found[name])
        with entry.holding(entry.fields | changes):
            inside = launched(entry)
        assert inside != before
        assert inside.config.warps == (2 if "rows" in changes else 4 * before.config.warps)
        assert launched(entry) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="the wrong kernel is run in Triton's interpreter")
def test_a_configuration_is_held_to_the_rule(monkeypatch):
    found = {entry.name: entry for entry in tune.entries(["pixel_embed"], ["bf16"])}
    entry = found["pixel_embed/_pixel_embed_fwd_kernel/True"]
    assert 0 < tune.broken(entry, entry.fields | {"rows": 64}) <= 1
    prepared = type(kernels.OPERATIONS["pixel_embed"]).prepared

    def wrong(self, a):  # where the tile has 64 rows, the last is left out
        right = prepared(self, a)

        def run(a, out):
            right(a, out)
            if pixel_embed.CONFIGS["_pixel_embed_fwd_kernel"][True].rows == 64:
                out[-1, -1] = 0

        return run

    monkeypatch.setattr(type(kernels.OPERATIONS["pixel_embed"]), "prepared", wrong)
    assert tune.broken(entry, entry.fields | {"rows": 64}) > 1


def test_what_won_is_written_into_the_table():
    names = ["norm", "pixel_embed/_pixel_embed_fwd_kernel/True", "inner/_inner_bwd_attention_kernel/(64, True)"]
    names += ["inner/_inner_fwd_kernel/(32, True)", "inner/_inner_bwd_kernel/(32, True)"]
    found = {entry.name: entry for entry in tune.entries(kernels.OPERATIONS, ["bf16"])}
    for name in names:
        entry = found[name]
        with open(entry.module.__file__, encoding="utf-8") as file:
            text = file.read()
        new = dict(VALUES=2048, EACH=16, PER_SM=4, STAGES=2) if name == "norm" else Config(128, 8, 3, 64, 2, None)._asdict()
        if "_bwd_attention_kernel" in name:  # the other half's
            with pytest.raises(ValueError, match=r"put Config\(128, warps=8, per_sm=3, chunk=64, stages=2\) there by hand"):
                tune.written(text, entry, new)
            continue
        changed = tune.written(text, entry, new)
        assert ast.dump(ast.parse(tune.written(changed, entry, entry.fields))) == ast.dump(ast.parse(text))
        (line,) = set(changed.splitlines()) - set(text.splitlines())
        of_norm, others = "VALUES, EACH, PER_SM, STAGES = 2048, 16, 4, 2", "Config(128, warps=8, per_sm=3, chunk=64, stages=2)"
        wanted = of_norm if name == "norm" else others
        assert wanted in line
    assert eval(tune._call(Config(64, 4, 2, 32, 1, "sm80")._asdict())) == Config(64, 4, 2, 32, 1, "sm80")


def by_number(name, dtype, fields, gpu):
    return {"us": 100 / fields["warps"]}


def test_the_command_keeps_prints_and_goes_on(tmp_path, monkeypatch, capsys, right):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(tune, "_by_number", by_number)
    monkeypatch.setattr(tune, "source", lambda entry, by_time: "digest")
    file = tmp_path / "tune.json"
    options = ["--kernel", "inner", "--variant", "s", "--processes", "1", "--json", str(file)]
    assert tune.main(options) == 0
    out = capsys.readouterr().out
    kept = json.loads(file.read_text())
    assert (kept["gpu"], kept["how"], len(kept["entries"])) == ("h200", "simulated", 2)
    assert kept["date"]
    assert all(about["chosen"] == about["shipped"] | {"warps": 8} for about in kept["entries"].values())
    assert "h200, simulated" in out
    before = [about["shipped"]["warps"] for about in kept["entries"].values()]
    told = [[f"-{100 - 100 * warps // 8}%", "warps", str(warps), "→", "8"] for warps in before]
    assert [line.split()[-5:] for line in out.splitlines()[2:]] == told
    monkeypatch.setattr(tune, "_by_number", None)  # nothing is left to try
    assert tune.main(options) == 0
    assert capsys.readouterr().out == out
    with pytest.raises(SystemExit):
        tune.main([*options, "--gpu", "a100"])
    assert "it is of h200, simulated; this is a100, simulated); move it away" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "v100"], "accepted are h200, h100, a100"),
        (["--kernel", "softmax"], "unknown kernel 'softmax': accepted are pixel_embed"),
        (["--processes", "0"], "at least 1 is needed"),
        (["--json", "no/such/folder/x.json"], "make it first"),
    ],
)
def test_bad_input_is_one_line(options, message, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as stop:
        tune.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


class Timed:
    """A kernel that takes a microsecond a row, and does not run with 128."""

    now = 0.0

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, grid):
        assert grid == (7,)
        return self.run

    def run(self, x, Z, num_warps):
        if self.rows == 128:
            raise RuntimeError("out of resource: shared memory")
        Timed.now += self.rows * 1e-6


def test_on_a_gpu_launches_take_turns_and_what_fails_is_named(monkeypatch):
    entry = next(entry for entry in tune.entries(["inner"], ["bf16"]) if entry.name == "inner/_inner_fwd_kernel/(32, True)")

    def recorded(operation, given, multiprocessors, capability):
        assert (operation, given, multiprocessors, capability) == ("inner", "s torch.bfloat16 cuda", 132, (9, 0))
        config = inner.CONFIGS["_inner_fwd_kernel"][32, True]
        return [Launched(Launch(Timed(config.rows), {"Z": None}, config, 2), 7, ("x",), {"num_warps": config.warps})]

    def once(function, i, ahead, warm):
        start = Timed.now
        function(i)
        return Timed.now - start

    monkeypatch.setattr(tune, "recorded", recorded)
    monkeypatch.setattr(
        tune, "arguments", lambda operation, variant, dtype, batch, image, device: f"{variant} {dtype} {device}"
    )
    monkeypatch.setattr(tune.Entry, "shows", lambda self, found: True)
    monkeypatch.setattr(measure, "once", once)
    about = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    found = tune.timed(entry, [entry.fields | {"rows": rows} for rows in (16, 128, 64)])
    assert found == [{"us": 16.0}, {"error": "RuntimeError: out of resource: shared memory"}, {"us": 64.0}]
