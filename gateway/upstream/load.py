"""Load: how busy an engine is."""

from typing import Literal, NamedTuple

# Whether an engine has its GPU, which others may share. "barred": it did not wake, and its requests are rejected.
GpuState = Literal["awake", "waking", "asleep", "barred", "unknown"]


class Load(NamedTuple):
    """How many slots an engine has, how many of them are taken, and how many requests wait for one."""

    slots: int = 0
    used: int = 0
    waiting: int = 0
