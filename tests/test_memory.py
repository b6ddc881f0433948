"""When memory runs out a merge is done more sparingly, and says so; and jobs leave no memory behind."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_host_untouched import changes, everything, picture

from ziplora_lib import memory
from ziplora_lib.errors import MergeFailed, out_of_memory
from ziplora_lib.job import run
from ziplora_lib.jobs import KEPT_PICTURES, Job, remember
from ziplora_lib.merge import MODES
from ziplora_lib.merge.blocks import Kept, blocks_of

# as CUDA's, PyTorch's CPU and Apple's allocators say it
ERRORS = [
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=["cuda", "cpu", "mps", "cublas", "python"])
def test_running_out_of_memory_is_known_by_what_is_said(error):
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_errors_are_not_taken_for_it(error):
    assert not out_of_memory(error)


class Short:
    """The host with memory for so many rows with gradients at once, and only where the steps run in this mode or less."""

    def __init__(self, host, monkeypatch, rows=99, mode="fast"):
        self._host, self.rows, self.mode = host, rows, mode
        self.plans, self._running = [], False
        choose = memory.choose

        def noted(*args):
            self._running = False
            self.plans.append(choose(*args))
            self._running = True
            return self.plans[-1]

        monkeypatch.setattr(memory, "choose", noted)

    def __getattr__(self, name):
        return getattr(self._host, name)

    def predict(self, x, t, conds):
        if torch.is_grad_enabled():
            modes = list(MODES)
            too_fast = self._running and modes.index(self.plans[-1].mode) < modes.index(self.mode)
            if len(x) > self.rows or too_fast:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self._host.predict(x, t, conds)


def small(recipe_of, output, **fields):
    given = {"loss_guidance": 1, "at_once": 2, "memory": "fast", "overwrite": True, **fields}
    return recipe_of(output=output, **given)


def test_fewer_samples_at_once_then_blocks_computed_again_then_blocks_in_main_memory(host, recipe_of, monkeypatch):
    picture(host)  # what libraries install with the first use is not ours
    before = everything(host)
    short = Short(host, monkeypatch, rows=1, mode="offload")
    told = []
    result = run(small(recipe_of, "a"), short, told.append)
    assert result.warnings[:3] == [
        "memory ran out: begun again with one sample at once",
        "memory ran out: begun again with blocks computed again in the backward",
        "memory ran out: begun again with blocks kept in main memory",
    ]
    assert [info["what"] for info in told if "memory ran" in info.get("what", "")] == result.warnings[:3]
    assert [(plan.mode, plan.at_once) for plan in short.plans] == [
        ("fast", 2), ("fast", 1), ("checkpointing", 1), ("offload", 1),
    ]  # fmt: skip
    assert result.memory["mode"] == "offload"
    assert result.recipe["at_once"] == 1
    del told
    short.plans.clear()
    assert changes(before, everything(host)) == []
    # the same merge as if it had been asked for so
    asked = run(small(recipe_of, "b", at_once=1, memory="offload"), host)
    assert asked.saved["sha256"] == result.saved["sha256"]
    assert asked.warnings == result.warnings[3:]


def test_what_does_not_help_is_not_tried(host, recipe_of, monkeypatch):
    result = run(small(recipe_of, "a"), Short(host, monkeypatch, rows=1))
    assert [warning for warning in result.warnings if "memory" in warning] == [
        "memory ran out: begun again with one sample at once"
    ]


def test_memory_that_runs_out_before_the_steps_is_met_with_one_lora_at_once(host, recipe_of):
    class Narrow:
        def __getattr__(self, name):
            return getattr(host, name)

        def predict(self, x, t, conds):
            if len(x) > 2:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return host.predict(x, t, conds)

    # two LoRAs' samples with what the bare model says of each are four rows, one LoRA's two
    result = run(small(recipe_of, "a", objective="guided", samples=2, at_once=None), Narrow())
    assert result.warnings[0] == "memory ran out: begun again with one sample at once"
    assert result.memory["at_once"] == 1


def test_too_little_memory_is_said_with_what_to_do_and_leaves_no_file(host, recipe_of, monkeypatch):
    picture(host)  # what libraries install with the first use is not ours
    before = everything(host)
    with pytest.raises(MergeFailed, match=r"too little memory.*smaller resolution than 64"):
        run(small(recipe_of, "a"), Short(host, monkeypatch, rows=0))
    assert changes(before, everything(host)) == []
    assert not [path for path in host.folder.iterdir() if path.stem == "a"]


def test_the_way_is_chosen_by_what_is_free_and_shown(host, recipe_of, monkeypatch):
    """From the fastest on; on a CPU never by fewer samples at once, which would change the file's bytes."""
    told, of = [], []
    choose = memory.choose
    monkeypatch.setattr(memory, "choose", lambda *args: of.append(choose(*args)) or of[-1])
    files, free = set(), 10**12
    for mode in MODES:
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        result = run(recipe_of(memory="auto", at_once=None, overwrite=True), host, told.append)
        assert result.memory == {"mode": mode, "at_once": 2, "needed": of[-1].needed, "free": free}
        assert f"memory: {of[-1]}" in [info.get("what") for info in told]
        files.add(result.saved["sha256"])
        free = of[-1].needed - 1
    assert len(files) == 1
    # what a user asks for counts for more than what is free
    result = run(recipe_of(memory="fast", at_once=1, overwrite=True), host)
    assert (result.memory["mode"], result.memory["at_once"]) == ("fast", 1)


