"""alignblind_mi: how aligned language models hide bias from themselves ("Aligned but Blind", ACL 2025), measured and mitigated.

The public names are listed once, in `__init__.pyi`, and imported when they are first used, so that `import alignblind_mi` stays fast.
"""

import logging

import lazy_loader

__version__ = "0.1.0"

# peft imports bitsandbytes, which on some processors warns of a kernel that could be had from a hub; nothing here uses it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _attribute(name)
