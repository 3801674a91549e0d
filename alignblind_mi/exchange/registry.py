"""What Inspect finds by this package's entry points: its tasks, as `alignblind/NAME`, and its scorers and metrics.

Inspect names what it registers after the folder of the package (`alignblind_mi/NAME`); the tasks are registered once more under the name of
the command line. This module does NOT define any task.
"""

from inspect_ai._util.registry import registry_add, registry_info

from alignblind_mi.exchange.inspect_tasks import bbq, competence, explicit_bias, implicit_bias

SHORT = "alignblind"
TASKS = (implicit_bias, explicit_bias, competence, bbq)

for _task in TASKS:
    _own = registry_info(_task)
    registry_add(_task, _own.model_copy(update={"name": f"{SHORT}/{_own.name.rpartition('/')[2]}"}))    # last: the object bears one name
    registry_add(_task, _own)
