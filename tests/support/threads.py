"""Threads that run side by side, and whose errors are told."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor


class Threads:
    """Run functions again and again, each in a thread of its own, until the block ends; raise what they raise."""

    def __init__(self, *functions):
        self.stop = threading.Event()
        self.turns = [0] * len(functions)
        self.pool = ThreadPoolExecutor(len(functions))
        self.futures = [
            self.pool.submit(self.repeat, number, function) for number, function in enumerate(functions)
        ]

    def repeat(self, number, function):
        while not self.stop.is_set():
            function()
            self.turns[number] += 1

    def wait_for_turns(self, least):
        while min(self.turns) < least and not any(future.done() for future in self.futures):
            time.sleep(0.001)

    def __enter__(self):
        self.wait_for_turns(1)
        return self

    def __exit__(self, kind, error, traceback):
        if error is None:
            target = min(self.turns) + 5
            self.wait_for_turns(target)
        self.stop.set()
        self.pool.shutdown()
        for future in self.futures:
            future.result()
