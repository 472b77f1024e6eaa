"""The simulator of one multiprocessor, on machine code whose time is known by hand; and the committed table of its errors."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks import machine_code, simulate, simulation_checks, static_cost
from benchmarks.machine_code import NOTHING, Instruction, Parts

H200 = simulate.gpu("h200")
RESULTS = Path(simulate.__file__).parent / "results" / "simulation.json"


def code(op, rest="", stall=1, sets=NOTHING, frees=NOTHING, waits=0, guard="", target=None):
    return Instruction(op, rest, guard, stall, sets, frees, waits, target)


FFMA, EXIT = code("FFMA", stall=4), code("EXIT")
LOAD = [code("LDS", sets=0), code("FADD", waits=1, stall=4)]  # waits for what it loads


def clocks(loop, turns, warps=1, resident=1, programs=1, conflicts=1.0, gpu=H200):
    """Of programs that go through a loop so often."""
    steps = [simulate._step(i, gpu, conflicts) for i in loop] * turns
    return simulate.run(gpu, [steps] * programs, warps, resident, 1.0).clocks


@pytest.mark.parametrize(
    ("loop", "each"),
    [
        ([FFMA] * 10, 40),  # the stall counts
        ([code("HMMA.16816.F32.BF16")] * 8, 8 * 6.35),  # the pipes
        ([code("MUFU.EX2")] * 8, 64),
        ([code("PRMT")] * 8, 16),
        ([code("HFMA2"), code("FADD")] * 4, 12),  # one pipe for both, which half precision fills
        ([code("LDSM.16.M88.4")] * 8, 32),
        ([code("LDS.64")] * 8, 16),
        (LOAD, 2 + 1 + simulate.SHARED - 3 + 4),  # there, 128 bytes, and back
    ],
)
def test_a_loop_takes_what_its_instructions_do(loop, each):
    assert (clocks(loop, 30) - clocks(loop, 10)) / 20 == pytest.approx(each, rel=0.05)


def test_a_doubled_body_takes_twice_as_long():
    once, twice = (clocks(body, 40) - clocks(body, 20) for body in ([FFMA] * 7, [FFMA] * 14))
    assert twice == 2 * once


def test_half_the_occupancy_doubles_what_waits():
    both, one = (clocks(LOAD, 200, resident=resident, programs=2) for resident in (2, 1))
    alone = clocks(LOAD, 200)
    assert alone < both < 1.1 * alone  # in each other's waits
    assert one == pytest.approx(2 * alone + simulate.NEXT_PROGRAM, rel=0.01)


def test_half_the_occupancy_costs_nothing_where_a_pipe_is_full():
    full = [code("MUFU.EX2")] * 20
    both, one = (clocks(full, 50, warps=4, resident=resident, programs=2) for resident in (2, 1))
    assert one == pytest.approx(both, rel=0.05)


def test_a_barrier_costs_its_latency_and_waits_for_the_last():
    body = [FFMA] * 5
    more = clocks([*body, code("BAR.SYNC", stall=5)], 20, warps=4) - clocks(body, 20, warps=4)
    assert more == pytest.approx(20 * simulate.BARRIER, abs=20)


@pytest.mark.parametrize("conflicts", [2.0, 8.0])
def test_conflicting_addresses_take_as_many_turns(conflicts):
    body = [code("LDS")] * 16
    more = [clocks(body, 40, warps=4, conflicts=c) - clocks(body, 20, warps=4, conflicts=c) for c in (1.0, conflicts)]
    assert more[1] == pytest.approx(conflicts * more[0], rel=0.02)


def test_all_of_a_multiprocessor_share_its_memory_and_each_scheduler_has_its_pipes():
    shared, matrix = [code("LDS.128")] * 8, [code("HMMA.16816.F32")] * 8
    assert clocks(shared, 50, warps=4) == pytest.approx(4 * clocks(shared, 50), rel=0.03)
    assert clocks(matrix, 50, warps=4) == pytest.approx(clocks(matrix, 50), rel=0.01)
    assert clocks(matrix, 50, warps=8) == pytest.approx(2 * clocks(matrix, 50), rel=0.01)


def product(n, rest="R24, gdesc[UR8], R24, gsb0"):
    return code(f"HGMMA.64x{n}x16.F32.BF16", rest)


def until(left):
    return code("WARPGROUP.DEPBAR.LE", f"gsb0, {left:#x}")


def test_an_asynchronous_product_takes_the_matrix_unit_and_shared_memory_of_its_warp_group():
    wide, narrow = [product(128)] * 8, [product(8)] * 8
    assert clocks([*wide, until(0)], 30, warps=4) - clocks([*wide, until(0)], 10, warps=4) == pytest.approx(
        20 * (8 * 64 + simulate.PRODUCT), rel=0.02
    )
    assert clocks(wide, 50, warps=8) == pytest.approx(2 * clocks(wide, 50, warps=4), rel=0.05)
    each = 4 * (4 + 8 / 16)  # for which the other warps wait
    ends = [clocks([*narrow, until(0)], turns, warps=4) for turns in (10, 30)]
    assert (ends[1] - ends[0]) / 20 == pytest.approx(8 * each, rel=0.05)
    in_registers = [product(8, "R24, R4, gdesc[UR8], R24, gsb0")] * 8
    assert clocks([*in_registers, until(0)], 30, warps=4) < 0.8 * ends[1]


def test_an_asynchronous_product_holds_up_what_waits_for_it_alone():
    work = [FFMA] * 10
    waits = [product(256), until(0), *work]
    beside = [product(256), *work, until(0)]
    assert (clocks(waits, 30) - clocks(waits, 10)) / 20 == pytest.approx(128 + simulate.PRODUCT + 40, rel=0.05)
    assert (clocks(beside, 30) - clocks(beside, 10)) / 20 == pytest.approx(128 + simulate.PRODUCT, rel=0.05)
    behind = [product(256), until(1), *work]  # one may be under way: as long as the longer of both
    assert (clocks(behind, 30) - clocks(behind, 10)) / 20 == pytest.approx(128, rel=0.05)


def test_memory_takes_its_bandwidth():
    copy = Parts([], [code("LDG.E.128", sets=0), code("STG.E.128", waits=1, frees=1), code("FADD", waits=2)], [EXIT], 0)
    grid = 16 * 132
    moved = 2 * 512 * 4 * 100 * grid  # 100 turns of four warps
    found = simulate.simulate(copy, H200, warps=4, resident=16, grid=grid, bytes=moved, loops=100)
    assert found.us == pytest.approx(moved / H200.dram / 1e3, rel=0.1)
    assert found.binds == "dram"
    assert found.low < found.us < found.high
    from_cache = simulate.simulate(copy, H200, warps=4, resident=16, grid=grid, bytes=moved / 10, loops=100)
    assert from_cache.us < 0.5 * found.us
    from_l2 = simulate.simulate(copy, H200, warps=4, resident=16, grid=grid, bytes=moved / 10, loops=100, l1=False)
    assert from_l2.us == pytest.approx(moved / 2 / H200.l2 / 1e3, rel=0.1)  # what is loaded


def test_turns_are_whole():
    loop = Parts([], [FFMA] * 1000, [EXIT], 0)

    def time(tiles):
        return simulate.simulate(loop, H200, warps=1, resident=4, grid=528, tiles=tiles, bytes=0).us

    one_more = (time(528 * 20 + 1) - time(528 * 20)) * 1e3 * H200.ghz
    assert one_more == pytest.approx(4000, abs=500)  # a program has another turn, for which all wait
    assert time(528 * 21) == pytest.approx(time(528 * 20 + 1), rel=0.01)


def test_what_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="has UTCHMMA, which no pipe of simulate.py takes: no time is told"):
        simulate.simulate(Parts([], [code("UTCHMMA")], [], 0), H200, warps=1, resident=1, grid=1, bytes=0)
    with pytest.raises(ValueError, match="unknown gpu 'v100': accepted are h200, h100, a100, rtx4090, rtx5090"):
        simulate.gpu("v100")
    with pytest.raises(ValueError, match="no program fits"):
        simulate.simulate(Parts([], [FFMA], [], 0), H200, warps=1, resident=0, grid=1, bytes=0)
    with pytest.raises(ValueError, match="no machine code"):
        machine_code.decode("no code")


TEXT = """
        /*0000*/                   HMMA.16816.F32.BF16 R24, R56, R20, RZ ;                   /* 0x000000143818723c */
                                                                                             /* 0x020fd800000418ff */
