"""A `saferope` that gets a signal at a known moment: `python dying.py MODULE.FUNCTION CALL SIGNAL train star ...`.

The process sends it to itself when the function is called for the CALLth time; of several processes, the second alone
does. Whoever watches from outside and then kills may come too late, or too early.
"""

import importlib
import os
import signal
import sys


def main() -> None:
    place, call, name = sys.argv[1:4]
    del sys.argv[1:4]
    module, function = place.rsplit(".", 1)
    owner, before = importlib.import_module(module), iter(range(int(call) - 1))
    real = getattr(owner, function)

    def dying(*args):
        if next(before, None) is None and os.environ.get("RANK", "1") == "1":
            os.kill(os.getpid(), getattr(signal, name))
        return real(*args)

    setattr(owner, function, dying)
    # where the tests run in the background, SIGINT is ignored, and so it would be here
    signal.signal(signal.SIGINT, signal.default_int_handler)
    importlib.import_module("saferope.cli").main()


if __name__ == "__main__":
    main()
