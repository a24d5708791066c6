"""The thread that wakes readers: in order, never waiting, and not without it."""

from __future__ import annotations

import threading

from lminf_export.runtime.batching.waking import WakingThread

SECONDS = 20


def test_functions_are_called_in_order_and_nobody_waits_for_them():
    waking, gate, called = WakingThread(), threading.Event(), []
    waking.start()
    done = threading.Event()
    waking.wake([lambda: gate.wait(SECONDS), lambda: called.append(1)])
    waking.wake([lambda: called.append(2), done.set])
    assert called == [], "the first of them is still held up"
    gate.set()
    assert done.wait(SECONDS)
    assert called == [1, 2]
    waking.close()


def test_what_comes_before_the_end_is_called_and_what_comes_after_it_too():
    waking, called = WakingThread(), []
    waking.start()
    waking.wake([lambda: called.append(1)])
    waking.close()
    waking._thread.join(SECONDS)
    assert called == [1]
    waking.wake([lambda: called.append(2)])
    assert called == [1, 2]
