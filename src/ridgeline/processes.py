"""Other processes of this machine."""

from __future__ import annotations

import os


def is_alive(pid: object) -> bool:
    """Whether process `pid` of this machine is there; False for what is no process number."""
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # there, and another user's
    return True
