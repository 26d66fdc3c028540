"""Benchmarks: rows, floors, tables and workloads are right; the measurements run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1]))  # benchmarks/ is not installed
from benchmarks import floors, wrk
from benchmarks.agreement import said
from benchmarks.choose import newest, one_machine, together
from benchmarks.gpu_parts import backbone_work, sort_kernels
from benchmarks.host_steps import HostSteps
from benchmarks.machine import ROOT
from benchmarks.measure import Recorder
from benchmarks.options import make_parser, parse
from benchmarks.profile import by_part
from benchmarks.rows import COLUMNS, Row, append, percentile, read
from benchmarks.search_case import label
from benchmarks.tables import fill, make_tables
from benchmarks.usage import busiest_gpu, watching
from benchmarks.workload import Cell, Workload
from nezha_vllm.catalogue import Catalogue
from nezha_vllm.store import Store

PAPER = floors.Search(requests=1, width=512, sizes=(512, 512, 512), hidden=2048)


def test_floor_of_the_papers_shapes_by_hand():
    """3 levels of 512 codes, H = 2048, K = 512, bfloat16."""
    weights = (3 * 512 + 2 * 2048) * 2048 * 2  # W_1 … W_3, W_hh,1 and W_hh,2: 22 MiB
    states, answer = 4 * 2048 * 2, 4 * (2 + 512 * 4)
    code_drives = (512 + 1) * 2048 * 2  # 512 children of the root have 512 codes; those behind them at least one
    work = floors.stage(PAPER)
    assert work.bytes == weights + states + answer + code_drives
    by_request = 2 * 2048 * (3 * 512 + 2048)
    by_beams = 2 * 512 * 2048 * (512 + 2048) + 2 * 512 * 2048 * 512
    assert work.flops == by_request + by_beams
    assert work.flops == pytest.approx(6.46e9, rel=1e-3)
    assert work.floor_us(floors.Ceilings(3000, 800)) == pytest.approx(8.4, abs=0.05)  # by bytes
    assert work.floor_us(floors.Ceilings(3000, 600)) == pytest.approx(10.8, abs=0.05)  # by operations


def test_floors_of_kernels_by_hand():
    level_2 = floors.beam_products(PAPER, 1)
    assert level_2.flops == 2 * 512 * 2048 * 2560
    assert level_2.bytes == 2560 * 2048 * 2 + 512 * 2048 * 2 + 512 * (512 * 4 + 2048 * 2)
    assert floors.beam_products(PAPER, 2).flops == 2 * 512 * 2048 * 512  # no next state behind the last level
    assert floors.request_products(PAPER).bytes == 3584 * 2048 * 2 + 4 * 2048 * 2 + 3584 * 4
    assert floors.score_children(PAPER, 0).bytes == 2 * 512 * 4  # one row, the root's
    assert floors.score_children(PAPER, 1).bytes == 2 * 512 * 512 * 4 + 512 * 4
    assert floors.score_children(PAPER, 1, table=True).bytes == 2 * 512 * 512 * 4 + 512 * 4 + 512 * 513 * 4
    assert floors.context_states(PAPER, 0).bytes == 512 * 4096 + 2048 * 4 + 512 * 4096
    assert floors.select_beams(PAPER, 1, groups=8, fan=8).bytes == (512 * 8 + 2 * 512 * 8) * 4 + 512 * 24


def test_a_floor_knows_how_many_beams_a_catalogue_allows():
    few = floors.Search(requests=2, width=4096, sizes=(512, 512, 512), hidden=64, prefixes=(500, 900, 1000))
    assert [few.beams(level) for level in range(4)] == [1, 500, 900, 1000]
    assert floors.beam_products(few, 1).flops == 2 * 2 * 500 * 64 * (512 + 64)


def test_floors_of_item_scores_by_hand():
    known, half = (replace(PAPER, with_token=share) for share in (1.0, 0.5))
    assert floors.vectors(known) == 512 * 4096
    assert floors.vectors(half) == (256 + 256 * 3) * 4096  # codes of the others
    assert floors.vectors(replace(half, requests=64)) == (64 * 256 + 3 * 512) * 4096  # no more than there are
    assert floors.item_products(known).bytes == 512 * 4096 + 4096 + 512 * 24
    assert floors.stage(known).bytes - floors.stage(PAPER).bytes == 512 * 4096
    assert floors.rank_items(known).bytes == 512 * 5 * 4 + (2 + 512 * 4) * 4


def test_kernels_are_sorted_into_parts_and_waiting_is_counted_once():
    kernels = sort_kernels(
        [
            ("_fill_step_inputs", 0, 2),
            ("nvjet_tst_64x8", 3, 10),
            ("void vllm::reshape_and_cache_flash_kernel<…>", 13, 1),
            ("void cutlass::device_kernel<flash::enable_sm90<…>>", 14, 4),
            ("triton_red_fused_rms_norm", 18, 2),
            ("Memcpy HtoD (Pinned -> Device)", 20, 1),
            ("vectorized_gather_kernel", 21, 1),
            ("few_request_products", 22, 5),
            ("score_children", 23, 6),  # launched early, waits for the one before it
            ("select_beams", 29, 1),
            ("nvjet_hsh_128x256", 30, 7),
        ]
    )
    assert [kernel.part for kernel in kernels] == [
        "input kernel",
        "linear layers",
        "cache write",
        "attention",
        "norms, activations, rotary",
        "copies",
        "gather of states",
        "draft: request_products",
        "draft: score_children",
        "draft: select_beams",
        "draft: beam_products",
    ]
    assert kernels[8].own == 2
    parts = {part: us for part, us, _ in by_part([kernels])}
    assert parts["draft stage"] == 5 + 2 + 1 + 7


def test_floor_of_a_backbone_by_hand():
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    config = SimpleNamespace(**shape, num_attention_heads=32, num_key_value_heads=8)
    work = backbone_work(config, tokens=128)["linear layers"]
    weights = 16 * (2048 * (2048 + 2 * 512) + 2048 * 2048 + 3 * 2048 * 8192)  # Llama 3.2 1B without its embeddings
    assert work.bytes == 2 * weights == 1_946_157_056
    assert work.flops == 2 * 128 * weights


def test_steps_of_the_host_add_up():
    steps = HostSteps()
    outer = steps._timed("schedule", lambda: inner())
    inner = steps._timed("gather", lambda: time.sleep(0.002))
    for _ in range(3):
        steps.request(outer)
    found = steps.medians()
    assert list(found) == ["schedule", "gather", "everything else"]
    assert found["gather"][0] >= 2000 > found["schedule"][0]
    for request in steps.requests:
        assert sum(request.own_us.values()) == pytest.approx(request.total_us)


def row(**columns) -> Row:
    where = {"date": "2026-01-02T03:04:05+00:00", "commit": "abc", "gpu": "GPU A", "vllm": "0.32.0"}
    return Row(**(where | {"benchmark": "latency", "model": "m", "load": "closed", "transport": "http"} | columns))


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        row(system="nezha", prompt_tokens=128, prefix_caching=False, p50_ms=2.5, note='a "note", with\ncommas'),
        row(system="vllm-beam", beam_width=10, requests_per_s=1234.5, errors=0),
    ]
    append("some", rows[0], tmp_path)
    assert read(append("some", rows[1], tmp_path)) == rows


def test_a_file_with_other_columns_is_brought_up_to_date(tmp_path):
    (tmp_path / "some.csv").write_text("system,forgotten,p50_ms\nnezha,1,2.5\n")
    found = read(append("some", Row(system="new"), tmp_path))
    assert [(row.system, row.p50_ms) for row in found] == [("nezha", 2.5), ("new", None)]


def test_a_line_that_is_no_row_is_named(tmp_path):
    append("some", Row(system="a"), tmp_path)
    with open(tmp_path / "some.csv", "a") as file:
        file.write(",".join("x" for _ in COLUMNS) + "\n")
    with pytest.raises(ValueError, match=r"some\.csv, line 3"):
        read(tmp_path / "some.csv")


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 100))
def test_percentiles_are_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_the_newest_row_of_a_measurement_wins_and_machines_are_not_mixed():
    old = row(system="nezha", p50_ms=9.0, date="2026-01-01")
    new = row(system="nezha", p50_ms=2.0)
    other = row(system="vllm-beam", p50_ms=5.0, gpu="GPU B", date="2026-01-01")
    laptop = row(system="hf-beam", p50_ms=5.0, gpu="none, 2 CPU cores", date="2027-01-01")
    assert newest(one_machine([new, old, other, laptop])) == [new]
    assert one_machine([new, other], gpu="GPU B") == [other]
    older_version = row(system="nezha", p50_ms=3.0, vllm="0.9.0", date="2026-02-01")
    assert one_machine([new, older_version]) == [new]
    assert one_machine([new, older_version], vllm="0.9") == [older_version]


def test_rates_of_an_open_loop_come_from_one_commit():
    found = [row(load="open", request_rate=rate, commit=commit, date=date) for rate, commit, date in
             [(10.0, "a", "2026-01-01"), (11.0, "b", "2026-01-02"), (12.0, "b", "2026-01-02")]]  # fmt: skip
    assert [row.request_rate for row in newest(found)] == [11.0, 12.0]


LATENCY = """**m**, milliseconds

