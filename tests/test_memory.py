"""When memory runs out a merge is done more sparingly, and says so; and jobs leave no memory behind."""

import gc

import pytest
import torch
from test_host_untouched import changes, everything, picture

from ziplora_lib.errors import MergeFailed, out_of_memory
from ziplora_lib.job import run

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
    """The host with memory for so many rows with gradients at once, or only where blocks are computed again."""

    def __init__(self, host, rows=99, checkpointed=False):
        self._host, self.rows, self.checkpointed = host, rows, checkpointed
        self.sessions = []

    def __getattr__(self, name):
        return getattr(self._host, name)

    def session(self, checkpointing=False):
        self.sessions.append(checkpointing)
        return self._host.session(checkpointing)

    def predict(self, x, t, conds):
        if torch.is_grad_enabled() and (len(x) > self.rows or (self.checkpointed and not self.sessions[-1])):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self._host.predict(x, t, conds)


def small(recipe_of, output, **fields):
    return recipe_of(output=output, loss_guidance=1, at_once=2, checkpointing=False, overwrite=True).copy(update=fields)


def test_fewer_samples_at_once_then_blocks_computed_again(host, recipe_of):
    picture(host)  # what libraries install with the first use is not ours
    before = everything(host)
    short = Short(host, rows=1, checkpointed=True)
    told = []
    result = run(small(recipe_of, "a"), short, told.append)
    assert result.warnings[:2] == [
        "memory ran out: begun again with one sample at once",
        "memory ran out: begun again with blocks computed again in the backward",
    ]
    assert [info["what"] for info in told if "memory" in info.get("what", "")] == result.warnings[:2]
    assert short.sessions == [False, False, True]
    assert result.recipe["at_once"] == 1
    del told
    assert changes(before, everything(host)) == []
    # the same merge as if it had been asked for so
    asked = run(small(recipe_of, "b", at_once=1, checkpointing=True), host)
    assert asked.saved["sha256"] == result.saved["sha256"]
    assert asked.warnings == result.warnings[2:]


def test_what_does_not_help_is_not_tried(host, recipe_of):
    result = run(small(recipe_of, "a"), Short(host, rows=1))
    assert [warning for warning in result.warnings if "memory" in warning] == [
        "memory ran out: begun again with one sample at once"
    ]


def test_too_little_memory_is_said_with_what_to_do_and_leaves_no_file(host, recipe_of):
    picture(host)  # what libraries install with the first use is not ours
    before = everything(host)
    with pytest.raises(MergeFailed, match=r"too little memory.*smaller resolution than 64"):
        run(small(recipe_of, "a"), Short(host, rows=0))
    assert changes(before, everything(host)) == []
    assert not [path for path in host.folder.iterdir() if path.stem == "a"]


def held():
    """Bytes of all tensors that are alive."""
    gc.collect()
    found = {
        id(t.untyped_storage()): t.untyped_storage().nbytes()
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