@pytest.mark.parametrize(
    ("free", "mode", "at_once"),
    [
        (20.0, "fast", 2), (8.0, "fast", 1), (6.0, "checkpointing", 2), (4.0, "checkpointing", 1), (2.0, "offload", 2),
        (0.5, "offload", 1), (None, "checkpointing", 1),
    ],
)  # fmt: skip
def test_on_a_gpu_fewer_samples_at_once_come_before_slower_ways(monkeypatch, recipe_of, free, mode, at_once):
    """With numbers of a made-up model: 6 GB a sample, 2 GB where blocks are computed again; 4 GB of weights in blocks."""
    monkeypatch.setattr(memory, "MARGIN", 1.0)
    monkeypatch.setattr(memory, "RESERVE", 10**9)
    monkeypatch.setattr(memory, "free_memory", lambda device: None if free is None else int(free * 1e9))
    monkeypatch.setattr(memory, "foreseen", lambda *_: Kept(10**9, 0, (10**9,) * 5))
    monkeypatch.setattr(memory, "weights_freed", lambda unet: 4 * 10**9)
    monkeypatch.setattr(memory, "torch", SimpleNamespace(device=lambda name: SimpleNamespace(type="cuda")))
    card = SimpleNamespace(model=lambda: SimpleNamespace(moves=""), unet=lambda: None)
    calibration = SimpleNamespace(device="cuda", train=[SimpleNamespace(empty=None)])
    plan = memory.choose(recipe_of(memory="auto", at_once=None), card, None, calibration)
    assert (plan.mode, plan.at_once) == (mode, at_once)
    assert str(plan).startswith(f"{mode}, ")


@pytest.mark.parametrize("method", ["ziplora", "ssr"])
def test_where_the_host_moves_the_blocks_of_the_unet_they_are_offloaded_whatever_the_method(recipe_of, method):
    """As with --lowvram: its own moving is off while passes run by the plan."""
    low = SimpleNamespace(model=lambda: SimpleNamespace(moves="blocks"))
    plan = memory.choose(recipe_of(method=method, at_once=None), low, None, SimpleNamespace(device="cuda"))
    assert (plan.mode, plan.at_once) == ("offload", 1)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_free_memory_is_asked_by_number_and_counts_what_the_allocator_keeps(monkeypatch, device):
    """PyTorch 2.1 refuses a device without one, which is what the WebUI has."""
    asked = []

    def free(card):
        asked.append(card)
        return 5 * 10**9, 24 * 10**9

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda card: asked.append(card) or 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda card: asked.append(card) or 10**9)
    assert memory.free_memory(torch.device(device)) == 7 * 10**9
    assert asked == [1 if device == "cuda:1" else 0] * 3


def test_a_pass_that_ran_out_has_let_go_before_weights_come_back(host, recipe_of, monkeypatch):
    """Otherwise the text encoders come back to a card that is still full, and stay away."""
    held, seen = [], []

    class Full:
        def __getattr__(self, name):
            return getattr(host, name)

        @contextlib.contextmanager
        def resting(self, text=False):
            with host.resting(text):
                try:
                    yield
                finally:
                    seen.append([ref() is None for ref in held])

        def predict(self, x, t, conds):
            told = host.predict(x, t, conds)
            if torch.is_grad_enabled() and not seen and "forward" in vars(blocks_of(host.unet())[0]):
                activations = told * 2
                held.append(weakref.ref(activations))
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return told

    result = run(small(recipe_of, "a", memory="checkpointing"), Full())
    assert result.warnings[0] == "memory ran out: begun again with one sample at once"
    assert seen[0] == [True]


def test_pictures_of_older_jobs_are_forgotten_and_what_they_did_is_not(host, recipe_of):
    jobs, drawn = {}, []
    for k in range(KEPT_PICTURES + 2):
        job = Job.merge(recipe_of(method="direct", overwrite=True, balance_points=1, seed=k))
        job.run(host)
        drawn.append(job)
        remember(jobs, job)
        failed = Job("strip", "x", lambda host, callback: 1 / 0)
        failed.run(host)
        remember(jobs, failed)
    assert [len(job.result.pictures) for job in drawn] == [0, 0, *[1] * KEPT_PICTURES]
    assert all(job.public()["result"]["tag"] for job in drawn)


def test_what_a_whole_picture_keeps_is_foreseen_from_crops():
    """To the byte, where attention keeps no scores, and where it does."""
    pytest.importorskip("diffusers")
    from benchmarks.footprint import footprint, fused, unfused
    from benchmarks.scale import Size

    for attention in (fused, unfused):
        found = footprint(Size((32, 64, 64), (1, 2), 64), 4, rows=2, attention=attention)
        assert found["foreseen"] == pytest.approx(found["whole"], rel=1e-6)
        assert found["whole"]["checkpointing"] < found["whole"]["fast"]


def held():
    """Bytes of all tensors that are alive."""
    gc.collect()
    found = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes()
        for t in gc.get_objects()
        if issubclass(type(t), torch.Tensor)
    }
    return sum(found.values())


def test_ten_jobs_leave_no_tensor_behind(host, recipe_of):
    run(small(recipe_of, "a"), host)  # what is kept for good, such as encoded constants
    before = held()
    for k in range(10):
        run(small(recipe_of, "a", seed=k), host)
    assert held() == before
