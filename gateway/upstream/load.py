"""Load: how busy an engine is."""

from typing import NamedTuple


class Load(NamedTuple):
    """How many slots an engine has, how many of them are taken, and how many requests wait for one."""

    slots: int = 0
    used: int = 0
    waiting: int = 0
