"""A save that is killed, and a call that is interrupted, at a point that the test chooses."""

import os
import sys

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def killed_at(number, save):
    """Run ``save`` in a child that dies before its ``number``-th file operation; return whether it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def die(event, _arguments):
            nonlocal count
            count += event in FILE_EVENTS
            if count == number:
                os._exit(9)

        try:
            sys.addaudithook(die)
            save()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def interrupted_at(number, call, packages=("bayeslora",)):
    """Interrupt ``call`` before the ``number``-th line it runs in the packages; return how many it ran."""
    count = 0

    def on_line(_frame, event, _argument):
        nonlocal count
        count += event == "line"
        if count == number and event == "line":
            sys.settrace(None)
            raise KeyboardInterrupt
        return on_line

    def on_call(frame, _event, _argument):
        file = frame.f_code.co_filename
        return on_line if any(f"/{package}/" in file for package in packages) else None

    tracing = sys.gettrace()
    sys.settrace(on_call)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(tracing)
    return count
