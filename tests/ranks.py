"""What the scripts that `torchrun` starts in the tests share."""

import sys
from contextlib import contextmanager
from pathlib import Path

from nanollada.trainers.models import own_process_group


def gloo_threads():
    """Names of this process's gloo threads; none where there is no /proc."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


@contextmanager
def rank():
    """The body starts gloo, and none of its threads outlives the group."""
    with own_process_group():
        yield
        assert gloo_threads() or sys.platform != "linux"
    assert not gloo_threads()


def allow_shards_without_a_gpu():
    """accelerate falls back to DDP, in silence, where the devices of a multi-process run are CPUs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    make = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        if not AcceleratorState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        make(self, *args, **kwargs)

    AcceleratorState.__init__ = init