| prompt tokens | beam width | items | NEZHA p50 | p99 | vLLM beam search p50 | p99 | p50 apart |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| 128 | 10 | 5 | 2.00 | 3.00 | 20.00 | 30.00 | 10.0 × |
| 128 | 512 | 50 | 2.50 | 3.50 |  |  |  |

The same vLLM, one token behind the same prompt (128 tokens), no beams: p50 3.00, p99 4.00.

GPU A; vLLM 0.32.0; commit abc; 2026-01-02."""


def test_tables_are_written_between_their_marks_and_nowhere_else(tmp_path):
    cells = [("nezha", 10, 5, 2.0, 3.0), ("nezha", 512, 50, 2.5, 3.5), ("vllm-beam", 10, 10, 20.0, 30.0)]
    for system, width, n, p50, p99 in [*cells, ("vllm-one-token", 1, 1, 3.0, 4.0)]:
        append(
            "latency", row(system=system, prompt_tokens=128, beam_width=width, n=n, p50_ms=p50, p99_ms=p99), tmp_path
        )
    document = tmp_path / "README.md"
    marks = [f"<!-- benchmarks:{name} {side} -->" for name in ("latency", "throughput") for side in ("begin", "end")]
    document.write_text("before\n{}\nold\n{}\n{}\nkept\n{}\nafter\n".format(*marks))
    assert fill(document, make_tables(tmp_path)) == ["latency"]
    assert document.read_text() == "before\n{}\n{text}\n{}\n{}\nkept\n{}\nafter\n".format(*marks, text=LATENCY)
    document.write_text(marks[0])
    with pytest.raises(ValueError, match="has no end"):
        fill(document, {"latency": LATENCY})


SUMMARY = """|  | NEZHA, K = 512 | NEZHA, K = 10 | vLLM beam search, K = 10 | vLLM, one token, no beams |
| --- | ---: | ---: | ---: | ---: |
| one client, p50 | 2.5 ms | 2.0 ms | 20.0 ms | – |
| most requests/s | 1,000 | K = 50: 1,100 | – | – |
| with p99 ≤ 30 ms | 900 | – | – | – |

