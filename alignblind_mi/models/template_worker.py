"""The process in which chat templates are rendered: a line of JSON in, a line of JSON out, until its input ends.

A template is a program of whoever made the checkpoint: it may loop for ever or ask for all memory. Here it has a bound on both. It does
NOT import torch, nor anything of this project: it is run as a file.
"""

import json
import signal
import sys
from typing import Any

MEMORY = 2 << 30    # bytes of address space, where the platform can bound it
LONGEST = 1 << 20    # characters of a rendered conversation


def _bounded() -> None:
    try:
        import resource
    except ImportError:    # a platform without it: the time is bounded all the same
        return
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def rendered(asked: dict[str, Any]) -> dict[str, str]:
    """What transformers renders, as {"text": ...}; or {"refused": ...} where the template refuses or cannot be used."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, _ = render_jinja_template(**asked)
    except Exception as error:    # noqa: BLE001 - whatever a template raises is an answer: nothing of ours runs here
        return {"refused": str(error) or type(error).__name__, "kind": type(error).__name__}
    if len(texts[0]) > LONGEST:
        return {"refused": f"it writes {len(texts[0]):,} characters, at most {LONGEST:,} are taken", "kind": "ValueError"}
    return {"text": texts[0]}


def main() -> None:
    """Render what is asked for on standard input; the first argument is the time (seconds) that one rendering has."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # it ends with its input
    seconds, answers = int(sys.argv[1]), sys.stdout
    sys.stdout = sys.stderr
    import transformers.utils.chat_template_utils  # noqa: F401 - before the bounds

    _bounded()
    answers.write("{}\n")
    answers.flush()
    for line in sys.stdin:
        if hasattr(signal, "alarm"):
            signal.alarm(seconds)    # ends this process even where nobody is left to do it
        answers.write(json.dumps(rendered(json.loads(line))) + "\n")
        answers.flush()
        if hasattr(signal, "alarm"):
            signal.alarm(0)


if __name__ == "__main__":
    main()
