"""Waiting for what another thread or process does, generously: this machine may be busy."""

import time


def until(condition, within_s=60):
    """Return once the condition holds."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, "what was waited for did not happen"
        time.sleep(0.005)