.L_x_1:
        /*0010*/              @!P0 LDSM.16.M88.4 R16, [R98+UR7+0x5000] ;                     /* 0x005000076210783b */
                                                                                             /* 0x000e6a0008000200 */
        /*0020*/               @P1 BRA `(.L_x_1) ;                                           /* 0x0000000000000947 */
                                                                                             /* 0x000fea0003800000 */
"""


@pytest.mark.parametrize("target", sorted({gpu.target for gpu in simulate.GPUS.values()}))
def test_a_gpu_is_of_a_target_that_is_compiled_for(target):
    assert target in static_cost.TARGETS
    of_it = [gpu for gpu in simulate.GPUS.values() if gpu.target == target]
    assert all(gpu.multiprocessors == static_cost.TARGETS[target].multiprocessors for gpu in of_it)


def test_the_bits_of_the_scheduler_are_read():
    first, second, third = machine_code.decode(TEXT)
    assert (first.stall, first.sets, first.frees, first.waits) == (12, NOTHING, NOTHING, 1 << 5)
    assert (second.name, second.guard, second.stall, second.sets, second.waits) == ("LDSM", "@!P0", 5, 1, 0)
    assert (third.target, third.guard) == (1, "@P1")


def test_the_name_of_an_asynchronous_product_has_its_shape():
    text = TEXT.replace("HMMA.16816.F32.BF16 R24, R56, R20, RZ ;", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;")
    first = machine_code.decode(text)[0]
    assert (first.op, first.rest) == ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR8], R24, gsb0")


def test_the_way_through_branches():
    body = [code("FADD")] * 10
    start = [code("BRA", guard="@P0", target=3), code("MOV"), code("EXIT")]  # the rare end is passed over
    back = code("BRA", guard="@P1", target=3)
    behind = [code("BRA", guard="@P2", target=16), code("FMUL"), code("EXIT")]
    parts = machine_code.parts([*start, *body, back, *behind])
    assert [i.name for i in parts.before] == ["BRA"]
    assert [i.name for i in parts.loop] == ["FADD"] * 10 + ["BRA"]
    assert [i.name for i in parts.behind] == ["BRA", "FMUL"]
    assert parts.other_loops == 0


def test_main_loops_one_behind_another():
    loops = [[*[code("FADD")] * 10, code("BRA", guard="@P1", target=at)] for at in (0, 12)]
    parts = machine_code.parts([*loops[0], code("MOV"), *loops[1], code("FMUL"), code("EXIT")], loops=2)
    assert [len(part) for part in (parts.before, parts.loop, parts.behind)] == [0, 11, 1]
    assert [[i.name for i in part[-1:]] for part in parts.then[0]] == [["BRA"], ["FMUL"]]
    assert parts.other_loops == 0


@pytest.fixture(scope="module")
def results():
    return json.loads(RESULTS.read_text("utf-8"))


def test_the_errors_are_of_this_model(results):
    assert results["model"] == simulation_checks.model(), "run: python -m benchmarks.simulation_checks --json FILE"


def test_every_known_time_lies_in_the_band(results):
    low, high = simulate.BAND
    wrong = [row["name"] for row in results["rows"] if not low <= row["us"] / row["simulated_us"] <= high]
    assert wrong == []


def test_published_times_are_met_within_a_fifth(results):
    rows = [row for row in results["rows"] if row["kind"] == "published"]
    assert len(rows) >= 6
    assert len({row["source"] for row in rows}) >= 2
    assert [row["name"] for row in rows if abs(row["error_percent"]) > 20] == []
