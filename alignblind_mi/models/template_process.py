"""Chat templates rendered where they can do no harm: in a process of their own, bounded in time and memory, which is killed if it must be.

The process is started once and kept (about a second; see `template_worker`), and its texts are those of transformers itself. It does NOT
know tokenizers or prompts.
"""

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Lock, Timer
from typing import Any

from alignblind_mi.errors import AlignblindError
from alignblind_mi.models import template_worker

SECONDS, STARTING = 4, 120    # that one rendering, and the start of the process, may take


class TemplateRefusal(AlignblindError):
    """A template that cannot be rendered: it refuses, it is broken, or it takes too long or too much memory."""


class Worker:
    """The process, started when it is first needed, and again after it was killed. One rendering at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.pid, self.lock = 0, Lock()

    def render(self, asked: Mapping[str, Any]) -> str:
        """The text of one conversation (`asked`: what transformers' `render_jinja_template` takes). Errors: TemplateRefusal."""
        with self.lock:
            process = self._running()
            answer = self._exchange(process, json.dumps(dict(asked)), SECONDS)
        if "text" not in answer:
            raise TemplateRefusal(answer["refused"])
        return str(answer["text"])

    def _running(self) -> "subprocess.Popen[str]":
        if self.process is None or self.pid != os.getpid() or self.process.poll() is not None:
            self.process = subprocess.Popen([sys.executable, "-P", str(Path(template_worker.__file__)), str(SECONDS + 5)], encoding="utf-8",
                                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            self.pid = os.getpid()
            self._exchange(self.process, None, STARTING)
        return self.process

    def _exchange(self, process: "subprocess.Popen[str]", line: str | None, seconds: int) -> dict[str, str]:
        """Write a line and read one; whatever takes longer is killed."""
        assert process.stdin is not None
        assert process.stdout is not None
        timer, answer = Timer(seconds, process.kill), ""
        timer.daemon = True
        timer.start()
        try:
            if line is not None:
                process.stdin.write(line + "\n")
                process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            pass    # it ended: said below
        finally:
            late = not timer.is_alive()
            timer.cancel()
            if not answer.endswith("\n"):    # also where this was interrupted: an answer must never be read as that to another question
                self.close()
        if not answer.endswith("\n"):
            raise TemplateRefusal(f"it was not rendered within {seconds} seconds" if late else
                                  "it ended the process in which it was rendered (too much memory, or too deep a recursion)")
        found: dict[str, str] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process, if this one started it."""
        if self.process is not None and self.pid == os.getpid():
            self.process.kill()
            self.process.communicate()
        self.process = None


WORKER = Worker()
atexit.register(WORKER.close)