GPU A; vLLM 0.32.0; commit abc; 2026-01-02."""


def test_the_readme_has_the_default_server_beside_stock_vllm(tmp_path):
    cells = [("nezha", 512, 2.5), ("nezha", 10, 2.0), ("vllm-beam", 10, 20.0)]
    for system, width, p50 in cells:
        label = "llama-1b, async scheduling" if system == "nezha" else "llama-1b"
        append("latency", row(system=system, model=label, prompt_tokens=128, beam_width=width, p50_ms=p50), tmp_path)
    append("latency", row(system="nezha", model="llama-1b", prompt_tokens=128, beam_width=512, p50_ms=9.0), tmp_path)
    loop = {"benchmark": "throughput", "system": "nezha", "model": "llama-1b, async scheduling", "prompt_tokens": 128}
    for width, clients, speed, p99 in [(512, 8, 900.0, 20.0), (512, 64, 1000.0, 40.0), (50, 64, 1100.0, 40.0)]:
        found = row(beam_width=width, concurrency=clients, requests_per_s=speed, p99_ms=p99, **loop)
        append("throughput", found, tmp_path)
    assert make_tables(tmp_path)["summary"] == SUMMARY


def test_kernels_with_item_scores_take_the_place_of_none_without(tmp_path):
    where = {"benchmark": "kernels", "system": "triton", "part": "draft stage", "beam_width": 512, "concurrency": 1}
    append("kernels", row(**where, us=123.0, cold_us=130.0, date="2026-01-01"), tmp_path)
    append("kernels", row(**where, us=456.0, cold_us=460.0, settings="9 item tokens", date="2026-01-02"), tmp_path)
    assert "| 123.0 |" in make_tables(tmp_path)["kernels"]
    assert "456" not in make_tables(tmp_path)["kernels"]


def test_one_run_has_nezha_and_stock_vllm_under_one_name(tmp_path):
    ours = {"system": "nezha", "beam_width": 10, "n": 10, "p50_ms": 2.0, "prompt_tokens": 128, "date": "2026-01-03"}
    stock = ours | {"system": "vllm-beam", "p50_ms": 20.0}
    for gpu, commit, more, p50 in [("GPU A", "old", "", 1.0), ("GPU B", "new", ", B, async scheduling", 2.0)]:
        where = {"gpu": gpu, "commit": commit, "date": f"2026-01-0{p50:.0f}"}
        append("latency", row(**ours | where | {"model": f"m{more}", "p50_ms": p50}), tmp_path)
        append("latency", row(**stock | where | {"model": "m, B" if more else "m"}), tmp_path)
    append("latency", row(**ours | {"gpu": "GPU B", "commit": "new", "model": "m, B, tensor parallel 2"}), tmp_path)
    append("latency", row(**ours | {"gpu": "GPU C", "commit": "alone", "model": "m"}), tmp_path)
    found = together(tmp_path, "latency")
    assert [(one.commit, one.model, one.system, one.p50_ms) for one in found] == [
        ("new", "m", "nezha", 2.0),
        ("new", "m", "vllm-beam", 20.0),
    ]
    assert "| 10.0 × |" in make_tables(tmp_path)["latency-together"]
    assert not together(tmp_path, "throughput")


def test_every_plot_can_be_drawn(tmp_path):
    plots = pytest.importorskip("benchmarks.plots")
    base = {"prompt_tokens": 128, "p50_ms": 2.0, "p99_ms": 3.0, "requests_per_s": 9.0, "n": 5}
    for system, width in [("nezha", 10), ("nezha", 50), ("vllm-beam", 10), ("vllm-one-token", 1)]:
        append("latency", row(system=system, beam_width=width, concurrency=1, **base), tmp_path)
        for clients in (1, 4):
            columns = base | {"benchmark": "throughput", "beam_width": width, "concurrency": clients}
            append("throughput", row(system=system, **columns), tmp_path)
    stage = {"benchmark": "kernels", "part": "draft stage", "load": "batch", "beam_width": 10, "items": 7}
    for system in ("triton", "pytorch"):
        append("kernels", row(system=system, concurrency=1, us=5.0, floor_us=1.0, **stage), tmp_path)
    profile = {"benchmark": "profile", "system": "nezha", "engine_tokens": 131, "beam_width": 10, "n": 5}
    append("profile", row(part="gpu: attention", us=200.0, floor_us=7.0, launches=16, **profile), tmp_path)
    timeline = {"gpu": "GPU A", "vllm": "0.32.0", "commit": "abc", "model": "m", "prompt_tokens": 131, "beam_width": 10}
    timeline |= {"n": 5, "steps": [["schedule", 0, 200, 0]], "kernels": [["attention", 300, 500]]}
    (tmp_path / "timeline-m-128-10.json").write_text(json.dumps(timeline))
    drawn = [path.name for path in plots.draw_all(tmp_path, tmp_path / "images")]
    assert drawn == ["latency.svg", "throughput.svg", "draft-stage.svg", "timeline-m-128-10.svg"]
    tables = make_tables(tmp_path)
    assert "](images/timeline-m-128-10.svg)" in tables["timelines"]
    assert "| attention | 200.0 | 7.0 | 16 |" in tables["profile-gpu"]


def test_rankings_agree_in_part():
    one = [{"a": -1.0, "b": -2.0}, {"c": -1.0, "d": -3.0}]
    other = [{"b": -1.5, "a": -1.75}, {"c": -1.0, "e": -2.0}]
    expected = "x: first item 0.500, ten best 0.750, all 0.750; scores 0.4167 apart in the mean, 0.7500 at most"
    assert said(one, other, "x") == expected
    assert said(one[1:], [{"f": 0.0}], "x").endswith("no item in both")


def test_without_a_gpu_the_kernels_say_that_they_need_one():
    argv, hidden = [sys.executable, "-m", "benchmarks.kernels"], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(argv, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 2
    assert "NVIDIA GPU" in done.stderr


def test_kernels_are_labelled_by_part_and_level():
    names = ["few_request_products", "score_children", "select_beams", "context_states", "nvjet", "splitK_reduce"]
    labels = label([*names, "score_children", "select_beams", "item_products", "rank_items"])
    assert labels[3:6] == [("context_states", 1), ("beam_products", 2), ("beam_products", 2)]
    assert labels[0] == ("request_products", 1)
    assert labels[-3:] == [("select_beams", 2), ("item_products", 2), ("rank_items", 2)]


def test_the_busiest_gpu_is_the_one_with_the_highest_mean():
    assert busiest_gpu("0, 0\n1, 0\n0, 50\n1, 90\n0, 100\n1, 100\n") == pytest.approx(0.95)
    assert busiest_gpu("0, 7\n") is None  # of before
    assert busiest_gpu("0, [N/A]\n0, [N/A]\n") is None


@pytest.mark.parametrize(("cores", "clients", "threads"), [(16, 64, 4), (16, 1, 1), (3, 64, 1)])
def test_wrk_takes_a_quarter_of_the_cores_that_it_may_use(cores, clients, threads, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert wrk.threads(clients) == threads


def test_a_busy_process_of_a_server_is_seen():
    busy = "import sys, time\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", busy, "VLLM::EngineCore_DP0"], start_new_session=True) as process:
        try:
            time.sleep(0.2)
            with watching(process.pid) as found:
                time.sleep(0.5)
        finally:
            process.kill()
    assert 0.1 < found["engine_cores"] < 1.3
    assert "api_cores" not in found
    assert 0 <= found["stolen"] < 1
    with watching(None) as found:
        pass
    assert found == {}


def test_a_row_counts_the_items_of_the_catalogue_that_the_server_was_given(checkpoint, tmp_path):
    workload = Workload.of(checkpoint)
    own, sizes = workload.catalogue.num_items, workload.config["codebook_sizes"]
    store = Store(tmp_path / "store")
    for count in (3, 5):
        names, codes = [f"item-{row}" for row in range(count)], np.arange(count)[:, None].repeat(len(sizes), 1)
        version = Catalogue.build(names, codes, sizes, version=f"v{count}")
        version.save(tmp_path / f"v{count}")
        store.publish(tmp_path / f"v{count}", force=True)

    def items(system, *vllm_args):
        argv = ["--model", str(checkpoint), "--results", str(tmp_path), "--", *vllm_args]
        recorder = Recorder("latency", parse(make_parser(""), argv), workload)
        return recorder.add(system, Cell(128, 10, 10)).items

    def given(folder, **more):
        return "--additional-config", json.dumps({"nezha": {"catalogue": str(folder), **more}})

    assert items("nezha") == own
    assert items("nezha", *given(tmp_path / "v3")) == 3
    assert items("nezha", *given(store.folder)) == 5
    assert items("nezha", *given(store.folder, catalogue_version="v3")) == 3
    assert items("nezha", *given("catalogue")) == own, "a folder of the checkpoint"
    assert items("vllm-beam", *given(tmp_path / "v3")) == own, "stock vLLM knows no catalogue"
